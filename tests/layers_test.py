"""Linear, norms, feed-forward and dropout, one at a time, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from model.config import MLPS, ModelConfig
from model.dropout import dropout, dropout_rate
from model.layers import MLP, Linear, Norm, param
from model.partitioner import Placement


def noise(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def randomised(module: nnx.Module) -> nnx.Module:
    """The module with each parameter replaced by noise."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    noises = [jnp.asarray(noise(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, noises))


def as_numpy(module: nnx.Module) -> dict:
    return reference.as_float64(nnx.to_pure_dict(nnx.state(module)))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_the_last_axis_and_keeps_the_leading_ones(bias):
    layer = randomised(Linear(nnx.Rngs(params=0), 6, 5, ("embed", "mlp"), std=1.0, bias=bias, stack=None))
    x, weights = noise(2, 3, 4, 6, seed=9), as_numpy(layer)
    expected = np.einsum("abci,io->abco", x.astype(np.float64), weights["kernel"]) + weights.get("bias", 0.0)
    assert ("bias" in weights) == bias
    np.testing.assert_allclose(layer(jnp.asarray(x), Placement()), expected, rtol=0, atol=1e-5)


def test_linear_computes_in_the_dtype_of_its_input():
    """float32 parameters must not lift bfloat16 activations back to float32."""
    layer = Linear(nnx.Rngs(params=0), 6, 5, ("embed", "mlp"), std=1.0, bias=True, stack=None)
    assert layer(jnp.ones((2, 6), jnp.bfloat16), Placement()).dtype == jnp.bfloat16
    assert layer(jnp.ones((2, 6), jnp.float32), Placement()).dtype == jnp.float32


def test_param_has_the_stated_deviation_and_differs_from_layer_to_layer():
    p = param(nnx.Rngs(params=0), 0.02, (100, 50), ("embed", "mlp"), 3)
    values = np.asarray(p[...])
    assert values.shape == (3, 100, 50) and values.dtype == np.float32
    assert p.get_metadata("axes") == ("layers", "embed", "mlp")
    # 5000 values a layer: deviation within 1 % (one sigma), mean within 0.02 / sqrt(5000) = 0.0003.
    np.testing.assert_allclose(values.std(axis=(1, 2)), 0.02, rtol=0.05)
    np.testing.assert_allclose(values.mean(axis=(1, 2)), 0, atol=0.0015)
    correlation = np.corrcoef(values.reshape(3, -1))
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(5000)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_is_its_definition(kind, bias):
    """Biased variance, eps under the root; a bias only in layernorm."""
    config = ModelConfig(embed_dim=8, num_heads=1, norm=kind, bias=bias, norm_eps=0.3)
    norm = randomised(Norm(config, None))
    weights = as_numpy(norm)
    assert set(weights) == ({"scale", "bias"} if kind == "layernorm" and bias else {"scale"})
    x = 2 + noise(3, 4, 8, seed=9)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    expected = centred / np.sqrt((centred**2).sum(-1, keepdims=True) / 8 + 0.3) * weights["scale"]
    expected += weights.get("bias", 0.0)
    np.testing.assert_allclose(norm(jnp.asarray(x), Placement()), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_of_bfloat16_is_computed_in_float32(kind):
    """A mean far above the deviation: in bfloat16 the difference would keep two bits or so."""
    norm = randomised(Norm(ModelConfig(embed_dim=256, num_heads=1, norm=kind), None))
    x = jnp.asarray(100 + 5 * noise(4, 256, seed=9), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * as_numpy(norm)["scale"]
    y = norm(x, Placement())
    assert y.dtype == jnp.bfloat16
    # Only the last rounding is in bfloat16, which has 8 significant bits: 2^-8 of the value at most.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_its_definition(kind, bias):
    """act(x W_gate) * (x W_up) W_down, or act(x W_up) W_down: gate and up are not to be mixed up."""
    config = ModelConfig(embed_dim=6, num_heads=1, mlp=kind, mlp_dim=10, bias=bias)
    mlp = randomised(MLP(config, nnx.Rngs(params=0), std=1.0, out_std=1.0, stack=None))
    weights = as_numpy(mlp)
    assert set(weights) == ({"up", "gate", "down"} if kind in ("swiglu", "geglu", "glu") else {"up", "down"})
    assert {name for layer in weights.values() for name in layer} == ({"kernel", "bias"} if bias else {"kernel"})
    x = noise(2, 3, 6, seed=9)

    def linear(name, y):
        return y @ weights[name]["kernel"] + weights[name].get("bias", 0.0)

    gate = linear("gate", x) if "gate" in weights else None
    expected = linear("down", reference.mlp_hidden(kind, linear("up", x), gate))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(mlp(jnp.asarray(x), Placement()), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("start", "end", "scale", "expected"),
    [
        (0.3, 0.1, 100.0, {0: 0.3, 100: 0.2, 300: 0.15, 1900: 0.11}),
        (0.2, 0.0, 1000.0, {0: 0.2, 1000: 0.1, 3000: 0.05}),
        (0.0, 0.4, 10.0, {0: 0.0, 10: 0.2, 30: 0.3}),
        (0.25, -1.0, 10.0, {0: 0.25, 10: 0.25, 1_000_000: 0.25}),
        (0.25, 0.25, 10.0, {0: 0.25, 10: 0.25, 1_000_000: 0.25}),
    ],
)
def test_dropout_rate_over_the_steps(start, end, scale, expected):
    """(start - end) / (step / scale + 1) + end, eagerly and with the traced int32 step of the training state."""
    config = ModelConfig(dropout=start, dropout_end=end, dropout_scale=scale)
    compiled = jax.jit(lambda step: dropout_rate(config, step))
    for step, rate in expected.items():
        assert float(dropout_rate(config, step)) == pytest.approx(rate, abs=1e-7)
        assert float(compiled(jnp.int32(step))) == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_keeps_the_stated_share_and_the_mean(rate):
    n = 100_000
    y = np.asarray(dropout(jnp.ones((n,)), rate, jax.random.key(1)))
    kept = y != 0
    sigma = np.sqrt(rate * (1 - rate) / n)
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < 5 * sigma / (1 - rate)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_scale_of_dropout_is_not_rounded_to_bfloat16(rate):
    """1 - rate is another number in bfloat16; each result is the nearest to the exact one."""
    x = jnp.asarray(noise(10_000), jnp.bfloat16)
    y = dropout(x, rate, jax.random.key(1))
    kept, exact = np.asarray(y) != 0, np.asarray(x, np.float64) / (1 - rate)
    np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(jnp.asarray(exact, jnp.bfloat16))[kept])


def test_dropout_without_a_key_is_the_identity():
    x = jnp.asarray(noise(100))
    np.testing.assert_array_equal(dropout(x, 0.9, None), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_of_rate_0_is_the_identity_whatever_the_key(dtype):
    """A schedule may start at 0; the traced rate takes the random path there."""
    x = jnp.asarray(noise(10_000), dtype)
    for key in range(3):
        y = jax.jit(dropout)(x, jnp.float32(0.0), jax.random.key(key))
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))


def test_dropout_masks_follow_the_key():
    x = jnp.ones((1000,))
    a, same, other = (np.asarray(dropout(x, 0.5, jax.random.key(k))) != 0 for k in (1, 1, 2))
    np.testing.assert_array_equal(a, same)
    assert 0.4 < (a != other).mean() < 0.6  # independent masks differ in half the places


def test_dropout_gradient_flows_through_the_kept_elements_alone():
    x, key = jnp.asarray(noise(1000)), jax.random.key(1)
    gradient = jax.grad(lambda x: dropout(x, 0.25, key).sum())(x)
    np.testing.assert_allclose(gradient, np.where(dropout(x, 0.25, key) != 0, 1 / 0.75, 0.0), rtol=1e-6)
