"""Collectives over the devices of one replica, inside sharding.by_device.

They are for code whose layout must be exact rather than the compiler's choice: the embedding, the loss, and attention
over a sequence that is split.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from trainer.sharding import RULES


class Collectives:
    """Collectives over axes of `mesh`; an axis with one device costs nothing.

    Attributes:
      fsdp_axes: the mesh axes that shard the embed axis of a parameter.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.fsdp_axes = self._several(RULES["embed"])

    def _several(self, axes) -> tuple[str, ...]:
        return tuple(a for a in axes if self.mesh.shape[a] > 1)

    def index(self, axis: str) -> Array | int:
        return jax.lax.axis_index(axis) if self.mesh.shape[axis] > 1 else 0

    def psum(self, x: Array, *axes: str) -> Array:
        axes = self._several(axes)
        return jax.lax.psum(self._summable(x), axes).astype(x.dtype) if axes else x

    def pmax(self, x: Array, axis: str) -> Array:
        return jax.lax.pmax(x, axis) if self.mesh.shape[axis] > 1 else x

    def _summable(self, x: Array) -> Array:
        """`x` in a dtype that psum accepts. On CPUs XLA sums bfloat16 in float32, but the pass that does so aborts in
        nested shard_maps, so the cast is made here."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return x.astype(jnp.float32) if on_cpu and x.dtype == jnp.bfloat16 else x

    def all_gather_sequence(self, x: Array, sums_dtype: jnp.dtype) -> Array:
        """All-gathers a device's shard of rows [b, t / context, …] to whole rows, in the order of the devices. The
        gradient is reduce-scattered in `sums_dtype`."""

        def gather(x: Array) -> Array:
            return jax.lax.all_gather(x, "context", axis=1, tiled=True)

        def backward(_, g: Array) -> tuple[Array]:
            g = self._summable(g.astype(sums_dtype))
            return (jax.lax.psum_scatter(g, "context", scatter_dimension=1, tiled=True).astype(x.dtype),)

        if not jnp.issubdtype(x.dtype, jnp.floating):
            return gather(x)
        gathered = jax.custom_vjp(gather)
        gathered.defvjp(lambda x: (gather(x), None), backward)
        return gathered(x)

    def all_gather_param(self, w: Array, axis: int) -> Array:
        """All-gathers a device's shard of a parameter along its embed axis, which is number `axis`."""
        return jax.lax.all_gather(w, self.fsdp_axes, axis=axis, tiled=True) if self.fsdp_axes else w

    def reduce_scatter_grad(self, dw: Array, axis: int) -> Array:
        """Sums the gradient of a whole parameter over the devices of a replica; each device keeps its shard of the sum.
        This reverses `all_gather_param`. (Gradients of replicas are summed once a step, in trainer/step.py.)"""
        if self.fsdp_axes:
            dw = jax.lax.psum_scatter(dw, self.fsdp_axes, scatter_dimension=axis, tiled=True)
        return dw
