"""What one device does with its parts of parameters, inside jax.shard_map: gather, sum, scatter, over axes of the mesh.

Used where the layout must be exact rather than the compiler's choice: the embedding and the loss.
"""

import jax
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
        return jax.lax.psum(x, axes) if axes else x

    def max(self, x: Array, axis: str) -> Array:
        return jax.lax.pmax(x, axis) if self.mesh.shape[axis] > 1 else x

    def gather(self, w: Array, axis: int) -> Array:
        """A device's part of a parameter along `axis`, its embed axis, to all of it."""
        return jax.lax.all_gather(w, self.parts, axis=axis, tiled=True) if self.parts else w

    def scatter(self, dw: Array, axis: int) -> Array:
        """The sum of the devices' gradients of a whole parameter, each keeping its part: the reverse of `gather`."""
        if self.parts:
            dw = jax.lax.psum_scatter(dw, self.parts, scatter_dimension=axis, tiled=True)
        return self.sum(dw, "data")
