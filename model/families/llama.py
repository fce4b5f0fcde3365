"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and models of the same form: SmolLM, TinyLlama."""

from model.config import ModelConfig
from model.families import base
from model.families.base import Family, Json, Keys


def to_fields(keys: Keys) -> dict:
    biases = base.attention_bias_fields(keys)
    return base.llama_fields(keys) | base.rope_fields(keys) | biases | {"mlp_bias": keys.get("mlp_bias")}


def to_keys(model: ModelConfig) -> Json:
    biases = base.attention_bias_keys(model) | {"mlp_bias": model.has_bias(model.mlp_bias)}
    return base.llama_keys(model) | base.rope_keys(model) | biases


TENSORS = (*base.LLAMA_LIKE, *base.NORMS_BEFORE)
FAMILY = Family("llama", "LlamaForCausalLM", to_fields, to_keys, TENSORS, base.LLAMA_DEFAULTS | {"mlp_bias": False})
