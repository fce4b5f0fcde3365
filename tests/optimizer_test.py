"""Compares the schedule with its closed form, and the update with AdamW written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.config import OptimizerConfig
from trainer.errors import ConfigError
from trainer.optimizer import OPTIMIZERS, at_rate, make_optimizer, make_schedule

BASE = {"peak_lr": 1.0, "end_lr": 0.1, "warmup_steps": 10}


def rate(step: jax.Array) -> jax.Array:
    return jnp.float32(0.01) * (step + 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 200: 0.1}),
        (
            "cosine",
            {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 60: 0.55, 110: 0.1, 200: 0.1},
        ),
        ("wsd", {9: 1.0, 10: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 200: 0.1}),
    ],
)
def test_schedules(schedule, expected):
    lr = make_schedule(OptimizerConfig(schedule=schedule, **BASE), num_train_steps=110)
    for step, value in expected.items():
        assert float(lr(jnp.int32(step))) == pytest.approx(value, rel=1e-6), step


def test_no_warmup_and_decay_steps():
    config = OptimizerConfig(schedule="linear", peak_lr=1.0, end_lr=0.0, warmup_steps=0, decay_steps=50)
    lr = make_schedule(config, num_train_steps=1000)
    assert float(lr(0)) == 1.0 and float(lr(25)) == pytest.approx(0.5) and float(lr(50)) == 0.0


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_against_numpy(clip_norm):
    """Checks, in float64, clipping by global norm, bias-corrected moments, decoupled weight decay on matrices only, and
    the learning rate of the step."""
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8)
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("layers", "embed")}
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3, 4)), "scale": rng.normal(size=(2, 3))}
    optimizer = make_optimizer(config, rate, axes)
    p32 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(p32)
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, 6):
        grads = {k: rng.normal(size=p.shape) for k, p in params.items()}
        g32 = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        updates, state = optimizer.update(g32, state, p32, step=jnp.int32(t - 1))
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        if clip_norm:
            grads = {k: g * min(1, clip_norm / norm) for k, g in grads.items()}
        for k in params:
            m[k] = 0.9 * m[k] + 0.1 * grads[k]
            v[k] = 0.95 * v[k] + 0.05 * grads[k] ** 2
            expected = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            if k == "kernel":
                expected = expected + 0.1 * np.asarray(p32[k], np.float64)
            np.testing.assert_allclose(np.asarray(updates[k]) / -(0.01 * t), expected, rtol=2e-5, atol=1e-6)
        p32 = optax.apply_updates(p32, updates)


def test_the_state_has_one_layout_for_every_config():
    """A checkpoint fits whatever the values are, so a run can resume after clipping is turned off. The layout is that
    of the first checkpoints: the learning rate adds nothing to it."""
    axes, params = {"w": ("embed", "mlp")}, {"w": jnp.ones((2, 2))}
    layouts = {
        jax.tree.structure(make_optimizer(OptimizerConfig(clip_norm=c, weight_decay=w), rate, axes).init(params))
        for c in (0.0, 1.0)
        for w in (0.0, 0.1)
    }
    first = (optax.EmptyState(), optax.scale_by_adam().init(params), optax.MaskedState(optax.EmptyState()))
    assert layouts == {jax.tree.structure(first)}


def test_moments_in_bfloat16():
    """The moments take half the memory, and the update differs only by the rounding of both moments, 2^-9 each."""
    axes, rng = {"w": ("embed", "mlp")}, np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)}
    optimizers = {
        dtype: make_optimizer(OptimizerConfig(moments_dtype=dtype, b2=0.95, clip_norm=0, weight_decay=0), rate, axes)
        for dtype in ("float32", "bfloat16")
    }
    states = {dtype: optimizer.init(params) for dtype, optimizer in optimizers.items()}
    assert jax.tree.structure(states["float32"]) == jax.tree.structure(states["bfloat16"])
    for _ in range(50):
        grads = {"w": jnp.asarray(rng.normal(size=(40, 30)) + 1, jnp.float32)}
        updates = {}
        for dtype, optimizer in optimizers.items():
            updates[dtype], states[dtype] = optimizer.update(grads, states[dtype], params, step=jnp.int32(0))
            assert updates[dtype]["w"].dtype == jnp.float32
            for name in ("mu", "nu"):
                assert optax.tree.get(states[dtype], name)["w"].dtype == dtype
            assert optax.tree.get(states[dtype], "count").dtype == jnp.int32
        # A moment forgets rounding errors as it forgets gradients: it averages 1 / (1 - b) of them, each at most 2^-9.
        exact, rounded = (np.asarray(updates[dtype]["w"]) for dtype in ("float32", "bfloat16"))
        assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)
    assert (exact != rounded).any()


def test_a_mean_slower_than_bfloat16_can_hold_is_refused():
    with pytest.raises(ValueError) as e:
        OptimizerConfig(moments_dtype="bfloat16", b2=0.99)
    for part in ("optimizer.b2 is 0.99", "bfloat16", "0.95", "keep float32"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    assert OptimizerConfig(moments_dtype="bfloat16", b2=0.95).b2 == 0.95
    with pytest.raises(ValueError, match="moments_dtype is 'float16'; it must be one of float32, bfloat16"):
        OptimizerConfig(moments_dtype="float16")


def test_an_optimizer_is_chosen_by_its_name(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "another", lambda config: optax.scale_by_lion(config.b1, config.b2))
    axes, params = {"w": ("embed", "mlp")}, {"w": jnp.ones((2, 3))}
    another = make_optimizer(OptimizerConfig(name="another", weight_decay=0.5, clip_norm=0), rate, axes)
    updates, state = another.update({"w": jnp.full((2, 3), -7.0)}, another.init(params), params, step=jnp.int32(9))
    np.testing.assert_allclose(updates["w"], -0.1 * (-1 + 0.5 * 1), rtol=1e-6)  # sign of the gradient, weight decay
    assert optax.tree.get(state, "mu")["w"].shape == (2, 3)


def test_an_unknown_optimizer():
    with pytest.raises(ConfigError, match=r"^config\.optimizer\.name is 'adamv'; it must be one of adamw$") as e:
        make_optimizer(OptimizerConfig(name="adamv"), rate, {})
    assert e.value.exit_code == 2


def test_groups_can_have_rates_of_their_own():
    groups = {
        "fast": at_rate(rate, optax.identity()),
        "slow": at_rate(lambda step: rate(step) / 10, optax.scale(3.0)),
    }
    both, params = optax.partition(groups, {"a": "fast", "b": "slow"}), {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = both.update(params, both.init(params), params, step=jnp.int32(4))
    np.testing.assert_allclose(updates["a"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.015, rtol=1e-6)
