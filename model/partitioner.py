"""Where the model's arrays lie and who computes attention: nothing of it on one device, which is what this one does.

partitioner.py has the one for a mesh. The model names logical axes only and hands every weight, every activation
and every attention to its placement.
"""

import jax
import jax.numpy as jnp
from jax import Array

from model import kernels


class Placement:
    """For a single device: everything stays where it is.

    Attributes:
      splits_sequence: whether the tokens of a row lie on several devices. Activations then keep a sequence axis;
        otherwise batch and sequence are one axis (see Transformer).
      regathers: whether `constrain` brings the parts of weights together for a layer, which then should not be kept for
        the backward pass.
    """

    splits_sequence = False
    regathers = False

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        """The activation x, placed as its logical axes say. `embed` is named None: fsdp splits an activation's
        batch."""
        return x

    def residual(self, x: Array) -> Array:
        """The residual stream [b * t, embed] or [b, t, embed], placed."""
        return self.constrain(x, ("batch", None) if x.ndim == 2 else ("batch", "seq", None))

    def weight(self, w: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
        """The parameter w in `dtype` as a layer uses it: whole along `embed`."""
        return w.astype(dtype)

    def linear(self, x: Array, w: Array, b: Array | None, axes: tuple[str, str]) -> Array:
        """x w (+ b) over the last axis of x, of parameters w with logical axes `axes` and b with the second of them."""
        y = x @ self.weight(w, axes, x.dtype)
        return y if b is None else y + self.weight(b, axes[1:], x.dtype)

    def bernoulli(self, key: Array, p: Array | float, shape: tuple[int, ...]) -> Array:
        """Bools of an activation's shape, its rows first, each True with probability p."""
        return jax.random.bernoulli(key, p, shape)

    def lookup(self, table: Array, index: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        """Rows of the parameter table [n, embed] in `dtype`: index [b, t] to [b, t, embed]."""
        return table.astype(dtype)[index]

    def attend(
        self, q: Array, k: Array, v: Array, places: Array, starts: Array | None, rate: Array | float, key: Array | None
    ) -> Array:
        """Attention among the tokens of each row; arguments as of kernels.xla, with s = t and keys at `places`, too."""
        return kernels.xla(q, k, v, places, starts, rate, key)
