"""The model's arrays and attention on a mesh: what each device holds, what is gathered, which kernel runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import kernels
from model.partitioner import Placement
from trainer import sharding
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.parallel import embedding, random_bits
from trainer.parallel.collectives import Shards


def balanced_order(seq_len: int, parts: int) -> np.ndarray:
    """The order of positions in which `parts` equal shards of a sequence have the same work under a causal mask.

    Shard i gets pieces i and 2 parts - 1 - i of 2 parts pieces: an early one, which sees little, and a late one (as in
    Llama 3's context parallelism, Grattafiori et al., 2024, section 3.3.2). int32 [seq_len].
    """
    pieces = np.arange(seq_len, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([pieces[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


class MeshPlacement(Placement):
    """Placement on `mesh` by the rules of trainer/sharding.py.

    It is that of one replica of the model, inside sharding.by_replica. Parameters are gathered along `embed` for the
    layer that uses them and no longer, in the type it computes in; their gradients go straight to the parts
    (reduce-scatter), in optimizer.gradients_dtype. With a context axis the keys and values of a row are gathered for
    its queries, whose shards have equal work.

    Attributes:
      kernel, reason: the attention kernel and why it is that one.
      order: int32 [seq_len], the positions of a row in the order that they lie on the devices; None: 0, 1, ….

    Raises:
      ConfigError: no kernel can honour the configuration.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.mesh, self.config, self.shards = mesh, config, Shards(mesh)
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
        here = sharding.named(sharding.mesh_here(self.mesh), *axes, rules=sharding.REPLICA_RULES)
        return jax.lax.with_sharding_constraint(x, here)

    def weight(self, w: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
        if not self.regathers:
            return w.astype(dtype)
        weight = jax.custom_vjp(lambda w: self._whole(w, axes, dtype))
        # Not weight(w), which would hide the whole array from remat, and be kept for the backward pass.
        weight.defvjp(
            lambda w: (self._whole(w, axes, dtype), None), lambda _, g: (self._part(g, axes).astype(w.dtype),)
        )
        return weight(w)

    def linear(self, x: Array, w: Array, b: Array | None, axes: tuple[str, str]) -> Array:
        """The gradient of autodiff has the type of x: where that is narrower than the sums over devices are to be, it
        would be rounded before them, and is written out. The products are the same."""
        dtype = self.sums_dtype(x.dtype)
        if x.dtype == dtype:
            return super().linear(x, w, b, axes)

        def forward(x: Array, w: Array, b: Array | None):
            whole = self._whole(w, axes, x.dtype)
            y = x @ whole
            return (y if b is None else y + self._whole(b, axes[1:], x.dtype)), (x, whole)

        def backward(kept, g: Array):
            x, whole = kept
            tokens = tuple(range(x.ndim - 1))
            dx = jax.lax.dot_general(g, whole, (((x.ndim - 1,), (1,)), ((), ())))
            dw = jax.lax.dot_general(g, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype).T
            db = None if b is None else self._part(g.astype(dtype).sum(tokens), axes[1:]).astype(b.dtype)
            return dx, self._part(dw, axes).astype(w.dtype), db

        linear = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        linear.defvjp(forward, backward)
        return linear(x, w, b)

    def sums_dtype(self, computed: jnp.dtype | str) -> jnp.dtype:
        """The type in which gradients of the type `computed` are summed over devices, never a narrower one."""
        return jnp.promote_types(self.config.optimizer.gradients_dtype, computed)

    def sum_of_replicas(self, gradients: Any) -> Any:
        """The sum of a tree of gradients over the replicas, each of which has that of its own rows."""
        if self.mesh.shape["data"] == 1:
            return gradients
        dtype = self.sums_dtype(self.config.model.dtype)
        return jax.tree.map(lambda g: self.shards.sum(g.astype(dtype), "data").astype(g.dtype), gradients)

    def _whole(self, w: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
        """The cast comes before the gathering, which then moves half the bytes."""
        w = w.astype(dtype)
        if not self.regathers:
            return w
        return self.constrain(self.constrain(w, axes), tuple(None if a == "embed" else a for a in axes))

    def _part(self, g: Array, axes: tuple[str, ...]) -> Array:
        """The gradient is given the layout of the parameter before anything else, so that its sum over devices is a
        reduce-scatter."""
        return self.constrain(g, axes) if self.regathers else g

    def bernoulli(self, key: Array, p: Array | float, shape: tuple[int, ...]) -> Array:
        """Those of this replica's rows out of those of all, which are the same on any mesh."""
        replicas = self.mesh.shape["data"]
        if replicas == 1:
            return super().bernoulli(key, p, shape)
        return random_bits.bernoulli_rows(key, p, shape, jax.lax.axis_index("data") * shape[0])

    def lookup(self, table: Array, index: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        return embedding.lookup(self.mesh, table, index, axes, dtype)

    def attend(self, q, k, v, places, starts, rate, key):
        by_shard = self.kernel != "xla" or self.context > 1
        # Plain array code on whole rows is split by the compiler, and its dropout is the same on any mesh.
        plain = functools.partial(kernels.xla, rate=rate, key=key, bernoulli=self.bernoulli)
        compute = self._attend_by_shard if by_shard else plain
        if self.config.model.remat == "attention":
            compute = jax.checkpoint(compute)
        return compute(q, k, v, places, starts)

    def _attend_by_shard(self, q: Array, k: Array, v: Array, places: Array, starts: Array | None) -> Array:
        """A kernel on each device, with its rows, heads and queries, and all keys and values of those rows."""
        heads, rows, seq = (
            sharding.spec(names, sharding.REPLICA_RULES)
            for names in (("batch", "seq", "heads", None), ("batch", "seq"), ("seq",))
        )
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

        in_specs = (splash_spec, heads, heads, heads, seq, rows)
        return sharding.by_device(self.mesh, attend, in_specs, heads)(splash, q, k, v, places, starts)

    def _in_order(self, x: Array) -> Array:
        """A device's part [b, t / context, …] of a row to the whole row in its natural order."""
        assert self.order is not None
        whole = self.shards.gather_sequence(x, self.sums_dtype(x.dtype))
        pieces = whole.reshape(x.shape[0], 2 * self.context, -1, *x.shape[2:])
        of_piece = self.order.reshape(2 * self.context, -1)[:, 0].argsort()
        return pieces[:, of_piece].reshape(whole.shape)

    def _splash(self, heads: int):
        t = self.config.data.seq_len
        places = np.arange(t, dtype=np.int32) if self.order is None else self.order
        kernel = kernels.splash_kernel(places, heads // self.mesh.shape["tensor"], self.context, self.documents)
        return kernel, kernel.manual_sharding_spec(NamedSharding(self.mesh, PartitionSpec(None, "context")))
