"""Dropout, and its rate as a function of the step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig

ADAPTERS = 1 << 20  # the first number of adapters in fold_in, beyond those that split uses


def dropout_rate(config: ModelConfig, step: Array) -> Array | float:
    """The rate at `step`: constant, or (start - end) / (step / scale + 1) + end."""
    if config.dropout_end < 0:
        return config.dropout
    return (config.dropout - config.dropout_end) / (step / config.dropout_scale + 1) + config.dropout_end


class Dropout(NamedTuple):
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

    Attributes:
      rate: a number, or a float32 scalar.
      key: the random key; None: nothing is dropped.
      bernoulli: (key, p, shape) -> bools, such as Partitioner.bernoulli.
    """

    rate: Array | float = 0.0
    key: Array | None = None
    bernoulli: Callable = jax.random.bernoulli

    def __call__(self, x: Array) -> Array:
        if self.key is None or (isinstance(self.rate, float) and self.rate == 0):
            return x
        keep = self.bernoulli(self.key, 1 - self.rate, x.shape)
        scaled = x.astype(jnp.float32) / jnp.asarray(1 - self.rate, jnp.float32)  # 1 - rate is rounded in bfloat16
        return jnp.where(keep, scaled.astype(x.dtype), 0)

    def split(self, n: int) -> list["Dropout"]:
        """`n` Dropouts of this rate, with independent keys."""
        keys = [None] * n if self.key is None else jax.random.split(self.key, n)
        return [self._replace(key=key) for key in keys]

    def of_adapter(self, rate: float, number: int) -> "Dropout":
        """A Dropout of another rate, whose key is independent of those of `split` and of other numbers."""
        if self.key is None or rate == 0:
            return NO_DROPOUT
        return self._replace(rate=rate, key=jax.random.fold_in(self.key, ADAPTERS + number))


NO_DROPOUT = Dropout()
