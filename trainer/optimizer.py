"""Learning rate schedule and the optax chain."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from trainer import schedule
from trainer.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_train_steps: int) -> Callable[[Array], Array]:
    """Learning rate of the update after `step` finished steps (trainer/schedule.py)."""
    return functools.partial(schedule.learning_rate, config, num_train_steps, xp=jnp)


def make_optimizer(config: OptimizerConfig, axes: dict) -> optax.GradientTransformation:
    """Gradient to update, without the learning rate, which the step multiplies in (it is a function of the step alone).

    The chain has the same state whatever the config, so that a checkpoint fits any of its values.

    Args:
      axes: the parameters' logical axes. Weight decay is for those of two or more besides `layers`: a stacked norm is
        a matrix by its shape, but still a norm.
    """
    decayed = jax.tree.map(
        lambda names: len([n for n in names if n != "layers"]) >= 2, axes, is_leaf=lambda a: isinstance(a, tuple)
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _kept_in(config.moments_dtype, optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def _kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32, with the floats of its state kept in `dtype`."""
    if dtype == "float32":
        return inner

    def cast(state, to):
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
