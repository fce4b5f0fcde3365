"""Configuration of the transformer. It has no heavy imports: a launcher validates it before loading JAX."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import ClassVar, Literal

POSITIONS = ("rope", "learned")
NORMS = ("layernorm", "rmsnorm")
GATED_MLPS = ("swiglu", "geglu", "geglu_exact", "glu")
MLPS = (*GATED_MLPS, "gelu", "gelu_exact", "silu", "relu2")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "attention", "full", "offload")
KERNELS = ("auto", "xla", "cudnn", "splash")
# The embedding's rows are padded to a multiple of this number for every mesh. So matrix units are full, and a tensor
# axis of any power of two up to this number divides the rows. Rows past vocab_size are never predicted.
VOCAB_MULTIPLE = 64


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError("model." + message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for texts that are longer than the original context (model/rope.py)."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0  # how many times longer the new context is
    original_len: int = 0  # llama3, yarn: the length of the original context
    low_freq_factor: float = 1.0  # llama3: a wave longer than original_len / this is stretched by `factor`
    high_freq_factor: float = 4.0  # llama3: a wave shorter than original_len / this is kept
    beta_fast: float = 32.0  # yarn: a dimension that turns more often than this within original_len is kept
    beta_slow: float = 1.0  # yarn: a dimension that turns less often than this is stretched by `factor`
    truncate: bool = True  # yarn: the bounds between the two are rounded to whole dimensions
    attention_factor: float | None = None  # yarn: the factor of queries and keys; none: 0.1 ln(factor) + 1

    def __post_init__(self):
        def require(ok: bool, message: str):
            _require(ok, "rope_scaling." + message)

        require(self.factor >= 1, f"factor is {self.factor}; it must be at least 1")
        long = self.kind in ("llama3", "yarn")
        require(
            not long or self.original_len >= 1, f"original_len is {self.original_len}; {self.kind} needs at least 1"
        )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            require(
                0 < getattr(self, low) < getattr(self, high),
                f"{low} is {getattr(self, low)}; it must be above 0 and below {high} = {getattr(self, high)}",
            )
        factor = self.attention_factor
        require(factor is None or factor > 0, f"attention_factor is {factor}; it must be above 0, or none")


# The projections of a layer, which may have adapters.
PROJECTIONS = tuple(f"layers.{name}" for name in (
    "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.gate", "mlp.down",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters: y = x W + alpha / rank dropout(x) A B, of which only A and B are trained (LoRA, Hu et al., 2021)."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0
    dropout: float = 0.0  # of the adapters' inputs
    targets: tuple[str, ...] = ("layers.*",)  # patterns of the projections that have one, such as layers.attention.*

    ON_RESUME: ClassVar[Mapping[str, str]] = {"dropout": "flag"}

    def __post_init__(self):
        for ok, message in (
            (self.rank >= 0, f"rank is {self.rank}; it must be at least 1, or 0 for no adapters"),
            (self.alpha > 0, f"alpha is {self.alpha}; it must be above 0"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1"),
            (self.targets != (), "targets is empty; name projections, such as layers.attention.*"),
        ):
            _require(ok, f"lora.{message}")
        for pattern in self.targets:
            found = fnmatch.filter(PROJECTIONS, pattern)
            _require(bool(found), f"lora.targets has {pattern!r}, which matches none of {', '.join(PROJECTIONS)}")

    def adapts(self, projection: str) -> bool:
        """Whether the projection of this dotted path has an adapter."""
        return self.rank > 0 and any(fnmatch.fnmatchcase(projection, pattern) for pattern in self.targets)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int = 4
    embed_dim: int = 128  # width of the residual stream
    num_heads: int = 4  # query heads
    num_kv_heads: int = 0  # key and value heads; 0: num_heads (multi-head attention)
    head_dim: int = 0  # 0: embed_dim / num_heads
    mlp_dim: int = 0  # hidden width; 0: 4 embed_dim, or 8/3 embed_dim rounded up to 64 for the gated kinds
    # swiglu, geglu, glu (Shazeer, 2020), gelu, silu, relu2 (So et al., 2021). GELU is its tanh form, unless *_exact.
    mlp: str = "swiglu"
    position: str = "rope"  # rope (Su et al., 2021; rotates halves) or learned (like GPT-2's)
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # the share of a head's dimensions that are rotated: the first ones
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    norm: str = "rmsnorm"  # rmsnorm or layernorm
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # the scale is 1 + its parameter, which is initialized to 0 (Gemma)
    norm_at: Literal["before", "after", "both"] = "before"  # where each sub-layer has norms; the stack ends with one
    # Norms of queries and keys before the rotation: of each head (Qwen3), or of all heads as one vector (OLMo 2).
    qk_norm: Literal["none", "head", "projection"] = "none"
    bias: bool = False  # biases in linear layers and layernorm
    qkv_bias: bool | None = None  # biases of queries, keys and values; none: as `bias`
    out_bias: bool | None = None  # bias of the attention output; none: as `bias`
    mlp_bias: bool | None = None  # biases of the feed-forward layers; none: as `bias`
    # A layer is global or local. In a local layer, a query sees only the last `window` keys, including its own.
    window: int | None = None
    layer_pattern: tuple[Literal["local", "global"], ...] = ("local",)  # repeated over the layers; needs `window`
    local_rope_theta: float | None = None  # of local layers, not scaled; none: as global layers
    attention_scale: float | None = None  # the factor of scores; none: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap tanh(score / cap) (Gemma 2); none: not capped
    logits_softcap: float | None = None
    embedding_scale: float | None = None  # the factor of token embeddings, in `dtype`; none: 1
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)), as in GPT-NeoX, instead of mlp after attention
    tie_embeddings: bool = True  # output head = transposed token embedding
    init_std: float = 0.02  # the standard deviation of initial weights (GPT-2)
    init_depth_scale: bool = True  # init_std / sqrt(2 num_layers) for projections into the residual stream (GPT-2)
    dropout: float = 0.0  # the rate at step 0, for embeddings, attention weights and sub-layer outputs
    dropout_end: float = -1.0  # rate = (dropout - end) / (step / dropout_scale + 1) + end; below 0: constant
    dropout_scale: float = 1000.0  # steps until half of the difference to dropout_end is gone
    dtype: str = "float32"  # of activations and of weights in matrix products; parameters are kept in float32
    scan_layers: bool = True  # compile one layer and loop over it; False unrolls: slower to compile, faster on a CPU
    # What the backward pass recomputes: none: nothing; dots: all but weight products; attention: what is inside
    # attention; full: everything; offload: everything, and the layers' inputs are kept in the host's memory.
    remat: str = "none"
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    attention: str = (
        "auto"  # the kernel: xla anywhere, cudnn on GPUs, splash on TPUs; auto: the best that supports the model
    )
    # Derived by the launcher, from the dataset:
    vocab_size: int = 0  # 0: the tokenizer's
    max_seq_len: int = 0  # longest context; 0: data.seq_len

    # What a change means for a run that is resumed (trainer.config.changes); fields that are not named may not change.
    # Harmless fields change only the rounding of sums.
    ON_RESUME: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("remat", "scan_layers", "attention"), "harmless"),
        **dict.fromkeys(("dropout", "dropout_end", "dropout_scale", "dtype"), "flag"),
    }

    def __post_init__(self):
        require = _require
        for name in ("num_layers", "embed_dim", "num_heads"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must be positive, or 0 to derive it")
        for name, choices in (
            ("mlp", MLPS), ("position", POSITIONS), ("norm", NORMS), ("dtype", DTYPES), ("remat", REMATS),
            ("attention", KERNELS),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value in choices, f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        require(
            self.head_dim > 0 or self.embed_dim % self.num_heads == 0,
            f"num_heads = {self.num_heads} does not divide model.embed_dim = {self.embed_dim}; "
            "change one of them or set model.head_dim",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_kv_heads = {self.kv_heads} does not divide model.num_heads = {self.num_heads}",
        )
        require(0 < self.rope_fraction <= 1, f"rope_fraction is {self.rope_fraction}; it must be above 0 and at most 1")
        require(
            self.position != "rope" or (self.rotated_size % 2 == 0 and self.rotated_size > 0),
            f"head_dim is {self.head_size}, of which model.rope_fraction = {self.rope_fraction} are "
            f"{self.rotated_size}; rope rotates pairs, so that must be even",
        )
        require(self.window is None or self.window >= 1, f"window is {self.window}; it must be at least 1, or none")
        require(self.layer_pattern != (), "layer_pattern is empty; name local and global layers, such as local,global")
        require(
            not (self.norm_plus_one and self.norm == "layernorm"),
            "norm_plus_one is a form of rmsnorm, not of layernorm",
        )
        require(
            not (self.parallel and self.norm_at != "before"),
            f"parallel has its norms before attention and mlp; model.norm_at is {self.norm_at}",
        )
        for name in (
            "local_rope_theta", "attention_scale", "attention_softcap", "logits_softcap", "embedding_scale",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be above 0, or none")
        for name, low in (("dropout", 0.0), ("dropout_end", -1.0)):
            value = getattr(self, name)
            require(low <= value < 1, f"{name} is {value}; it must be at least {low:g} and below 1")
        for name in ("dropout_scale", "rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; it must be above 0")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    def has_bias(self, chosen: bool | None) -> bool:
        """Whether projections of a kind have biases: as `chosen` for this kind, or if that is None, as for all."""
        return self.bias if chosen is None else chosen

    @property
    def rotated_size(self) -> int:
        return int(self.head_size * self.rope_fraction)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Whether each layer is local."""
        pattern = self.layer_pattern if self.window else ("global",)
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))

    @property
    def gated(self) -> bool:
        return self.mlp in GATED_MLPS

    @property
    def mlp_size(self) -> int:
        if self.mlp_dim:
            return self.mlp_dim
        return -(-8 * self.embed_dim // 3 // 64) * 64 if self.gated else 4 * self.embed_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's projections, by dotted path."""
        embed, heads, kv_heads = self.embed_dim, self.num_heads * self.head_size, self.kv_heads * self.head_size
        into = [heads, kv_heads, kv_heads, None, self.mlp_size, self.mlp_size if self.gated else None, None]
        shapes = {path: (embed, out) for path, out in zip(PROJECTIONS, into, strict=True) if out is not None}
        return shapes | {"layers.attention.out": (heads, embed), "layers.mlp.down": (self.mlp_size, embed)}

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def has_dropout(self) -> bool:
        """Whether attention weights, embeddings and the outputs of sub-layers are dropped."""
        return self.dropout > 0 or self.dropout_end > 0

    @property
    def is_random(self) -> bool:
        """Whether a step needs random numbers."""
        return self.has_dropout or (self.lora.rank > 0 and self.lora.dropout > 0)
