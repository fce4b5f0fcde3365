"""Weights in int8, each output with a scale (the vector-wise absmax of LLM.int8(), Dettmers et al., 2022): a quarter of
the bytes of float32. Generation may use them; the products are computed in the dtype of the activations."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from model.partitioner import over_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix that a layer uses as it would use an array: w.astype(dtype), x @ w, w[ids].

    Attributes:
      values: int8, or what astype made of it: a weight [in, out], or a table [n, embed].
      scale: float32 [out] or [n]; what the values of an output, or of a row of the table, are multiplied by.
    """

    values: Array
    scale: Array

    def astype(self, dtype: jnp.dtype) -> "Quantized":
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def __rmatmul__(self, x: Array) -> Array:
        # Scaled after the product: XLA then converts the values inside the product, also on GPUs.
        return self.scaled(x @ self.values)

    def __getitem__(self, ids: Array) -> "Array | Quantized":
        if ids is ...:  # the value of an nnx.Param
            return self
        rows = self.values[ids]
        return (rows * self.scale[ids][..., None]).astype(rows.dtype)

    def scaled(self, y: Array) -> Array:
        """The outputs y [..., out] of a product with the values, in the dtype of y."""
        return (y * over_tokens(self.scale, y)).astype(y.dtype)


def quantize(w: Array, outputs: int) -> Quantized:
    """w [in, out] or a table [n, embed], rounded to the nearest of 255 steps; `outputs` is the axis that has scales."""
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(1 - outputs, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)  # not a number stays not a number
    return Quantized(jnp.round(w / scale).astype(jnp.int8), scale.reshape(-1))
