"""OLMo 2 (OLMo et al., 2024): norms after the sub-layers only, and norms of all queries and of all keys of a token."""

from model.config import ModelConfig
from model.families import base
from model.families.base import Family, Json, Keys


def to_fields(keys: Keys) -> dict:
    biases = base.attention_bias_fields(keys)
    return base.llama_fields(keys) | base.rope_fields(keys) | biases | {"norm_at": "after", "qk_norm": "projection"}


def to_keys(model: ModelConfig) -> Json:
    bias = base.attention_bias_keys(model)
    keys = base.llama_keys(model) | base.rope_keys(model) | bias
    del keys["head_dim"]  # always hidden_size / num_attention_heads
    return keys


TENSORS = (
    *base.LLAMA_LIKE, *base.QK_NORMS,
    base.norm(base.LAYER + "post_attention_layernorm", "layers.attention_post_norm"),
    base.norm(base.LAYER + "post_feedforward_layernorm", "layers.mlp_post_norm"),
)  # fmt: skip
FAMILY = Family("olmo2", "Olmo2ForCausalLM", to_fields, to_keys, TENSORS, base.LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5})
