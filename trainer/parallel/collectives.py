"""What one device does with its parts of arrays, inside sharding.by_device: gather, sum, scatter over its replica.

Used where the layout must be exact rather than the compiler's choice: the embedding, the loss, a split sequence.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from trainer.sharding import RULES


class Shards:
    """Collectives over the axes of `mesh` that have more than one device; others cost nothing."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.parts = self._several(RULES["embed"])  # what a parameter's embed axis is split over

    def _several(self, axes) -> tuple[str, ...]:
        return tuple(a for a in axes if self.mesh.shape[a] > 1)

    def index(self, axis: str) -> Array | int:
        return jax.lax.axis_index(axis) if self.mesh.shape[axis] > 1 else 0

    def sum(self, x: Array, *axes: str) -> Array:
        axes = self._several(axes)
        return jax.lax.psum(self._summable(x), axes).astype(x.dtype) if axes else x

    def max(self, x: Array, axis: str) -> Array:
        return jax.lax.pmax(x, axis) if self.mesh.shape[axis] > 1 else x

    def _summable(self, x: Array) -> Array:
        """On CPUs XLA sums bfloat16 in float32, but its pass that arranges it aborts in nested shard_maps."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return x.astype(jnp.float32) if on_cpu and x.dtype == jnp.bfloat16 else x

    def gather_sequence(self, x: Array, sums_dtype: jnp.dtype) -> Array:
        """A device's part of rows [b, t / context, …] to all of them, in the order of the devices; the gradient is
        summed over them in `sums_dtype`."""

        def gather(x: Array) -> Array:
            return jax.lax.all_gather(x, "context", axis=1, tiled=True)

        def backward(_, g: Array) -> tuple[Array]:
            g = self._summable(g.astype(sums_dtype))
            return (jax.lax.psum_scatter(g, "context", scatter_dimension=1, tiled=True).astype(x.dtype),)

        if not jnp.issubdtype(x.dtype, jnp.floating):
            return gather(x)
        whole = jax.custom_vjp(gather)
        whole.defvjp(lambda x: (gather(x), None), backward)
        return whole(x)

    def gather(self, w: Array, axis: int) -> Array:
        """A device's part of a parameter along `axis`, its embed axis, to all of it."""
        return jax.lax.all_gather(w, self.parts, axis=axis, tiled=True) if self.parts else w

    def scatter(self, dw: Array, axis: int) -> Array:
        """The sum of the gradients of a whole parameter over the devices of a replica, each keeping its part: the
        reverse of `gather`. (Replicas are summed once a step, in trainer/step.py.)"""
        if self.parts:
            dw = jax.lax.psum_scatter(dw, self.parts, scatter_dimension=axis, tiled=True)
        return dw
