"""GPT-2 (Radford et al., 2019). Its files keep projections as (in, out), and queries, keys and values as one.

The key `bias` is nanoGPT's. Hugging Face's GPT-2 always has biases, so a model without them is exported with zeros.
"""

from model.config import ModelConfig
from model.families.base import Family, Json, Keys, Tensor, Unsupported

# How the names of weights end that Hugging Face keeps as (in, out), and other systems as (out, in).
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "silu": "silu",
    "swish": "silu", "relu2": "relu2",
}  # fmt: skip
NAMES = {"gelu": "gelu_new", "gelu_exact": "gelu", "silu": "silu", "relu2": "relu2"}
DEFAULTS = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
    "tie_word_embeddings": True, "n_positions": 1024, "vocab_size": 50257, "bias": True,
}  # fmt: skip


def to_fields(keys: Keys) -> dict:
    for name, allowed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        keys.must_be(name, allowed)
    keys.must_be("add_cross_attention", False)
    for name in ("reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx"):
        keys.get(name)  # these do not change the model, only training or how sums are rounded
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        keys.get(f"summary_{name}")
    return {
        "num_layers": keys.number("n_layer"), "embed_dim": keys.number("n_embd"), "num_heads": keys.number("n_head"),
        "mlp_dim": keys.get("n_inner") or 0, "mlp": keys.choice("activation_function", ACTIVATIONS),
        "norm": "layernorm", "norm_eps": keys.number("layer_norm_epsilon"), "bias": keys.get("bias"),
        "position": "learned",
        "tie_embeddings": keys.get("tie_word_embeddings"), "init_std": keys.number("initializer_range"),
        "vocab_size": keys.number("vocab_size"), "max_seq_len": keys.number("n_positions"),
    }  # fmt: skip


def to_keys(model: ModelConfig) -> Json:
    if model.mlp not in NAMES:
        raise Unsupported(f"mlp = {model.mlp}")
    return {
        "n_layer": model.num_layers, "n_embd": model.embed_dim, "n_head": model.num_heads, "n_inner": model.mlp_size,
        "activation_function": NAMES[model.mlp], "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std,
        "vocab_size": model.vocab_size, "n_positions": model.max_seq_len,
    }  # fmt: skip


def _pair(theirs: str, *ours: str, weight: str = "kernel") -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"h.{{i}}.{theirs}.weight", tuple(f"layers.{name}.{weight}" for name in ours)),
        Tensor(f"h.{{i}}.{theirs}.bias", tuple(f"layers.{name}.bias" for name in ours)),
    )


TENSORS = (
    Tensor("wte.weight", ("embedding",)),
    Tensor("wpe.weight", ("position",)),
    *_pair("ln_1", "attention_norm", weight="scale"),
    *_pair("attn.c_attn", "attention.query", "attention.key", "attention.value"),
    *_pair("attn.c_proj", "attention.out"),
    *_pair("ln_2", "mlp_norm", weight="scale"),
    *_pair("mlp.c_fc", "mlp.up"),
    *_pair("mlp.c_proj", "mlp.down"),
    Tensor("ln_f.weight", ("norm.scale",)),
    Tensor("ln_f.bias", ("norm.bias",)),
    Tensor("lm_head.weight", ("head.kernel",), transpose=True),
)
FAMILY = Family(
    "gpt2", "GPT2LMHeadModel", to_fields, to_keys, TENSORS, DEFAULTS, prefix="transformer.",
    ignored=("attn.bias", "attn.masked_bias"),
)  # fmt: skip
