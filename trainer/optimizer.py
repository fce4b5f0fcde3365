"""Optimizers by name, the learning rate of each step, and the optax chain that turns gradients into updates."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from trainer import schedule
from trainer.config import OptimizerConfig
from trainer.errors import ConfigError

# By config.optimizer.name: the transformation of the clipped gradient to the direction of descent, before weight decay
# and learning rate. An optimizer whose state has arrays of the parameters' shapes needs one line here and nothing else.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda config: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
}


def chosen(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer named `config.name`, with its state in `config.moments_dtype`.

    Raises:
      ConfigError: the name is not in OPTIMIZERS.
    """
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"config.optimizer.name is {config.name!r}; it must be one of {', '.join(OPTIMIZERS)}")
    return _kept_in(config.moments_dtype, OPTIMIZERS[config.name](config))


def make_schedule(config: OptimizerConfig, num_train_steps: int) -> Callable[[Array], Array]:
    """A function from the number of finished steps to the learning rate of the next update (trainer/schedule.py)."""
    return functools.partial(schedule.learning_rate, config, num_train_steps, xp=jnp)


def make_optimizer(
    config: OptimizerConfig, learning_rate: Callable[[Array], Array], axes: dict
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a gradient to what is added to the parameters: update(grads, state, params, step=...).

    The chain has the same state whatever the values of the config, so that a checkpoint fits any of them. The learning
    rate is a function of `step`, the number of finished steps, and not part of the state.

    Args:
      learning_rate: maps `step` to a float32 scalar.
      axes: the parameters' logical axes. Weight decay applies to parameters with two or more axes besides `layers`: a
        stacked norm has the shape of a matrix, but is still a norm.

    Raises:
      ConfigError: the config names an optimizer that does not exist.
    """
    decayed = jax.tree.map(
        lambda names: len([n for n in names if n != "layers"]) >= 2, axes, is_leaf=lambda a: isinstance(a, tuple)
    )
    direction = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        chosen(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
    return at_rate(learning_rate, direction)


def at_rate(
    learning_rate: Callable[[Array], Array], direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of `direction` by -learning_rate(step); `step` is an argument of update().

    The state is that of `direction`; as a link of optax.chain, this would add a level to the tree that is saved. Groups
    of parameters can have their own rates, if each group is a part of an optax.partition.
    """
    inner = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, *, step: Array, **extra_args):
        updates, state = inner.update(updates, state, params, step=step, **extra_args)
        rate = learning_rate(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


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
