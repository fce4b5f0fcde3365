"""Qwen2 and 2.5 (Qwen Team, 2024): Llama's form with biases of queries, keys and values, and windows in late layers."""

from typing import Any

from model.config import ModelConfig
from model.families import base
from model.families.base import Family, Json, Keys

DEFAULTS = base.LLAMA_DEFAULTS | {
    "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def late_windows(keys: Keys) -> dict[str, Any]:
    """Windows of the layers from max_window_layers on; sliding_window has no effect without use_sliding_window."""
    keys.must_be("dual_chunk_attention_config", None)
    used, first = keys.get("use_sliding_window"), keys.get("max_window_layers")
    late = [i >= first for i in range(keys.number("num_hidden_layers"))]
    windows = base.window_fields(keys, late)
    return windows if used else {}


def late_window_keys(model: ModelConfig) -> Json:
    local = model.local_layers
    first = local.index(True) if any(local) else model.num_layers
    return base.window_keys(model) | {"use_sliding_window": any(local), "max_window_layers": first}


def to_fields(keys: Keys) -> dict:
    return base.llama_fields(keys) | base.rope_fields(keys) | late_windows(keys) | {"qkv_bias": True}


def to_keys(model: ModelConfig) -> Json:
    return base.llama_keys(model) | base.rope_keys(model) | late_window_keys(model)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", to_fields, to_keys, (*base.LLAMA_LIKE, *base.NORMS_BEFORE), DEFAULTS)
