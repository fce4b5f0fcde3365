"""Gemma 2 (Gemma Team, 2024): norms of 1 + w before and after each sub-layer, soft caps, windows in every other
layer."""

from typing import Any

from model.config import ModelConfig
from model.families.base import (
    LAYER,
    LLAMA_DEFAULTS,
    LLAMA_LIKE,
    QK_NORMS,
    Family,
    Json,
    Keys,
    Unsupported,
    llama_fields,
    llama_keys,
    norm,
    rope_fields,
    rope_keys,
    window_fields,
    window_keys,
)  # fmt: skip

TENSORS = (
    *LLAMA_LIKE, *QK_NORMS,
    norm(LAYER + "input_layernorm", "layers.attention_norm"),
    norm(LAYER + "post_attention_layernorm", "layers.attention_post_norm"),
    norm(LAYER + "pre_feedforward_layernorm", "layers.mlp_norm"),
    norm(LAYER + "post_feedforward_layernorm", "layers.mlp_post_norm"),
)  # fmt: skip
DEFAULTS = LLAMA_DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "max_position_embeddings": 8192,
}  # fmt: skip


def gemma_fields(keys: Keys) -> dict[str, Any]:
    """The fields of ModelConfig that Gemma 2 and 3 share."""
    keys.must_be("use_bidirectional_attention", None, False)
    keys.get("hidden_act")  # an older name of the key, which transformers ignores
    fields = llama_fields(keys, act="hidden_activation")
    return fields | {
        "norm_plus_one": True, "norm_at": "both", "embedding_scale": fields["embed_dim"] ** 0.5,
        "attention_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": keys.get("attn_logit_softcapping"), "logits_softcap": keys.get("final_logit_softcapping"),
        "qkv_bias": keys.get("attention_bias"), "out_bias": keys.get("attention_bias"),
    }  # fmt: skip


def gemma_keys(model: ModelConfig) -> Json:
    keys = llama_keys(model)
    scalar = (model.attention_scale or model.head_size**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise Unsupported(f"attention_scale = {model.attention_scale}")
    return keys | {
        "hidden_activation": keys["hidden_act"], "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": model.attention_softcap, "final_logit_softcapping": model.logits_softcap,
        "attention_bias": bool(model.bias if model.qkv_bias is None else model.qkv_bias),
    }  # fmt: skip


def to_fields(keys: Keys) -> dict:
    every_other = [i % 2 == 0 for i in range(keys.number("num_hidden_layers"))]
    return gemma_fields(keys) | rope_fields(keys) | window_fields(keys, every_other)


def to_keys(model: ModelConfig) -> Json:
    return gemma_keys(model) | rope_keys(model) | window_keys(model)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", to_fields, to_keys, TENSORS, DEFAULTS)
