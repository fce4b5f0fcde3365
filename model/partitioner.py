"""How arrays are sharded and attention is computed. This base class is the no-op of a single device.

trainer/parallel/partitioner.py has the partitioner of a mesh. Modules get their partitioner at construction and hand it
every weight, activation and attention under the names of their logical axes; they know nothing else of devices.
"""

import jax
import jax.numpy as jnp
from jax import Array

from model import kernels
from model.context import Context
from model.kernels import AttentionSpec, Mask


class Partitioner:
    """The partitioner of a single device: it constrains, gathers and splits nothing.

    Attributes:
      context_parallel: whether the tokens of a row lie on several devices.
      gathers_params: whether `constrain` gathers the shards of a weight for a layer. The gathered copy should then not
        be kept for the backward pass.
    """

    context_parallel = False
    gathers_params = False

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        """The activation x, laid out by its logical axes. The embed axis is None: fsdp shards activations by row."""
        return x

    def flatten(self, x: Array) -> Array:
        """[b, t, …] to [b * t, …] for a product with a weight, unless the tokens of a row lie on several devices.

        The gradient of the weight then contracts one axis, which is one plain matrix product; over the two axes of
        batch and sequence, XLA's CPU backend makes a transposed copy of the activations (docs/performance.md). If a
        sequence is split over devices, its shards are not adjacent, so sequence and batch cannot be one axis.
        """
        return x if self.context_parallel else x.reshape(-1, *x.shape[2:])

    def gather_param(self, w: Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> Array:
        """The parameter w in `dtype` as a layer uses it, with its complete embed axis."""
        return w.astype(dtype)

    def linear(self, x: Array, w: Array, axes: tuple[str | None, str | None]) -> Array:
        """x w over the last axis of x; `axes` are the logical axes of the parameter w."""
        return x @ self.gather_param(w, axes, x.dtype)

    def add_bias(self, y: Array, b: Array, axes: tuple[str]) -> Array:
        """y [b, t, out] + b; `axes` has the logical axis of the parameter b."""
        return y + over_tokens(self.gather_param(b, axes, y.dtype), y)

    def bernoulli(self, key: Array, p: Array | float, shape: tuple[int, ...]) -> Array:
        """Bools in the shape of an activation (the first axis is its rows), each True with probability p."""
        return jax.random.bernoulli(key, p, shape)

    def embed(self, table: Array, ids: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        """Rows of the parameter table [n, embed] in `dtype`: ids [b, t] to [b, t, embed]."""
        return table.astype(dtype)[ids]

    def attention(self, q: Array, k: Array, v: Array, ctx: Context, spec: AttentionSpec) -> Array:
        """Attention among the tokens of each row: q [b, t, h, d], k and v [b, t, kv, d] to [b, t, h, d]."""
        mask = Mask(ctx.index, ctx.segment_ids, ctx.segment_ids, in_order=True)
        return kernels.xla(q, k, v, mask, spec, dropout=ctx.dropout)


def over_tokens(w: Array, x: Array) -> Array:
    """w [n] with as many axes as x [..., n] has, so that broadcasting never adds an axis silently."""
    return w.reshape((1,) * (x.ndim - 1) + w.shape)
