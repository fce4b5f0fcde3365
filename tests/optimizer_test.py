"""The schedule against its closed form; the update against AdamW written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config import OptimizerConfig
from trainer.optimizer import make_optimizer, make_schedule

BASE = {"peak_lr": 1.0, "end_lr": 0.1, "warmup_steps": 10}


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
    """Clipping by global norm, bias-corrected moments, decoupled decay on matrices alone, in float64."""
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8)
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("layers", "embed")}
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3, 4)), "scale": rng.normal(size=(2, 3))}
    optimizer = make_optimizer(config, axes)
    p32 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(p32)
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, 6):
        grads = {k: rng.normal(size=p.shape) for k, p in params.items()}
        updates, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, p32)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        if clip_norm:
            grads = {k: g * min(1, clip_norm / norm) for k, g in grads.items()}
        for k in params:
            m[k] = 0.9 * m[k] + 0.1 * grads[k]
            v[k] = 0.95 * v[k] + 0.05 * grads[k] ** 2
            expected = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            if k == "kernel":
                expected = expected + 0.1 * np.asarray(p32[k], np.float64)
            np.testing.assert_allclose(updates[k], expected, rtol=2e-5, atol=1e-6)
        p32 = jax.tree.map(lambda p, u: p - 0.01 * u, p32, updates)


def test_the_state_has_one_layout_for_every_config():
    """A checkpoint fits whatever the values, so turning clipping off does not lose it."""
    axes, params = {"w": ("embed", "mlp")}, {"w": jnp.ones((2, 2))}
    layouts = {
        jax.tree.structure(make_optimizer(OptimizerConfig(clip_norm=c, weight_decay=w), axes).init(params))
        for c in (0.0, 1.0)
        for w in (0.0, 0.1)
    }
    assert len(layouts) == 1
