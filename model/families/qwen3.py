"""Qwen3, dense (Qwen Team, 2025): Qwen2's form with norms of the heads of queries and keys, and without its biases."""

from model.config import ModelConfig
from model.families import base, qwen2
from model.families.base import Family, Json, Keys


def to_fields(keys: Keys) -> dict:
    biases = base.attention_bias_fields(keys)
    return base.llama_fields(keys) | base.rope_fields(keys) | qwen2.late_windows(keys) | biases | {"qk_norm": "head"}


def to_keys(model: ModelConfig) -> Json:
    bias = base.attention_bias_keys(model)
    return base.llama_keys(model) | base.rope_keys(model) | qwen2.late_window_keys(model) | bias


TENSORS = (*base.LLAMA_LIKE, *base.NORMS_BEFORE, *base.QK_NORMS)
FAMILY = Family("qwen3", "Qwen3ForCausalLM", to_fields, to_keys, TENSORS, qwen2.DEFAULTS | {"head_dim": 128})
