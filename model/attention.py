"""Causal attention: projections, norms and rotation of queries and keys, the KV cache. The products of
queries, keys and values are in model/kernels.py.

Shape suffixes: b batch, t query, s key, h query head, k key-value head, d head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model import kernels
from model.config import ModelConfig
from model.context import Context
from model.layers import Build, Linear, Norm, project
from model.rope import rope_of

LayerCache = dict[str, Array]  # {"k": [b, s, k, d], "v": the same}: the key of index i is at i modulo s
Cache = tuple[LayerCache, ...]


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A cache for texts of up to `length` tokens; that of a local layer is only as long as its window."""

    def of_layer(s: int) -> LayerCache:
        shape = (batch, s, config.kv_heads, config.head_size)
        return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}

    return tuple(of_layer(min(length, config.window or length) if local else length) for local in config.local_layers)


class Attention(nnx.Module):
    """Multi-head (Vaswani et al., 2017) or grouped-query (Ainslie et al., 2023) causal self-attention."""

    def __init__(self, build: Build):
        config = build.config
        embed, bias = config.embed_dim, config.has_bias(config.qkv_bias)
        q_dim, kv_dim = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.config = config
        self.partitioner = build.partitioner
        self.query = Linear(build.at("query"), embed, q_dim, ("embed", "heads"), bias=bias)
        self.key = Linear(build.at("key"), embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        self.value = Linear(build.at("value"), embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        out_bias = config.has_bias(config.out_bias)
        self.out = Linear(build.at("out"), q_dim, embed, ("heads", "embed"), bias=out_bias, std=build.out_std)
        self.query_norm = self._norm(build, q_dim, "heads")
        self.key_norm = self._norm(build, kv_dim, "kv_heads")

    @staticmethod
    def _norm(build: Build, size: int, axis: str) -> Norm | None:
        """The norm of queries or keys: of each head, or of all heads as one vector of this size; or None."""
        choice = {"none": None, "head": (build.config.head_size, None), "projection": (size, axis)}
        arguments = choice[build.config.qk_norm]
        return None if arguments is None else Norm(build, *arguments)

    def __call__(self, x: Array, ctx: Context, cache: LayerCache | None = None) -> tuple[Array, LayerCache | None]:
        """Attention of the tokens x [b, t, embed] to each other, or to what a cache has.

        Args:
          cache: the keys and values of tokens before these, whose ctx.index is [b, t]. It gains those of these tokens,
            which must be one a row if the cache is shorter than the texts.

        Returns:
          the shape of x; the new cache. Without `cache` and with ctx.keep: the keys and values of x [b, t, k, d].
        """
        spec = kernels.spec_of(self.config, local=ctx.local)
        q, k, v = project(x, self.query, self.key, self.value, dropout=ctx.dropout)
        q, k = self._heads(q, "heads", self.query_norm), self._heads(k, "kv_heads", self.key_norm)
        v = self._heads(v, "kv_heads")
        if self.config.position == "rope":
            rope = rope_of(self.config, local=ctx.local)
            q, k = (rope(y, ctx.positions) for y in (q, k))
        if cache is None:
            y = self.partitioner.attention(q, k, v, ctx, spec)
            cache = {"k": k, "v": v} if ctx.keep else None
        else:
            cache = {name: _written(cache[name], new, ctx.index) for name, new in (("k", k), ("v", v))}
            mask = kernels.Mask(ctx.index, ring=True)
            y = kernels.xla(q, cache["k"], cache["v"], mask, spec, dropout=ctx.dropout)
        return self.out(y.reshape(*x.shape[:-1], -1), ctx.dropout), cache

    def _heads(self, y: Array, axis: str, norm: Norm | None = None) -> Array:
        """[b, t, heads * d] to [b, t, heads, d], normalised as one vector before the reshape, or by head after it."""
        if norm is not None and self.config.qk_norm == "projection":
            y = norm(y)
        y = y.reshape(*y.shape[:-1], -1, self.config.head_size)
        if norm is not None and self.config.qk_norm == "head":
            y = norm(y)
        return self.partitioner.constrain(y, ("batch", "seq", axis, None))


def _written(cache: Array, new: Array, index: Array) -> Array:
    """`cache` [b, s, k, d] with the rows `new` [b, t, k, d] of these indices [b, t].

    With vmap the compiler knows that each row of the batch is written by itself, so it can split them over devices.
    """
    return jax.vmap(lambda cache, new, at: cache.at[at].set(new))(cache, new, index % cache.shape[1])
