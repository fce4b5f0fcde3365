"""Dropout, and its rate as a function of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig


def dropout_rate(config: ModelConfig, step: Array) -> Array | float:
    """Rate at `step`: constant, or (start - end) / (step / scale + 1) + end."""
    if config.dropout_end < 0:
        return config.dropout
    return (config.dropout - config.dropout_end) / (step / config.dropout_scale + 1) + config.dropout_end


def dropout(x: Array, rate: Array | float, key: Array | None, bernoulli: Callable = jax.random.bernoulli) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); no key: x as it is.

    Args:
      bernoulli: (key, p, shape) -> bool, as Placement.bernoulli.
    """
    if key is None:
        return x
    keep = bernoulli(key, 1 - rate, x.shape)
    scaled = x.astype(jnp.float32) / jnp.asarray(1 - rate, jnp.float32)  # 1 - rate is another number in bfloat16
    return jnp.where(keep, scaled.astype(x.dtype), 0)
