"""Mistral 7B (Jiang et al., 2023) and later models of its form: Llama's, with a window in all layers or in none."""

from model.config import ModelConfig
from model.families import base
from model.families.base import Family, Json, Keys


def to_fields(keys: Keys) -> dict:
    keys.must_be("layer_types", None)  # transformers ignores this key, so a file that has it is refused
    window = {"window": keys.get("sliding_window"), "layer_pattern": ("local",)}
    return base.llama_fields(keys) | base.rope_fields(keys) | window


def to_keys(model: ModelConfig) -> Json:
    return base.llama_keys(model) | base.rope_keys(model) | {"sliding_window": model.window}


DEFAULTS = base.LLAMA_DEFAULTS | {
    "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072, "intermediate_size": 14336,
}  # fmt: skip
FAMILY = Family("mistral", "MistralForCausalLM", to_fields, to_keys, (*base.LLAMA_LIKE, *base.NORMS_BEFORE), DEFAULTS)
