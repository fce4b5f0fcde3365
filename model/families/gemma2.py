"""Gemma 2 (Gemma Team, 2024): norms of 1 + w before and after each sub-layer, soft caps, windows in every other
layer."""

from typing import Any

from model.config import ModelConfig
from model.families import base
from model.families.base import Family, Json, Keys

TENSORS = (
    *base.LLAMA_LIKE, *base.QK_NORMS,
    base.norm(base.LAYER + "input_layernorm", "layers.attention_norm"),
    base.norm(base.LAYER + "post_attention_layernorm", "layers.attention_post_norm"),
    base.norm(base.LAYER + "pre_feedforward_layernorm", "layers.mlp_norm"),
    base.norm(base.LAYER + "post_feedforward_layernorm", "layers.mlp_post_norm"),
)  # fmt: skip
WINDOW = 4096
DEFAULTS = base.LLAMA_DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "sliding_window": WINDOW, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "max_position_embeddings": 8192,
}  # fmt: skip


def gemma_fields(keys: Keys) -> dict[str, Any]:
    """The fields of ModelConfig that Gemma 2 and 3 share."""
    keys.must_be("use_bidirectional_attention", None, False)
    keys.get("hidden_act")  # an older name of the key, which transformers ignores
    fields = base.llama_fields(keys, act="hidden_activation")
    return fields | {
        "norm_plus_one": True, "norm_at": "both", "embedding_scale": fields["embed_dim"] ** 0.5,
        "attention_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": keys.get("attn_logit_softcapping"), "logits_softcap": keys.get("final_logit_softcapping"),
        **base.attention_bias_fields(keys),
    }  # fmt: skip


def gemma_keys(model: ModelConfig) -> Json:
    keys = base.llama_keys(model)
    scalar = (model.attention_scale or model.head_size**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise base.Unsupported(f"attention_scale = {model.attention_scale}")
    return keys | {
        "hidden_activation": keys["hidden_act"], "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": model.attention_softcap, "final_logit_softcapping": model.logits_softcap,
        **base.attention_bias_keys(model),
    }  # fmt: skip


def to_fields(keys: Keys) -> dict:
    every_other = [i % 2 == 0 for i in range(keys.number("num_hidden_layers"))]
    return gemma_fields(keys) | base.rope_fields(keys) | base.window_fields(keys, every_other)


def to_keys(model: ModelConfig) -> Json:
    return gemma_keys(model) | base.rope_keys(model) | base.window_keys(model, WINDOW)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", to_fields, to_keys, TENSORS, DEFAULTS)
