"""Gemma 3, text (Gemma Team, 2025): Gemma 2's form with norms of queries and keys, no caps, and five local layers to a
global one, each kind with a rope of its own."""

from model.config import ModelConfig
from model.families import base, gemma2
from model.families.base import Family, Json, Keys

THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
DEFAULTS = gemma2.DEFAULTS | {
    "rope_theta": THETA, "rope_local_base_freq": LOCAL_THETA, "sliding_window_pattern": 6,
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "max_position_embeddings": 131_072,
}  # fmt: skip


def to_fields(keys: Keys) -> dict:
    keys.must_be("attn_logit_softcapping", None)  # transformers' class reads it and does not use it
    pattern = keys.get("sliding_window_pattern")
    keys.get("_sliding_window_pattern")  # transformers' copy of the key; if there is a layer_types, it decides
    local = [(i + 1) % pattern != 0 for i in range(keys.number("num_hidden_layers"))]
    return gemma2.gemma_fields(keys) | _ropes(keys) | base.window_fields(keys, local) | {"qk_norm": "head"}


def _ropes(keys: Keys) -> dict:
    """Reads both ropes: transformers 5 nests them by kind of layer; in 4, rope_scaling is for global layers only."""
    new, old = keys.get("rope_parameters") or {}, keys.get("rope_scaling") or {}
    theta, local_theta = keys.get("rope_theta"), keys.get("rope_local_base_freq")
    of_local = base.rope_of(new.get(base.LOCAL) or {}, local_theta, 1.0, keys.number("max_position_embeddings"))
    if of_local.keys() != {"rope_theta"}:
        raise base.Unsupported("rope_parameters scales the rope of local layers")
    of_global = base.rope_of_both(new.get(base.GLOBAL) or {}, old, theta, 1.0, keys.number("max_position_embeddings"))
    return of_global | {"local_rope_theta": of_local["rope_theta"]}


def to_keys(model: ModelConfig) -> Json:
    keys = base.rope_keys(model)
    local_theta = model.local_rope_theta or model.rope_theta
    of_local = {"rope_type": "default", "rope_theta": local_theta}
    nested = {base.GLOBAL: keys["rope_parameters"], base.LOCAL: of_local}
    keys |= {"rope_parameters": nested, "rope_local_base_freq": local_theta}
    return gemma2.gemma_keys(model) | keys | base.window_keys(model, gemma2.WINDOW)


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", to_fields, to_keys, gemma2.TENSORS, DEFAULTS)
