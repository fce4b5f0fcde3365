"""Adapters as a folder of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors. No JAX."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from data.storage import files
from model import families
from model.config import LoraConfig, ModelConfig
from model.families import Family
from trainer.errors import CheckpointError, ConfigError
from trainer.interchange.folder import read_json, stored_in

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # begins the names of all tensors
NAME = re.compile(re.escape(ROOT) + r"(.+)\.lora_([AB])\.weight")
# The keys that we use, or that do not change what an adapter computes once it is trained. Others must be unset.
KNOWN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping",
    "base_model_name_or_path", "inference_mode", "revision", "peft_version", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config", "init_lora_weights", "bias",
}  # fmt: skip
# How PEFT makes the first values; some ways (pissa, olora, corda, loftq, …) change the base, too, each time it loads.
INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A projection of a published model: one or several of ours, side by side in its output.

    Attributes:
      name: the full name in layer {i}, such as model.layers.{i}.self_attn.q_proj.
      ours: dotted paths of our projections, such as layers.attention.query.
    """

    name: str
    ours: tuple[str, ...]

    def shape(self, model: ModelConfig) -> tuple[int, int]:
        """(in, out)."""
        shapes = [model.projections[path] for path in self.ours]
        return shapes[0][0], sum(out for _, out in shapes)


def _modules(family: Family, model: ModelConfig) -> Iterator[_Module]:
    for tensor in family.tensors:
        if "{i}" in tensor.theirs and all(path.endswith(".kernel") for path in tensor.ours):
            ours = tuple(path.removesuffix(".kernel") for path in tensor.ours)
            if set(ours) <= model.projections.keys():
                yield _Module(family.prefix + tensor.theirs.removesuffix(".weight"), ours)


def write(target: pathlib.Path, adapters: Mapping[str, np.ndarray], model: ModelConfig, base: str) -> int:
    """Writes the folder `target`, which must not exist.

    Args:
      adapters: the arrays by dotted path, [layers, in, rank] and [layers, rank, out].
      model: with its adapters in model.lora.
      base: what the weights of the base are called.

    Returns:
      The number of parameters.

    Raises:
      ConfigError: no family has a model like this, or `target` exists.
      CheckpointError: what was read back is not what was written.
      OSError: `target` cannot be written; what was written of it is deleted.
    """
    family = _family(model)
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not")
    lora, tensors, joined = model.lora, dict[str, np.ndarray](), dict[str, int]()
    modules = [(m, [path for path in m.ours if f"{path}.lora.a" in adapters]) for m in _modules(family, model)]
    for module, adapted in modules:
        if len(adapted) > 1:
            joined[module.name.rpartition("{i}.")[2]] = len(adapted)
        for i in range(model.num_layers if adapted else 0):
            a, b = _joined(module, adapted, adapters, model, i)
            name = ROOT + module.name.format(i=i)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none", "inference_mode": True,
        "target_modules": [module.name.rpartition("{i}.")[2] for module, adapted in modules if adapted],
        # PEFT joins our projections that are one of theirs: their ranks add up, and their factor stays alpha / rank.
        "rank_pattern": {name: count * lora.rank for name, count in joined.items()},
        "alpha_pattern": {name: count * lora.alpha for name, count in joined.items()},
        "fan_in_fan_out": family.model_type == "gpt2", "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    with files.complete_folder(target, "writing") as folder:
        # safetensors' save_file makes a file that only its owner can read.
        (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
        written = safetensors.numpy.load_file(folder / TENSORS)
        if any(written[name].tobytes() != tensor.tobytes() for name, tensor in tensors.items()):
            raise CheckpointError(
                f"what was read back from {folder / TENSORS} is not what was written; try another disk"
            )
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.size for tensor in tensors.values())


def _joined(
    module: _Module, adapted: list[str], adapters: Mapping[str, np.ndarray], model: ModelConfig, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """The (A [rank, in], B [out, rank]) of a module in layer i: B is one block for each adapter."""
    a = np.concatenate([adapters[f"{path}.lora.a"][i].T for path in adapted])
    rank, row = model.lora.rank, 0
    b = np.zeros((module.shape(model)[1], len(a)), np.float32)
    for path in module.ours:
        width = model.projections[path][1]
        if path in adapted:
            column = adapted.index(path) * rank
            b[row : row + width, column : column + rank] = adapters[f"{path}.lora.b"][i].T
        row += width
    return np.ascontiguousarray(a, np.float32), b


def _family(model: ModelConfig) -> Family:
    try:
        return families.expressing(model)[0]
    except families.Unsupported as e:
        raise ConfigError(f"adapters of this model cannot be written or read: {e}") from None


def read(path: pathlib.Path, model: ModelConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Adapters of `model`: their configuration, and the arrays by dotted path as in `write`.

    If ranks or factors differ between modules, all become the largest rank: the others are filled up with zeros, and B
    takes the difference of the factors.

    Raises:
      ConfigError: they are not LoRA, have a feature that we cannot do, or are of another model.
      DataError: a file is damaged.
    """
    config = read_json(path / CONFIG, "a folder of PEFT has one")
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path / CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA can be read")
    unknown = [name for name, value in config.items() if name not in KNOWN and value]
    unknown += ["bias"] * (config.get("bias", "none") != "none")
    unknown += ["init_lora_weights"] * (config.get("init_lora_weights") not in INITIAL)
    for name in unknown:
        raise ConfigError(f"{path / CONFIG}: {name} is {config[name]!r}, which is not supported")
    pairs = _pairs(path, model)
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    factors = {name: _factor(config, name, rank) for name, rank in ranks.items()}
    rank, factor = max(ranks.values()), next(iter(factors.values()))
    arrays: dict[str, np.ndarray] = {}
    for module in _modules(_family(model), model):
        found = [module.name.format(i=i) in pairs for i in range(model.num_layers)]
        if not any(found):
            continue
        if not all(found):
            raise ConfigError(f"{path}: {module.name.format(i=found.index(False))} has no adapter, other layers have")
        layers = [_padded(*pairs[name], rank, factors[name] / factor) for name in _names(module, model)]
        begin = 0
        for ours in module.ours:
            end = begin + model.projections[ours][1]
            arrays[f"{ours}.lora.a"] = np.stack([a.T for a, _ in layers])
            arrays[f"{ours}.lora.b"] = np.stack([b[begin:end].T for _, b in layers])
            begin = end
    targets = tuple(sorted({name.rpartition(".lora.")[0] for name in arrays}))
    dropout = config.get("lora_dropout") or 0.0
    return LoraConfig(rank, alpha=factor * rank, dropout=float(dropout), targets=targets), arrays


def _names(module: _Module, model: ModelConfig) -> list[str]:
    return [module.name.format(i=i) for i in range(model.num_layers)]


def _pairs(path: pathlib.Path, model: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B), float32, by the full names of modules. Raises ConfigError, DataError."""
    if not (path / TENSORS).is_file():
        raise ConfigError(f"{path} holds no {TENSORS}; save the adapters again with a newer PEFT, as safetensors")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in stored_in(path / TENSORS).items():
        match = NAME.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise ConfigError(f"{path / TENSORS} holds {name}, which is not an adapter of a projection")
        whole = tensor.read((slice(0, tensor.shape[0]), slice(0, tensor.shape[1])))
        found.setdefault(match[1], {})[match[2]] = whole.astype(np.float32)
    known = {name: module for module in _modules(_family(model), model) for name in _names(module, model)}
    if strangers := sorted(found.keys() - known.keys()):
        raise ConfigError(f"{path} is of another model: this one has no {strangers[0]}")
    for name, pair in found.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1] or not len(pair["A"]):
            raise ConfigError(f"{path / TENSORS}: A and B of {name} do not fit together")
        shape, here = (pair["A"].shape[1], len(pair["B"])), known[name].shape(model)
        if shape != here:
            raise ConfigError(
                f"{path} is of another model: {name} maps {shape[0]} to {shape[1]} values, {here[0]} to {here[1]} here"
            )
    if not found:
        raise ConfigError(f"{path / TENSORS} holds no adapters")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _factor(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank of a module, or alpha / sqrt(rank) with use_rslora."""

    def value(key: str, pattern_key: str) -> Any:
        patterns = config.get(pattern_key) or {}
        fitting = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
        return fitting[0] if fitting else config.get(key)

    alpha, said = value("lora_alpha", "alpha_pattern"), value("r", "rank_pattern")
    if said != rank or not isinstance(alpha, int | float) or alpha <= 0:
        raise ConfigError(f"{CONFIG} says rank {said} and lora_alpha {alpha} of {name}, which has rank {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _padded(a: np.ndarray, b: np.ndarray, rank: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    missing = rank - len(a)
    return np.pad(a, [(0, missing), (0, 0)]), np.pad(b * np.float32(factor), [(0, 0), (0, missing)])
