"""OLMo 2 (OLMo et al., 2024): norms after the sub-layers only, and norms of all queries and of all keys of a token."""

from model.config import ModelConfig
from model.families.base import (
    LAYER,
    LLAMA_DEFAULTS,
    LLAMA_LIKE,
    QK_NORMS,
    Family,
    Json,
    Keys,
    llama_fields,
    llama_keys,
    norm,
    rope_fields,
    rope_keys,
)  # fmt: skip


def to_fields(keys: Keys) -> dict:
    biases = {"qkv_bias": keys.get("attention_bias"), "out_bias": keys.get("attention_bias")}
    return llama_fields(keys) | rope_fields(keys) | biases | {"norm_at": "after", "qk_norm": "projection"}


def to_keys(model: ModelConfig) -> Json:
    bias = {"attention_bias": bool(model.bias if model.qkv_bias is None else model.qkv_bias)}
    keys = llama_keys(model) | rope_keys(model) | bias
    del keys["head_dim"]  # always hidden_size / num_attention_heads
    return keys


TENSORS = (
    *LLAMA_LIKE, *QK_NORMS,
    norm(LAYER + "post_attention_layernorm", "layers.attention_post_norm"),
    norm(LAYER + "post_feedforward_layernorm", "layers.mlp_post_norm"),
)  # fmt: skip
FAMILY = Family("olmo2", "Olmo2ForCausalLM", to_fields, to_keys, TENSORS, LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5})
