"""Mistral 7B (Jiang et al., 2023) and later models of its form: Llama's, with a window in all layers or in none."""

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
    keys.must_be("layer_types", None)  # transformers ignores this key, so a file that has it is refused
    window = {"window": keys.get("sliding_window"), "layer_pattern": ("local",)}
    return llama_fields(keys) | rope_fields(keys) | window


def to_keys(model: ModelConfig) -> Json:
    return llama_keys(model) | rope_keys(model) | {"sliding_window": model.window}


DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072, "intermediate_size": 14336,
}  # fmt: skip
FAMILY = Family("mistral", "MistralForCausalLM", to_fields, to_keys, (*LLAMA_LIKE, *NORMS_BEFORE), DEFAULTS)
