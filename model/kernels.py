"""Attention kernels: softmax(scale q k^T) v over the keys that each query may see, on the arrays of one device.

Each kernel honours its mask and its spec, or `refusal` says why it cannot: no kernel is silently wrong.

Shape suffixes: b batch, t query, s key, h query head, k key-value head, n pairs of a query and a query head of one
key-value head, d head size.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.config import ModelConfig
from model.dropout import NO_DROPOUT, Dropout


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The options of attention that do not depend on the tokens.

    Attributes:
      scale: the factor of the scores.
      window: how many keys a query sees, of which the last is its own; None: all keys up to its own.
      softcap: scaled scores become softcap * tanh(score / softcap); None: scores are not capped.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def capped(self, scores: Array) -> Array:
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def spec_of(config: ModelConfig, *, local: bool = False) -> AttentionSpec:
    """The AttentionSpec of a local or global layer."""
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    return AttentionSpec(scale, config.window if local else None, config.attention_softcap)


class Mask(NamedTuple):
    """Which keys a query sees: keys up to its own index, of its own document, and inside its window.

    Attributes:
      query_index: int32 [t] or [b, t], the index of each query among the keys.
      segment_ids: int32 [b, t], the document of each query; None: a row is one document.
      key_segment_ids: int32 [b, s], the document of each key.
      in_order: whether query_index is known to be 0, 1, …, t - 1, and there are t keys.
      ring: whether the s keys are the newest ones up to the query's own, and the key of index i is at i modulo s.
    """

    query_index: Array
    segment_ids: Array | None = None
    key_segment_ids: Array | None = None
    in_order: bool = False
    ring: bool = False

    def visible(self, s: int, window: int | None = None) -> Array:
        """bool [b, t, s], or [1, t, s] if the rows do not differ."""
        key, query = jnp.arange(s)[None, None], jnp.atleast_2d(self.query_index)[..., None]
        if self.ring:
            key = query - (query - key) % s
            seen = key >= 0
        else:
            seen = key <= query
        if window is not None:
            seen &= key > query - window
        if self.segment_ids is None or self.key_segment_ids is None:
            return seen
        return seen & (self.segment_ids[:, :, None] == self.key_segment_ids[:, None])


def xla(
    q_bthd: Array, k_bskd: Array, v_bskd: Array, mask: Mask, spec: AttentionSpec, *, dropout: Dropout = NO_DROPOUT
) -> Array:
    """The plain kernel, for any backend and any arguments, with softmax in at least float32. With a short window and
    mask.in_order, a query costs two blocks of keys (see _banded); otherwise it costs all keys.

    Args:
      q_bthd: queries; h is a multiple of k, and query head i uses key-value head i // (h / k).
      dropout: is applied to the attention weights.

    Returns:
      [b, t, h, d] in the dtype of q.
    """
    t, s = q_bthd.shape[1], k_bskd.shape[1]
    if spec.window is not None and mask.in_order and 2 * (block := max(spec.window, SMALLEST_BAND)) < t:
        return _banded(q_bthd, k_bskd, v_bskd, mask, spec, block=block, dropout=dropout)
    return _attend(q_bthd, k_bskd, v_bskd, mask.visible(s, spec.window), spec, dropout=dropout)


def _attend(q_bthd: Array, k_bskd: Array, v_bskd: Array, visible: Array, spec: AttentionSpec, *, dropout: Dropout):
    """Attention of each query to the keys that are `visible` to it, bool [b or 1, t, s]."""
    b, t, h, d = q_bthd.shape
    kv = k_bskd.shape[2]
    # The g queries of a key-value head are rows of one matrix, so that each (b, k) is one plain matrix product.
    rows = (h // kv) * t
    q_bknd = (q_bthd * spec.scale).reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(b, kv, rows, d)
    at_least_float32 = jnp.promote_types(q_bthd.dtype, jnp.float32)
    scores = jnp.einsum("bknd,bskd->bkns", q_bknd, k_bskd, preferred_element_type=at_least_float32)
    visible_ns = jnp.tile(visible[:, None], (1, 1, h // kv, 1))  # [b or 1, 1, n, s]
    weights = jax.nn.softmax(jnp.where(visible_ns, spec.capped(scores), -jnp.inf), axis=-1).astype(q_bthd.dtype)
    y_bknd = jnp.einsum("bkns,bskd->bknd", dropout(weights), v_bskd)
    return y_bknd.reshape(b, kv, h // kv, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


SMALLEST_BAND = 64  # the fewest queries in a block: matrix products with fewer are slow


def _banded(q_bthd: Array, k_bskd: Array, v_bskd: Array, mask: Mask, spec: AttentionSpec, *, block: int, dropout):
    """Attention in blocks of at least a window: a query sees keys of its own block and of the block before."""
    b, t = q_bthd.shape[:2]
    blocks = -(-t // block)

    def split(x: Array) -> Array:
        """[b, t, …] to [b, blocks, block, …]."""
        padded = jnp.pad(x, [(0, 0), (0, blocks * block - t)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(b, blocks, block, *x.shape[2:])

    def with_before(x: Array) -> Array:
        """[b, s, …] to [b, blocks, 2 block, …]."""
        own = split(x)
        return jnp.concatenate([jnp.pad(own[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2)), own], axis=2)

    def as_rows(x: Array) -> Array:
        return x.reshape(b * blocks, *x.shape[2:])

    # Which of the 2 * block keys each query of a block sees. The keys before the first block are padding.
    seen = Mask(block + jnp.arange(block)).visible(2 * block, spec.window)[:, None]
    there = (jnp.arange(blocks)[:, None] > 0) | (jnp.arange(2 * block)[None] >= block)
    visible = jnp.broadcast_to(seen & there[None, :, None], (b, blocks, block, 2 * block))
    if mask.segment_ids is not None and mask.key_segment_ids is not None:
        visible &= split(mask.segment_ids)[..., None] == with_before(mask.key_segment_ids)[:, :, None]
    rows = as_rows(split(q_bthd)), as_rows(with_before(k_bskd)), as_rows(with_before(v_bskd)), as_rows(visible)
    y = _attend(*rows, spec, dropout=dropout)
    return y.reshape(b, blocks * block, *y.shape[2:])[:, :t]


def cudnn(q_bthd: Array, k_bskd: Array, v_bskd: Array, spec: AttentionSpec) -> Array:
    """cuDNN's flash attention on a GPU (SDPA): causal, with one document in each row. Arguments are those of `xla`."""
    window = None if spec.window is None else (spec.window - 1, 0)  # keys to the left and right of a query's own
    return jax.nn.dot_product_attention(
        q_bthd, k_bskd, v_bskd, scale=spec.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )


# The most queries and keys in a block: they fit the vector memory of every TPU, with and without documents
# (tests/plan_test.py compiles both). We have not measured whether larger blocks are faster on TPUs with more memory.
SPLASH_BLOCK = 512


def splash_kernel(
    index: np.ndarray, heads: int, spec: AttentionSpec, *, context: int, documents: bool, interpret: bool = False
):
    """JAX's Pallas splash attention for a TPU: causal masks and windows, whose empty blocks are skipped.

    Args:
      index: [t], the index in its row of each query, over all shards. Keys are in order.
      heads: the number of query heads on one device.
      context: number of shards of the queries.
      documents: whether segment_ids will be passed; the fused backward kernel has no room for them.
      interpret: whether to run the kernel in Pallas's interpreter, without a TPU.

    Returns:
      the kernel: a tree that `splash` and shard_map take, and from which its sharding specs can be made.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    t = len(index)
    if spec.window is None:
        mask: Any = sa.CausalMask((t, t), shard_count=context)
    else:
        mask = sa.LocalMask((t, t), window_size=(spec.window - 1, 0), offset=0, shard_count=context)
    mask.q_sequence = index.astype(np.int32)
    block = next(b for b in range(SPLASH_BLOCK, 0, -128) if t // context % b == 0)
    fused = not documents
    blocks = sa.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=None if fused else block, block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip
    return sa.make_splash_mha(
        sa.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=context,
        attn_logits_soft_cap=spec.softcap, interpret=interpret,
    )  # fmt: skip


def splash(kernel, q_bthd: Array, k_bskd: Array, v_bskd: Array, mask: Mask, *, spec: AttentionSpec) -> Array:
    """Runs `kernel`, which has the queries' indices, the window and the cap, on each row; see `xla` for the rest."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    q, k, v = (x.swapaxes(1, 2) for x in (q_bthd * spec.scale, k_bskd, v_bskd))
    segments = None
    if mask.segment_ids is not None and mask.key_segment_ids is not None:
        segments = sa.SegmentIds(mask.segment_ids, mask.key_segment_ids)
    y_bhtd = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return y_bhtd.swapaxes(1, 2)


CUDNN_LARGE_HEADS = 9.0  # from Hopper on, heads may have a size of up to 256; before, of up to 128
CUDNN_CAPABILITY = 8.0  # Ampere: cuDNN's flash attention does not run on older GPUs


def refusal(
    kernel: str,
    config: ModelConfig,
    *,
    platform: str,
    seq_len: int,
    context: int,
    documents: bool,
    capability: str = "",
) -> str:
    """Why `kernel` cannot compute this model's attention; '' if it can.

    Args:
      platform: of the devices, as jax names it: cpu, cuda or gpu, tpu.
      context: the number of shards of a sequence of seq_len tokens.
      documents: whether documents are masked from each other.
      capability: of a GPU, as JAX reports it: a compute capability such as '9.0', or AMD's name of it; '': not known.
    """
    head = config.head_size
    if kernel == "xla":
        return "dropout of attention weights needs whole rows" if config.has_dropout and context > 1 else ""
    if config.has_dropout:
        return "no dropout of attention weights"
    if kernel == "splash":
        if platform != "tpu":
            return f"it runs on TPUs, and this is {platform}"
        if seq_len // context % 128:
            return f"sequences in multiples of 128 a device, not {seq_len // context}"
        return ""
    if platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this is {platform}"
    if capability and not re.fullmatch(r"\d+\.\d+", capability):
        return f"it runs on NVIDIA GPUs, and this is {capability}"
    if capability and float(capability) < CUDNN_CAPABILITY:
        return f"it needs compute capability {CUDNN_CAPABILITY} (Ampere), and this GPU has {capability}"
    if config.dtype == "float32":
        return "no float32"
    largest = 256 if capability and float(capability) >= CUDNN_LARGE_HEADS else 128
    if head > largest or head % 8:
        return f"heads of a multiple of 8 up to {largest}, not {head}"
    if config.attention_softcap is not None:
        return "no soft cap of scores"
    if documents:
        return "no documents that are masked from each other"
    return "no sequence that is split over devices" if context > 1 else ""


def choose(config: ModelConfig, *, platform: str, **arguments) -> tuple[str, str]:
    """The kernel for config.attention, and why it was chosen. Raises ValueError if no allowed kernel can do it."""
    if config.attention != "auto":
        reason = refusal(config.attention, config, platform=platform, **arguments)
        if reason:
            raise ValueError(f"model.attention is {config.attention!r}, which refuses: {reason}; auto chooses another")
        return config.attention, "as configured"
    best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    reasons = {kernel: refusal(kernel, config, platform=platform, **arguments) for kernel in (best, "xla")}
    if not reasons[best]:
        return best, f"the best on {platform}"
    if reasons["xla"]:
        said = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
        raise ValueError(f"model.attention: no kernel for this: {said}; lower mesh.context to 1")
    return "xla", f"{best} refuses: {reasons[best]}"
