"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and models of the same form: SmolLM, TinyLlama."""

from model.config import ModelConfig
from model.families.base import (
    LLAMA_DEFAULTS,
    LLAMA_LIKE,
    NORMS_BEFORE,
    Family,
    Json,
    Keys,
    llama_fields,
    llama_keys,
    rope_fields,
    rope_keys,
)  # fmt: skip


def to_fields(keys: Keys) -> dict:
    biases = {"qkv_bias": keys.get("attention_bias"), "out_bias": keys.get("attention_bias")}
    return llama_fields(keys) | rope_fields(keys) | biases | {"mlp_bias": keys.get("mlp_bias")}


def to_keys(model: ModelConfig) -> Json:
    biases = {"attention_bias": bool(model.bias if model.qkv_bias is None else model.qkv_bias)}
    biases["mlp_bias"] = bool(model.bias if model.mlp_bias is None else model.mlp_bias)
    return llama_keys(model) | rope_keys(model) | biases


FAMILY = Family(
    "llama", "LlamaForCausalLM", to_fields, to_keys, (*LLAMA_LIKE, *NORMS_BEFORE), LLAMA_DEFAULTS | {"mlp_bias": False}
)
