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

Cache = dict[str, Array]  # {"k": [layers, b, s, k, d], "v": the same}; static length s


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


class Attention(nnx.Module):
    """Multi-head (Vaswani et al., 2017) or grouped-query (Ainslie et al., 2023) causal self-attention."""

    def __init__(self, build: Build):
        config = build.config
        embed, bias = config.embed_dim, config.has_bias(config.qkv_bias)
        q_dim, kv_dim = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.config = config
        self.partitioner = build.partitioner
        self.query = Linear(build, embed, q_dim, ("embed", "heads"), bias=bias)
        self.key = Linear(build, embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        self.value = Linear(build, embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        out_bias = config.has_bias(config.out_bias)
        self.out = Linear(build, q_dim, embed, ("heads", "embed"), bias=out_bias, std=build.out_std)
        self.query_norm = self._norm(build, q_dim, "heads")
        self.key_norm = self._norm(build, kv_dim, "kv_heads")

    @staticmethod
    def _norm(build: Build, size: int, axis: str) -> Norm | None:
        """The norm of queries or keys: of each head, or of all heads as one vector of this size; or None."""
        choice = {"none": None, "head": (build.config.head_size, None), "projection": (size, axis)}
        arguments = choice[build.config.qk_norm]
        return None if arguments is None else Norm(build, *arguments)

    def __call__(self, x: Array, ctx: Context, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """x [b, t, embed] to the same shape; a cache's k and v [b, s, k, d] gain the new tokens' at ctx.index.

        With a cache, ctx.index is either 0, 1, …, t - 1 in all rows, and the tokens see only each other, or [b, t], and
        they see what the cache has up to their index.
        """
        spec = kernels.spec_of(self.config, local=ctx.local)
        q, k, v = project(x, self.query, self.key, self.value)
        q, k = self._heads(q, "heads", self.query_norm), self._heads(k, "kv_heads", self.key_norm)
        v = self._heads(v, "kv_heads")
        if self.config.position == "rope":
            rope = rope_of(self.config, local=ctx.local)
            q, k = (rope(y, ctx.positions) for y in (q, k))
        if cache is not None:
            cache = {name: _written(cache[name], new, ctx.index) for name, new in (("k", k), ("v", v))}
        if cache is None or ctx.index.ndim == 1:
            y = self.partitioner.attention(q, k, v, ctx, spec)
        else:
            y = kernels.xla(q, cache["k"], cache["v"], kernels.Mask(ctx.index), spec, dropout=ctx.dropout)
        return self.out(y.reshape(*x.shape[:-1], -1)), cache

    def _heads(self, y: Array, axis: str, norm: Norm | None = None) -> Array:
        """[b, t, heads * d] to [b, t, heads, d], normalised as one vector before the reshape, or by head after it."""
        if norm is not None and self.config.qk_norm == "projection":
            y = norm(y)
        y = y.reshape(*y.shape[:-1], -1, self.config.head_size)
        if norm is not None and self.config.qk_norm == "head":
            y = norm(y)
        return self.partitioner.constrain(y, ("batch", "seq", axis, None))


def _written(cache: Array, new: Array, index: Array) -> Array:
    """`cache` [b, s, k, d] with the rows `new` [b, t, k, d]: from 0 on, or at `index` [b, t]."""
    if index.ndim == 1:
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, 0))
    return cache.at[jnp.arange(len(index))[:, None], index].set(new)
