"""Causal attention: projections, rotary positions, grouped queries, the KV cache. model/kernels.py has the attention
itself.

Shape suffixes: b batch, t query position, s key position, h query head, k key-value head, d width of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model import kernels
from model.config import ModelConfig
from model.layers import Linear
from model.partitioner import Placement

Cache = dict[str, Array]  # {"k": [layers, b, s, k, d], "v": the same}; static length s


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    shape = (config.num_layers, batch, length, config.kv_heads, config.width_of_head)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


def rotate(x_bthd: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (Su et al., 2021), halves rotated as in GPT-NeoX and Hugging Face's Llama.

    Args:
      x_bthd: [b, t, h, d], d even.
      positions: int32 [t] or [b, t].
    """
    half = x_bthd.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [.., t, 1, half], float32 whatever x is
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthd.dtype)


class Attention(nnx.Module):
    """Multi-head (Vaswani et al., 2017) or grouped-query (Ainslie et al., 2023) causal self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, std: float, out_std: float, stack: int | None):
        self.config = config
        embed, head, bias = config.embed_dim, config.width_of_head, config.bias
        q_dim, kv_dim = config.num_heads * head, config.kv_heads * head
        self.query = Linear(rngs, embed, q_dim, ("embed", "heads"), std=std, bias=bias, stack=stack)
        self.key = Linear(rngs, embed, kv_dim, ("embed", "kv_heads"), std=std, bias=bias, stack=stack)
        self.value = Linear(rngs, embed, kv_dim, ("embed", "kv_heads"), std=std, bias=bias, stack=stack)
        self.out = Linear(rngs, q_dim, embed, ("heads", "embed"), std=out_std, bias=bias, stack=stack)

    def __call__(
        self, x: Array, places: Array, starts: Array | None, cache: Cache | None,
        rate, key: Array | None, placement: Placement,
    ) -> tuple[Array, Cache | None]:  # fmt: skip
        """x [b * t, embed] or [b, t, embed]; places int32 [t], the position of each token in its row; starts int32
        [b, t] or None, that of the first token of its document; a cache's k and v [b, s, k, d] gain rows at
        `places`."""
        config = self.config
        t, width = len(places), config.width_of_head

        def heads(linear: Linear, number: int, axis: str) -> Array:
            y_bthd = linear(x, placement).reshape(-1, t, number, width)
            return placement.constrain(y_bthd, ("batch", "seq", axis, None))

        q = heads(self.query, config.num_heads, "heads")
        k = heads(self.key, config.kv_heads, "kv_heads")
        v = heads(self.value, config.kv_heads, "kv_heads")
        if config.position == "rope":
            positions = places if starts is None else places - starts
            q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
        if cache is None:
            y = placement.attend(q, k, v, places, starts, rate, key)
        else:
            start = (0, places[0], 0, 0)
            k = jax.lax.dynamic_update_slice(cache["k"], k, start)
            v = jax.lax.dynamic_update_slice(cache["v"], v, start)
            cache = {"k": k, "v": v}
            y = kernels.xla(q, k, v, places, starts, rate, key)
        return self.out(y.reshape(*x.shape[:-1], -1), placement), cache
