"""Qwen3, dense (Qwen Team, 2025): Qwen2's form with norms of the heads of queries and keys, and without its biases."""

from model.config import ModelConfig
from model.families import qwen2
from model.families.base import (
    LLAMA_LIKE,
    NORMS_BEFORE,
    QK_NORMS,
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
    return llama_fields(keys) | rope_fields(keys) | qwen2.late_windows(keys) | biases | {"qk_norm": "head"}


def to_keys(model: ModelConfig) -> Json:
    bias = {"attention_bias": bool(model.bias if model.qkv_bias is None else model.qkv_bias)}
    return llama_keys(model) | rope_keys(model) | qwen2.late_window_keys(model) | bias


TENSORS = (*LLAMA_LIKE, *NORMS_BEFORE, *QK_NORMS)
FAMILY = Family("qwen3", "Qwen3ForCausalLM", to_fields, to_keys, TENSORS, qwen2.DEFAULTS | {"head_dim": 128})
