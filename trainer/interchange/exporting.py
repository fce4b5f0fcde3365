"""A run's weights as a folder that Hugging Face's `from_pretrained`, vLLM and llama.cpp read."""

import json
import pathlib
import shutil
import zlib
from typing import Any

import jax
import numpy as np
import safetensors
from flax import traverse_util

from data.storage import files
from data.tokenizers.base import Tokenizer
from model import families
from model.config import ModelConfig
from model.families import Json, Unsupported
from model.families.layout import Layout
from trainer.errors import CheckpointError, ConfigError
from trainer.interchange import safetensors_writer
from trainer.interchange.folder import COMPANIONS, INDEX, SINGLE

SHARD_BYTES = 5_000_000_000


def form_of(model: ModelConfig) -> tuple[families.Family, Json]:
    """The family of a run's model, and its config.json. Raises ConfigError if no family can express the model."""
    try:
        return families.expressing(model)
    except Unsupported as e:
        raise ConfigError(f"this model cannot be exported: {e}") from None


def export(
    target: pathlib.Path,
    params: dict,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    dtype: str,
    card: str,
    kept: pathlib.Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, int]:
    """Writes the folder `target`, which must not exist, and reads it back before it gets its name.

    Args:
      params: the model's nested parameters: JAX arrays that this process can read as a whole.
      card: the content of README.md.
      kept: folder with the files of the original model, if the run was converted from one.
      shard_bytes: the most bytes of tensors in a file.

    Returns:
      The family's name, and the number of parameters.

    Raises:
      ConfigError: no family has a model like this, or `target` exists.
      CheckpointError: what was read back is not what was written.
      OSError: `target` cannot be written; what was written of it is deleted.
    """
    family, config = form_of(model)
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not")
    flat = {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    layout = Layout(family, model, {name: leaf.shape for name, leaf in flat.items()})
    with files.complete_folder(target, "writing") as folder:
        sums = _write_tensors(folder, layout, flat, dtype, shard_bytes)
        _write_companions(folder, config, tokenizer, dtype, kept)
        (folder / "README.md").write_text(card)
        _verify(folder, sums)
    return family.model_type, layout.num_params


def _write_tensors(
    folder: pathlib.Path, layout: Layout, flat: dict[str, jax.Array], dtype: str, shard_bytes: int
) -> dict[str, dict[str, int]]:
    """Writes the .safetensors files, and the index if there are several; returns the CRC-32 of each tensor by file."""

    def of_layer(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(flat[path] if layer is None else _layer(flat[path], layer))

    def make(name: str) -> np.ndarray:
        return layout.tensor(of_layer, name)

    itemsize = safetensors_writer.DTYPES[dtype].itemsize
    groups = safetensors_writer.shards(layout.shapes, itemsize, shard_bytes)
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))
    ]  # fmt: skip
    sums = {}
    for file, group in zip(names, groups, strict=True):
        shapes = {name: layout.shapes[name] for name in group}
        try:
            sums[file] = safetensors_writer.write(folder / file, shapes, make, dtype)
        except ValueError as e:
            raise ConfigError(f"{e}; choose another --dtype") from None
    if len(groups) > 1:
        size = layout.num_params * itemsize
        of_tensor = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": of_tensor})
    return sums


@jax.jit
def _layer(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _write_companions(
    folder: pathlib.Path, config: Json, tokenizer: Tokenizer | None, dtype: str, kept: pathlib.Path | None
) -> None:
    """config.json, the tokenizer's files, generation_config.json, and what was kept of the original model."""
    ids: dict[str, Any] = {}
    if kept is not None and kept.is_dir():
        for name in COMPANIONS:
            if (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)
        original = json.loads((kept / "config.json").read_text()) if (kept / "config.json").is_file() else {}
        ids = {name: original[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in original}
    file = None if tokenizer is None else tokenizer.file()
    if file is not None:
        (folder / file[0]).write_bytes(file[1])
    if tokenizer is not None and not ids:
        ids = {"eos_token_id": tokenizer.eos_id}
    if tokenizer is not None and file is not None and not (folder / "tokenizer_config.json").exists():
        keys: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name in ("bos_token", "eos_token", "pad_token"):
            if isinstance(id := ids.get(f"{name}_id"), int) and id in tokenizer.specials:
                keys[name] = tokenizer.specials[id]
        _write_json(folder / "tokenizer_config.json", keys)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    # The dtype has two names: transformers 4 and others read torch_dtype, and transformers 5 writes dtype.
    _write_json(folder / "config.json", config | ids | {"torch_dtype": dtype, "dtype": dtype})


def _write_json(path: pathlib.Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _verify(folder: pathlib.Path, sums: dict[str, dict[str, int]]) -> None:
    """Reads each tensor back with the safetensors library. Raises CheckpointError if its CRC-32 differs."""
    for file, of_tensor in sums.items():
        with safetensors.safe_open(folder / file, "numpy") as opened:
            for name, expected in of_tensor.items():
                array = np.ascontiguousarray(opened.get_tensor(name))
                if zlib.crc32(array.view(np.uint8).reshape(-1).data) != expected:
                    raise CheckpointError(f"{folder / file}: {name} is not what was written; check the disk")
