"""Configuration of the transformer. No heavy imports: a launcher validates it before loading JAX."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

POSITIONS = ("rope", "learned")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("swiglu", "geglu", "glu", "gelu", "relu2")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "attention", "full", "offload")
KERNELS = ("auto", "xla", "cudnn", "splash")
# The embedding's rows are padded to a multiple of this, whatever the mesh, so that a tensor axis of any power of two up
# to it divides them and matrix units are full. Rows past vocab_size are never predicted.
VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int = 4
    embed_dim: int = 128  # width of the residual stream
    num_heads: int = 4  # query heads
    num_kv_heads: int = 0  # key and value heads; 0: num_heads (multi-head attention)
    head_dim: int = 0  # 0: embed_dim / num_heads
    mlp_dim: int = 0  # hidden width; 0: 4 embed_dim, or 8/3 embed_dim rounded up to 64 for the gated kinds
    mlp: str = "swiglu"  # swiglu, geglu, glu (Shazeer, 2020), gelu, relu2 (So et al., 2021)
    position: str = "rope"  # rope (Su et al., 2021; rotates halves) or learned (like GPT-2's)
    rope_theta: float = 10_000.0
    norm: str = "rmsnorm"  # rmsnorm or layernorm, before each sub-layer and at the end
    norm_eps: float = 1e-5
    bias: bool = False  # biases in linear layers and layernorm
    tie_embeddings: bool = True  # output head = transposed token embedding
    dropout: float = 0.0  # rate at step 0, on embeddings, attention weights and sub-layer outputs
    dropout_end: float = -1.0  # rate = (dropout - end) / (step / dropout_scale + 1) + end; below 0: constant
    dropout_scale: float = 1000.0  # steps until half of the difference to dropout_end is gone
    dtype: str = "float32"  # of activations and of weights in products; parameters are kept in float32
    scan_layers: bool = True  # compile one layer and loop over it; False unrolls: slower to compile, faster on a CPU
    # Recompute in the backward pass: none; dots: all but weight products; attention: what is inside attention; full:
    # everything; offload: the same, with the layers' inputs kept in the host's memory.
    remat: str = "none"
    attention: str = (
        "auto"  # kernel: xla anywhere, cudnn on GPUs, splash on TPUs; auto: the best that supports the rest
    )
    # Derived by the launcher, from the dataset:
    vocab_size: int = 0  # 0: the tokenizer's
    max_seq_len: int = 0  # longest context; 0: data.seq_len

    # What a change means for a run that is resumed (trainer.config.changes); fields that are not named may not change.
    # The harmless ones change only the rounding of sums.
    ON_RESUME: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("remat", "scan_layers", "attention"), "harmless"),
        **dict.fromkeys(("dropout", "dropout_end", "dropout_scale", "dtype"), "flag"),
    }

    def __post_init__(self):
        def require(ok: bool, message: str):
            if not ok:
                raise ValueError("model." + message)

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
        require(
            self.position != "rope" or self.head_size % 2 == 0,
            f"head_dim is {self.head_size}; rope rotates pairs, so it must be even",
        )
        for name, low in (("dropout", 0.0), ("dropout_end", -1.0)):
            value = getattr(self, name)
            require(low <= value < 1, f"{name} is {value}; it must be at least {low:g} and below 1")
        for name in ("dropout_scale", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; it must be above 0")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def gated(self) -> bool:
        return self.mlp in ("swiglu", "geglu", "glu")

    @property
    def mlp_size(self) -> int:
        if self.mlp_dim:
            return self.mlp_dim
        return -(-8 * self.embed_dim // 3 // 64) * 64 if self.gated else 4 * self.embed_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0 or self.dropout_end > 0
