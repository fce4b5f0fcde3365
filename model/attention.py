"""Causal attention: projections, rotary positions, grouped queries, the KV cache. model/kernels.py has the attention
itself.

Shape suffixes: b batch, t query, s key, h query head, k key-value head, d head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model import kernels
from model.config import ModelConfig
from model.context import Context
from model.layers import Build, Linear, project

Cache = dict[str, Array]  # {"k": [layers, b, s, k, d], "v": the same}; static length s


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


def rotate(x_bthd: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (Su et al., 2021), halves rotated as in GPT-NeoX and Hugging Face's Llama.

    Args:
      x_bthd: [b, t, h, d], d even.
      positions: int32 [b, t] or [1, t].
    """
    half = x_bthd.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]  # float32 whatever x is
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthd.dtype)


class Attention(nnx.Module):
    """Multi-head (Vaswani et al., 2017) or grouped-query (Ainslie et al., 2023) causal self-attention."""

    def __init__(self, build: Build):
        config = build.config
        embed, bias = config.embed_dim, config.bias
        q_dim, kv_dim = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.config = config
        self.partitioner = build.partitioner
        self.spec = kernels.spec_of(config)
        self.query = Linear(build, embed, q_dim, ("embed", "heads"), bias=bias)
        self.key = Linear(build, embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        self.value = Linear(build, embed, kv_dim, ("embed", "kv_heads"), bias=bias)
        self.out = Linear(build, q_dim, embed, ("heads", "embed"), bias=bias, std=build.out_std)

    def __call__(self, x: Array, ctx: Context, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """x [b, t, embed] to the same; a cache's k and v [b, s, k, d] gain rows at ctx.index."""
        q, k, v = project(x, self.query, self.key, self.value)
        q, k, v = self._heads(q, "heads"), self._heads(k, "kv_heads"), self._heads(v, "kv_heads")
        if self.config.position == "rope":
            q, k = (rotate(y, ctx.positions, self.config.rope_theta) for y in (q, k))
        if cache is None:
            y = self.partitioner.attention(q, k, v, ctx, self.spec)
        else:
            start = (0, ctx.index[0], 0, 0)
            cache = {name: jax.lax.dynamic_update_slice(cache[name], new, start) for name, new in (("k", k), ("v", v))}
            y = kernels.xla(q, cache["k"], cache["v"], kernels.Mask(ctx.index), self.spec, dropout=ctx.dropout)
        return self.out(y.reshape(*x.shape[:-1], -1)), cache

    def _heads(self, y: Array, axis: str) -> Array:
        return self.partitioner.constrain(
            y.reshape(*y.shape[:-1], -1, self.config.head_size), ("batch", "seq", axis, None)
        )
