"""Compares Linear, norms, feed-forward and dropout, each separately, with their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from model.config import GATED_MLPS, MLPS, ModelConfig
from model.context import Context
from model.dropout import Dropout, dropout_rate
from model.layers import MLP, Build, Linear, Norm, project, unembed


def noise(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


ONE_ROW = Context(jnp.arange(3), jnp.arange(3)[None])


def build(**fields) -> Build:
    return Build(ModelConfig(**{"embed_dim": 6, "num_heads": 1, "init_std": 1.0} | fields), nnx.Rngs(params=0))


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
    layer = randomised(Linear(build(), 6, 5, ("embed", "mlp"), bias=bias))
    x, weights = noise(2, 3, 6, seed=9), as_numpy(layer)
    expected = np.einsum("abi,io->abo", x.astype(np.float64), weights["kernel"]) + weights.get("bias", 0.0)
    assert ("bias" in weights) == bias
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=0, atol=1e-5)


def test_projections_of_one_input_are_those_of_each_layer():
    """The layers have several widths, and each has its own kernel; some have a bias. The results are in the layers'
    order."""
    layers = [randomised(Linear(build(), 6, out, ("embed", "mlp"), bias=out > 4)) for out in (5, 4, 7)]
    x = jnp.asarray(noise(2, 3, 6, seed=9))
    together = project(x, *layers)
    assert [y.shape for y in together] == [(2, 3, 5), (2, 3, 4), (2, 3, 7)]
    for y, layer in zip(together, layers, strict=True):
        np.testing.assert_array_equal(y, layer(x))


def test_linear_computes_in_the_dtype_of_its_input():
    """float32 parameters must not promote bfloat16 activations to float32."""
    layer = Linear(build(), 6, 5, ("embed", "mlp"), bias=True)
    assert layer(jnp.ones((1, 2, 6), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer(jnp.ones((1, 2, 6), jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("std", [None, 0.5])
def test_a_kernel_has_the_deviation_of_its_build_unless_it_is_told_another(std):
    kernel = Linear(build(init_std=0.1), 100, 50, ("embed", "mlp"), bias=False, std=std).kernel[...]
    np.testing.assert_allclose(np.std(kernel), 0.1 if std is None else std, rtol=0.05)


def test_normal_has_the_stated_deviation_and_differs_from_layer_to_layer():
    p = build().stacked(3).normal((100, 50), ("embed", "mlp"), 0.02)
    values = np.asarray(p[...])
    assert values.shape == (3, 100, 50) and values.dtype == np.float32
    assert p.get_metadata("axes") == ("layers", "embed", "mlp")
    # With 5000 values per layer, one sigma is 1 % for the deviation, and 0.02 / sqrt(5000) = 0.0003 for the mean.
    np.testing.assert_allclose(values.std(axis=(1, 2)), 0.02, rtol=0.05)
    np.testing.assert_allclose(values.mean(axis=(1, 2)), 0, atol=0.0015)
    correlation = np.corrcoef(values.reshape(3, -1))
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(5000)


def test_constant_is_its_value_in_every_layer():
    for of, shape, axes in ((build(), (4,), ("embed",)), (build().stacked(3), (3, 4), ("layers", "embed"))):
        p = of.constant(0.25, (4,), ("embed",))
        np.testing.assert_array_equal(p[...], np.full(shape, 0.25, np.float32))
        assert p[...].dtype == np.float32 and p.get_metadata("axes") == axes


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_is_its_definition(kind, bias):
    """The variance is biased, and eps is under the root; only layernorm has a bias."""
    norm = randomised(Norm(build(embed_dim=8, norm=kind, bias=bias, norm_eps=0.3)))
    weights = as_numpy(norm)
    assert set(weights) == ({"scale", "bias"} if kind == "layernorm" and bias else {"scale"})
    x = 2 + noise(3, 4, 8, seed=9)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    expected = centred / np.sqrt((centred**2).sum(-1, keepdims=True) / 8 + 0.3) * weights["scale"]
    expected += weights.get("bias", 0.0)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_of_bfloat16_is_computed_in_float32(kind):
    """The mean is far above the deviation: in bfloat16, only about two bits of the difference would be left."""
    norm = randomised(Norm(build(embed_dim=256, norm=kind)))
    x = jnp.asarray(100 + 5 * noise(4, 256, seed=9), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * as_numpy(norm)["scale"]
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    # Only the last rounding is in bfloat16, which has 8 significant bits: the error is at most 2^-8 of the value.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_its_definition(kind, bias):
    """(act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down: gate and up must not be swapped."""
    mlp = randomised(MLP(build(mlp=kind, mlp_dim=10, bias=bias)))
    weights = as_numpy(mlp)
    assert set(weights) == ({"up", "gate", "down"} if kind in GATED_MLPS else {"up", "down"})
    assert {name for layer in weights.values() for name in layer} == ({"kernel", "bias"} if bias else {"kernel"})
    x = noise(2, 3, 6, seed=9)

    def linear(name, y):
        return y @ weights[name]["kernel"] + weights[name].get("bias", 0.0)

    gate = linear("gate", x) if "gate" in weights else None
    expected = linear("down", reference.mlp_hidden(kind, linear("up", x), gate))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(mlp(jnp.asarray(x), ONE_ROW), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("axes", [("vocab", "embed"), ("embed", "vocab")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unembed_is_the_product_with_each_row_of_the_table(axes, dtype):
    """Logits are float32, for hidden states with any leading axes; from column vocab_size on they are -inf."""
    x, table = (jnp.asarray(noise(*shape, seed=s), dtype) for s, shape in enumerate([(2, 3, 6), (8, 6)]))
    w = table if axes[0] == "vocab" else table.T
    wide = np.einsum("bte,ve->btv", *(np.asarray(a, np.float64) for a in (x, table)))
    for logits in (
        unembed(x, w, axes, config=ModelConfig(vocab_size=5)),
        unembed(x.reshape(6, 6), w, axes, config=ModelConfig(vocab_size=5)),
    ):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits[..., :5], wide[..., :5].reshape(*logits.shape[:-1], 5), rtol=0, atol=1e-5)
        assert (np.asarray(logits)[..., 5:] == -np.inf).all()


def test_unembed_of_a_shard_of_the_vocabulary_is_that_part_of_the_whole():
    x, table = jnp.asarray(noise(3, 6)), jnp.asarray(noise(8, 6, seed=1))
    whole = unembed(x, table, ("vocab", "embed"), config=ModelConfig(vocab_size=5))
    for first in (0, 4):
        shard = unembed(
            x, table[first : first + 4], ("vocab", "embed"), config=ModelConfig(vocab_size=5), first=jnp.int32(first)
        )
        np.testing.assert_allclose(shard, whole[:, first : first + 4], rtol=1e-6)


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
    y = np.asarray(Dropout(rate, jax.random.key(1))(jnp.ones((n,))))
    kept = y != 0
    sigma = np.sqrt(rate * (1 - rate) / n)
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < 5 * sigma / (1 - rate)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_scale_of_dropout_is_not_rounded_to_bfloat16(rate):
    """1 - rate would be a different number in bfloat16; each result must be the bfloat16 nearest to the exact value."""
    x = jnp.asarray(noise(10_000), jnp.bfloat16)
    y = Dropout(rate, jax.random.key(1))(x)
    kept, exact = np.asarray(y) != 0, np.asarray(x, np.float64) / (1 - rate)
    np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(jnp.asarray(exact, jnp.bfloat16))[kept])


def test_dropout_without_a_key_is_the_identity():
    x = jnp.asarray(noise(100))
    np.testing.assert_array_equal(Dropout(0.9, None)(x), x)
    assert Dropout(0.9, None).split(2) == [Dropout(0.9, None)] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_of_rate_0_is_the_identity_whatever_the_key(dtype):
    """A schedule may start at rate 0; a traced rate takes the random path even at 0."""
    x = jnp.asarray(noise(10_000), dtype)
    for key in range(3):
        y = jax.jit(lambda x, rate, key: Dropout(rate, key)(x))(x, jnp.float32(0.0), jax.random.key(key))
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))


def test_dropout_masks_follow_the_key():
    x = jnp.ones((1000,))
    a, same, other = (np.asarray(Dropout(0.5, jax.random.key(k))(x)) != 0 for k in (1, 1, 2))
    np.testing.assert_array_equal(a, same)
    assert 0.4 < (a != other).mean() < 0.6  # independent masks differ at half the places


def test_the_parts_of_a_dropout_have_its_rate_and_masks_of_their_own():
    x = jnp.ones((1000,))
    whole = Dropout(0.5, jax.random.key(1))
    masks = [np.asarray(part(x)) != 0 for part in (whole, *whole.split(3))]
    for i, a in enumerate(masks):
        assert 0.4 < a.mean() < 0.6
        for b in masks[:i]:
            assert 0.4 < (a != b).mean() < 0.6
    for part, mask in zip(whole.split(3), masks[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(part(x)) != 0, mask)


def test_the_bools_of_a_dropout_are_those_of_its_partitioner():
    """Dropout asks the partitioner for a bool per element, with the probability that the element is kept."""
    asked = []

    def bernoulli(key, p, shape):
        asked.append((key, p, shape))
        return jnp.arange(6).reshape(shape) % 2 == 0

    y = Dropout(0.2, jax.random.key(1), bernoulli)(jnp.ones((2, 3)))
    np.testing.assert_allclose(y, [[1.25, 0, 1.25], [0, 1.25, 0]], rtol=1e-6)
    assert asked == [(jax.random.key(1), 0.8, (2, 3))]


def test_dropout_gradient_flows_only_through_the_kept_elements():
    x, dropout = jnp.asarray(noise(1000)), Dropout(0.25, jax.random.key(1))
    gradient = jax.grad(lambda x: dropout(x).sum())(x)
    np.testing.assert_allclose(gradient, np.where(dropout(x) != 0, 1 / 0.75, 0.0), rtol=1e-6)
