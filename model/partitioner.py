"""How arrays are sharded and attention is computed. This base class is the no-op of a single device.

trainer/parallel/partitioner.py has the one for a mesh. Modules get their partitioner at construction and hand it every
weight, activation and attention under the names of their logical axes; they know nothing else of devices.
"""

import jax
import jax.numpy as jnp
from jax import Array

from model import kernels
from model.context import Context
from model.kernels import AttentionSpec, Mask


class Partitioner:
    """For a single device: nothing is constrained, gathered or split.

    Attributes:
      context_parallel: whether the tokens of a row lie on several devices.
      gathers_params: whether `constrain` gathers the shards of a weight for a layer. The gathered copy should then not
        be kept for the backward pass.
    """

    context_parallel = False
    gathers_params = False

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        """The activation x, laid out as its logical axes say. Its embed axis is named None: fsdp shards its rows."""
        return x

    def flatten(self, x: Array) -> Array:
        """[b, t, …] to [b * t, …] for a product with a weight, unless the tokens of a row lie on several devices.

        The gradient of the weight then contracts one axis, which is one plain matrix product; over batch and sequence
        XLA's CPU backend makes a transposed copy of the activations (docs/performance.md). The shards of a sequence
        that is split are not adjacent, so they cannot be one axis with the batch.
        """
        return x if self.context_parallel else x.reshape(-1, *x.shape[2:])

    def gather_param(self, w: Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> Array:
        """The parameter w in `dtype` as a layer uses it: all of its embed axis."""
        return w.astype(dtype)

    def linear(self, x: Array, w: Array, axes: tuple[str, str]) -> Array:
        """x w over the last axis of x, with the parameter w of logical axes `axes`."""
        return x @ self.gather_param(w, axes, x.dtype)

    def add_bias(self, y: Array, b: Array, axes: tuple[str]) -> Array:
        """y [b, t, out] + b, with the parameter b of the logical axis in `axes`."""
        return y + over_tokens(self.gather_param(b, axes, y.dtype), y)

    def bernoulli(self, key: Array, p: Array | float, shape: tuple[int, ...]) -> Array:
        """Bools of an activation's shape, its rows first, each True with probability p."""
        return jax.random.bernoulli(key, p, shape)

    def embed(self, table: Array, ids: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        """Rows of the parameter table [n, embed] in `dtype`: ids [b, t] to [b, t, embed]."""
        return table.astype(dtype)[ids]

    def attention(self, q: Array, k: Array, v: Array, ctx: Context, spec: AttentionSpec) -> Array:
        """Attention among the tokens of each row: q [b, t, h, d], k and v [b, t, kv, d] to [b, t, h, d]."""
        mask = Mask(ctx.index, ctx.segment_ids, ctx.segment_ids, in_order=True)
        return kernels.xla(q, k, v, mask, spec, dropout=ctx.dropout)


def over_tokens(w: Array, x: Array) -> Array:
    """w [n] with as many axes as x [..., n] has: no axis is added in silence."""
    return w.reshape((1,) * (x.ndim - 1) + w.shape)
