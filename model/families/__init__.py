"""Published families of models: what a config.json means here, and which of its tensors is which of our parameters.

Each family has a file; docs/models.md says how to add one. Nothing here reads a file or knows a device.
"""

import difflib

from model.config import ModelConfig
from model.families import gemma2, gemma3, gpt2, llama, mistral, olmo2, qwen2, qwen3
from model.families.base import Family, Json, Unsupported, architecture_of
from model.families.layout import HEAD

# A model is exported as the first family here that can express it.
FAMILIES = (
    gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, olmo2.FAMILY, gemma2.FAMILY, gemma3.FAMILY,
)  # fmt: skip
BY_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES}


def of_json(config: Json) -> Family:
    """The family of a config.json. Raises Unsupported if it is unknown, with the known families and the nearest."""
    name = config.get("model_type")
    if isinstance(name, str) and name in BY_TYPE:
        return BY_TYPE[name]
    near = difflib.get_close_matches(str(name), BY_TYPE, 1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise Unsupported(f"model_type is {name!r}; the families known are {', '.join(BY_TYPE)}{hint}")


def expressing(model: ModelConfig) -> tuple[Family, Json]:
    """The family that can express `model`, and its config.json.

    Raises:
      Unsupported: no family can express it; the message says for each family which fields it would lose.
    """
    reasons = []
    for family in FAMILIES:
        try:
            config = family.to_json(model)
            lost = differences(family.to_model(config)[0], model)
        except (Unsupported, ValueError) as e:
            lost = [str(e)]
        if not lost:
            return family, config
        reasons.append(f"{family.model_type}: {', '.join(lost)}")
    raise Unsupported("no family has a model like this; what each would lose: " + "; ".join(reasons))


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields of `other` that change what a model computes, and that have another value in `one`."""
    a, b = architecture_of(one), architecture_of(other)
    return [f"{name} = {b[name]}" for name in b if a[name] != b[name]]


def loaded(config: Json) -> tuple[Family, ModelConfig, list[str]]:
    """The family of a config.json, the model that it describes, and the keys that were not used.

    Raises:
      Unsupported: the family is not known, or the model has a feature that we cannot do.
    """
    family = of_json(config)
    model, unused = family.to_model(config)
    return family, model, unused


__all__ = [
    "BY_TYPE",
    "FAMILIES",
    "HEAD",
    "Family",
    "Json",
    "Unsupported",
    "differences",
    "expressing",
    "loaded",
    "of_json",
]
