"""The model's arrays and attention on a mesh: what each device holds, what is gathered, which kernel runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import kernels
from model.placement import Placement
from trainer import embedding, sharding
from trainer.config import Config
from trainer.errors import ConfigError


def balanced_order(seq_len: int, parts: int) -> np.ndarray:
    """The order of positions in which `parts` equal shards of a sequence have the same work under a causal mask.

    Shard i gets pieces i and 2 parts - 1 - i of 2 parts pieces: an early one, which sees little, and a late one (as in
    Llama 3's context parallelism, Grattafiori et al., 2024, section 3.3.2). int32 [seq_len].
    """
    pieces = np.arange(seq_len, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([pieces[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


class MeshPlacement(Placement):
    """Placement on `mesh` by the rules of trainer/sharding.py.

    Parameters are gathered along `embed` for the layer that uses them and no longer, in the type it computes in; their
    gradients go straight to the parts (reduce-scatter). With a context axis the keys and values of a row are gathered
    for its queries, whose shards have equal work.

    Attributes:
      kernel, reason: the attention kernel and why it is that one.
      order: int32 [seq_len], the positions of a row in the order that they lie on the devices; None: 0, 1, ….

    Raises:
      ConfigError: no kernel can honour the configuration.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.mesh, self.config = mesh, config
        self.context = mesh.shape["context"]
        self.splits_sequence = self.context > 1
        self.regathers = mesh.shape["fsdp"] * self.context > 1
        self.order = balanced_order(config.data.seq_len, self.context) if self.splits_sequence else None
        self.documents = config.data.mask_documents
        try:
            self.kernel, self.reason = kernels.choose(
                config.model,
                platform=mesh.devices.flat[0].platform,
                capability=str(getattr(mesh.devices.flat[0], "compute_capability", "")),
                seq_len=config.data.seq_len,
                context=self.context,
                documents=self.documents,
            )
        except ValueError as e:
            raise ConfigError(f"config.{e}") from None

    def constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, sharding.named(self.mesh, *axes))

    def weight(self, w: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
        """The cast comes before the gathering, which then moves half the bytes. The gradient is given the layout of the
        parameter before anything else, so that its sum over devices is a reduce-scatter."""
        if not self.regathers:
            return w.astype(dtype)
        whole = tuple(None if a == "embed" else a for a in axes)

        def gather(w: Array) -> Array:
            return self.constrain(self.constrain(w.astype(dtype), axes), whole)

        def backward(_, g: Array) -> tuple[Array]:
            return (self.constrain(g, axes).astype(w.dtype),)

        weight = jax.custom_vjp(gather)
        weight.defvjp(lambda w: (gather(w), None), backward)
        return weight(w)

    def lookup(self, table: Array, index: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        return embedding.lookup(self.mesh, table, index, axes, dtype)

    def attend(self, q, k, v, places, starts, rate, key):
        by_shard = self.kernel != "xla" or self.context > 1
        # Plain array code on whole rows is split by the compiler, and its dropout is the same on any mesh.
        compute = self._attend_by_shard if by_shard else functools.partial(kernels.xla, rate=rate, key=key)
        if self.config.model.remat == "attention":
            compute = jax.checkpoint(compute)
        return compute(q, k, v, places, starts)

    def _attend_by_shard(self, q: Array, k: Array, v: Array, places: Array, starts: Array | None) -> Array:
        """A kernel on each device, with its rows, heads and queries, and all keys and values of those rows."""
        heads = sharding.spec(("batch", "seq", "heads", None))
        rows = sharding.spec(("batch", "seq"))
        splash, splash_spec = self._splash(q.shape[2]) if self.kernel == "splash" else (None, None)

        def attend(splash, q, k, v, places, starts):
            all_starts = starts
            if self.context > 1:
                k, v = (self._in_order(x) for x in (k, v))
                all_starts = None if starts is None else self._in_order(starts)
            if self.kernel == "splash":
                return kernels.splash(splash, q, k, v, starts, all_starts)
            if self.kernel == "cudnn":
                return kernels.cudnn(q, k, v)
            return kernels.xla(q, k, v, places, starts)

        return jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(splash_spec, heads, heads, heads, sharding.spec(("seq",)), rows),
            out_specs=heads,
            check_vma=False,
        )(splash, q, k, v, places, starts)

    def _in_order(self, x: Array) -> Array:
        """A device's part [b, t / context, …] of a row to the whole row in its natural order."""
        assert self.order is not None
        whole = jax.lax.all_gather(x, "context", axis=1, tiled=True)
        pieces = whole.reshape(x.shape[0], 2 * self.context, -1, *x.shape[2:])
        of_piece = self.order.reshape(2 * self.context, -1)[:, 0].argsort()
        return pieces[:, of_piece].reshape(whole.shape)

    def _splash(self, heads: int):
        t = self.config.data.seq_len
        places = np.arange(t, dtype=np.int32) if self.order is None else self.order
        kernel = kernels.splash_kernel(places, heads // self.mesh.shape["tensor"], self.context, self.documents)
        return kernel, kernel.manual_sharding_spec(NamedSharding(self.mesh, PartitionSpec(None, "context")))
