"""Causal attention: rotary positions, grouped queries, the KV cache.

Shape suffixes: b batch, t query position, s key position, h query head, k key-value head, n query head of a key-value
head and query position, d width of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.config import ModelConfig
from model.layers import Constrain, Linear, dropout

KERNEL = "xla"  # the one implementation so far; the start-up page names it

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


def attend(
    q_bthd: Array, k_bskd: Array, v_bskd: Array, places: Array, starts: Array | None = None,
    rate=0.0, key: Array | None = None,
) -> Array:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v with query t allowed to see keys starts[t] <= s <= places[t]; softmax in float32.

    Args:
      q_bthd: queries; h is a multiple of k, and query head i uses key-value head i // (h / k).
      places: int32 [t], the place of each query among the keys.
      starts: int32 [b, t], the place of the first key of each query's document; None: 0.
      rate, key: dropout of the attention weights.

    Returns:
      [b, t, h, d] in the dtype of q.
    """
    b, t, h, d = q_bthd.shape
    s, kv = k_bskd.shape[1:3]
    # The g queries of a key-value head are rows of one matrix, so that each (b, k) is one plain matrix product.
    rows = (h // kv) * t
    q_bknd = (q_bthd * d**-0.5).reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(b, kv, rows, d)
    scores = jnp.einsum("bknd,bskd->bkns", q_bknd, k_bskd, preferred_element_type=jnp.float32)
    visible = jnp.arange(s) <= places[:, None]  # [t, s]
    if starts is not None:
        visible = (visible & (jnp.arange(s) >= starts[..., None]))[:, None]  # [b, 1, t, s]
    visible_ns = jnp.tile(visible, (h // kv, 1))  # [.., n, s]
    weights = jax.nn.softmax(jnp.where(visible_ns, scores, -jnp.inf), axis=-1).astype(q_bthd.dtype)
    weights = dropout(weights, rate, key)
    y_bknd = jnp.einsum("bkns,bskd->bknd", weights, v_bskd)
    return y_bknd.reshape(b, kv, h // kv, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


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
        rate, key: Array | None, constrain: Constrain,
    ) -> tuple[Array, Cache | None]:  # fmt: skip
        """x [b * t, embed], places and starts as in `attend`; a cache's k and v [b, s, k, d] gain rows at `places`."""
        config = self.config
        t, width = len(places), config.width_of_head
        q = self.query(x).reshape(-1, t, config.num_heads, width)
        k = self.key(x).reshape(-1, t, config.kv_heads, width)
        v = self.value(x).reshape(-1, t, config.kv_heads, width)
        q = constrain(q, ("batch", "seq", "heads", None))
        k = constrain(k, ("batch", "seq", "kv_heads", None))
        v = constrain(v, ("batch", "seq", "kv_heads", None))
        if config.position == "rope":
            positions = places if starts is None else places - starts
            q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
        if cache is not None:
            start = (0, places[0], 0, 0)
            k = jax.lax.dynamic_update_slice(cache["k"], k, start)
            v = jax.lax.dynamic_update_slice(cache["v"], v, start)
            cache = {"k": k, "v": v}
        y = attend(q, k, v, places, starts, rate, key)
        return self.out(y.reshape(x.shape[0], -1)), cache
