"""The model on a mesh: what each device holds, what is gathered, and which attention kernel runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import kernels
from model.context import Context
from model.kernels import AttentionSpec, Mask
from model.partitioner import Partitioner, over_tokens
from trainer import sharding
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.parallel import embedding, random_bits
from trainer.parallel.collectives import Collectives


def zigzag_order(seq_len: int, shards: int) -> np.ndarray:
    """An order of a row's tokens in which `shards` equal shards have the same work under a causal mask.

    Shard i gets blocks i and 2 shards - 1 - i of 2 shards blocks: an early one, which sees few keys, and a late one (as
    in Llama 3's context parallelism, Grattafiori et al., 2024, section 3.3.2). int32 [seq_len].
    """
    blocks = np.arange(seq_len, dtype=np.int32).reshape(2 * shards, -1)
    return np.concatenate([blocks[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


class MeshPartitioner(Partitioner):
    """The partitioner of `mesh`, by the rules of trainer/sharding.py.

    It partitions one replica of the model, inside sharding.by_replica. Parameters are all-gathered along `embed` just
    before use, in the compute dtype; their gradients are reduce-scattered, in optimizer.gradients_dtype. With a context
    axis the keys and values of a row are all-gathered for its queries, whose shards have equal work.

    Args:
      gathers_params: as in Partitioner; None: as the mesh requires.

    Attributes:
      kernel, reason: the attention kernel, and why it was chosen.
      order: int32 [seq_len], the index of each token of a row in the order of the devices; None: the order is 0, 1, ….

    Raises:
      ConfigError: no kernel can honour the configuration.
    """

    def __init__(self, config: Config, mesh: Mesh, *, gathers_params: bool | None = None):
        self.mesh = mesh
        self.config = config
        self.collectives = Collectives(mesh)
        self.context = mesh.shape["context"]
        self.context_parallel = self.context > 1
        self.gathers_params = bool(self.collectives.fsdp_axes) if gathers_params is None else gathers_params
        self.order = zigzag_order(config.data.seq_len, self.context) if self.context_parallel else None
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

    def gather_param(self, w: Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> Array:
        if not self.gathers_params:
            return w.astype(dtype)
        gathered = jax.custom_vjp(lambda w: self._gathered(w, axes, dtype))
        # The forward rule does not call gathered(w): remat would not see the gathered array, and would keep it for the
        # backward pass.
        gathered.defvjp(
            lambda w: (self._gathered(w, axes, dtype), None),
            lambda _, g: (self._scattered(g, axes).astype(w.dtype),),
        )
        return gathered(w)

    def linear(self, x: Array, w: Array, axes: tuple[str | None, str | None]) -> Array:
        """x @ w. Autodiff would give the gradient of w the dtype of x. If that is narrower than the dtype in which
        gradients are summed over devices, the gradient would be rounded before the sum. So the backward pass is
        written out here, with the same products."""
        dtype = self.sums_dtype(x.dtype)
        if x.dtype == dtype:
            return super().linear(x, w, axes)

        def forward(x: Array, w: Array):
            gathered = self._gathered(w, axes, x.dtype)
            return x @ gathered, (x, gathered)

        def backward(kept, g: Array):
            x, gathered = kept
            tokens = tuple(range(x.ndim - 1))
            dx = jax.lax.dot_general(g, gathered, (((x.ndim - 1,), (1,)), ((), ())))
            dw = jax.lax.dot_general(g, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype).T
            return dx, self._scattered(dw, axes).astype(w.dtype)

        linear = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        linear.defvjp(forward, backward)
        return linear(x, w)

    def add_bias(self, y: Array, b: Array, axes: tuple[str]) -> Array:
        """y + b. The bias's gradient is summed over tokens in the dtype of sums over devices, as in `linear`."""

        def forward(y: Array, b: Array):
            return y + over_tokens(self._gathered(b, axes, y.dtype), y), None

        def backward(_, g: Array):
            tokens = self.flatten(g.astype(self.sums_dtype(g.dtype)))
            db = tokens.sum(tuple(range(tokens.ndim - 1)))
            return g, self._scattered(db, axes).astype(b.dtype)

        add_bias = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        add_bias.defvjp(forward, backward)
        return add_bias(y, b)

    def sums_dtype(self, computed: jnp.dtype | str) -> jnp.dtype:
        """The dtype in which gradients of dtype `computed` are summed over devices, never a narrower one."""
        return jnp.promote_types(self.config.optimizer.gradients_dtype, computed)

    def sum_of_replicas(self, gradients: Any) -> Any:
        """The sum of a tree of gradients over the replicas; each replica has the gradients of its own rows."""
        if self.mesh.shape["data"] == 1:
            return gradients
        dtype = self.sums_dtype(self.config.model.dtype)
        return jax.tree.map(lambda g: self.collectives.psum(g.astype(dtype), "data").astype(g.dtype), gradients)

    def _gathered(self, w: Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> Array:
        """`w` cast to `dtype`, then all-gathered: in this order, an all-gather in bfloat16 moves half the bytes."""
        w = w.astype(dtype)
        if not self.gathers_params:
            return w
        return self.constrain(self.constrain(w, axes), tuple(None if a == "embed" else a for a in axes))

    def _scattered(self, g: Array, axes: tuple[str | None, ...]) -> Array:
        """Gives a gradient the layout of its parameter before any other use, so that its sum over devices is a
        reduce-scatter."""
        return self.constrain(g, axes) if self.gathers_params else g

    def bernoulli(self, key: Array, p: Array | float, shape: tuple[int, ...]) -> Array:
        """Random bools for this replica's rows. Those of the whole batch are the same on any mesh."""
        if self.mesh.shape["data"] == 1:
            return super().bernoulli(key, p, shape)
        return random_bits.bernoulli_rows(key, p, shape, jax.lax.axis_index("data") * shape[0])

    def embed(self, table: Array, ids: Array, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
        return embedding.embed(table, ids, mesh=self.mesh, axes=axes, dtype=dtype)

    def attention(self, q: Array, k: Array, v: Array, ctx: Context, spec: AttentionSpec) -> Array:
        if self.kernel == "xla" and not self.context_parallel:
            # Plain array code is split by the compiler, and its dropout is the same on any mesh. The dropout rate is
            # not an argument of the rematerialized function, so that a constant rate stays constant.
            attend = super().attention
        else:
            attend = self._attention_by_shard
        compute: Callable[..., Array] = functools.partial(attend, ctx=ctx, spec=spec)
        if self.config.model.remat == "attention":
            compute = jax.checkpoint(compute)
        return compute(q, k, v)

    def _attention_by_shard(self, q: Array, k: Array, v: Array, ctx: Context, spec: AttentionSpec) -> Array:
        """Runs a kernel on each device, with its rows, heads and queries, and all keys and values of those rows."""
        heads, rows, seq = (
            sharding.spec(names, sharding.REPLICA_RULES)
            for names in (("batch", "seq", "heads", None), ("batch", "seq"), ("seq",))
        )
        splash, splash_spec = self._splash(q.shape[2], spec) if self.kernel == "splash" else (None, None)

        def attention(splash, qkv, index, segment_ids):
            q, k, v = qkv
            key_segment_ids = segment_ids
            if self.context_parallel:
                k, v = (self._in_order(x) for x in (k, v))
                key_segment_ids = None if segment_ids is None else self._in_order(segment_ids)
            mask = Mask(index, segment_ids, key_segment_ids, in_order=not self.context_parallel)
            if self.kernel == "splash":
                return kernels.splash(splash, q, k, v, mask, spec=spec)
            return kernels.cudnn(q, k, v, spec) if self.kernel == "cudnn" else kernels.xla(q, k, v, mask, spec)

        by_device = sharding.by_device(attention, self.mesh, (splash_spec, heads, seq, rows), heads)
        return by_device(splash, (q, k, v), ctx.index, ctx.segment_ids)

    def _in_order(self, x: Array) -> Array:
        """All-gathers a device's shard [b, t / context, …] of rows to whole rows in the order of their tokens."""
        assert self.order is not None
        gathered = self.collectives.all_gather_sequence(x, self.sums_dtype(x.dtype))
        blocks = gathered.reshape(x.shape[0], 2 * self.context, -1, *x.shape[2:])
        order = self.order.reshape(2 * self.context, -1)[:, 0].argsort()
        return blocks[:, order].reshape(gathered.shape)

    def _splash(self, heads: int, spec: AttentionSpec):
        index = np.arange(self.config.data.seq_len, dtype=np.int32) if self.order is None else self.order
        kernel = kernels.splash_kernel(
            index, heads // self.mesh.shape["tensor"], spec, context=self.context, documents=self.documents
        )
        return kernel, kernel.manual_sharding_spec(NamedSharding(self.mesh, PartitionSpec(None, "context")))
