"""A run's weights as a folder that Hugging Face's `from_pretrained`, vLLM and llama.cpp read."""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from data.storage import files
from data.tokenizers.base import Tokenizer
from model import families
from model.config import ModelConfig
from model.families import Json, Unsupported
from model.families.layout import Layout, Read
from model.transformer import parameter_shapes
from trainer.errors import ConfigError
from trainer.interchange import checksums
from trainer.interchange.folder import companions_in
from trainer.interchange.safetensors_writer import SHARD_BYTES, FolderWriter, row_blocks
from trainer.interchange.source import Source

log = logging.getLogger("meshlm")
Load = Callable[[Iterable[str] | None], dict]  # dotted paths, or None for all -> nested parameters
Tensors = Callable[[Layout], Iterator[tuple[str, Iterable[np.ndarray]]]]  # the tensors of a layout, each in rows


def form_of(model: ModelConfig) -> tuple[families.Family, Json, ModelConfig]:
    """The family of a run's model, its config.json, and the model that this describes: `model`, or `model` with biases
    that are zero, because the family always has biases. Raises ConfigError if no family can express the model."""
    try:
        return *families.expressing(model), model
    except Unsupported as e:
        biased = dataclasses.replace(model, bias=True)
        with contextlib.suppress(Unsupported):
            return *families.expressing(biased), biased
        raise ConfigError(f"this model cannot be exported: {e}") from None


def export(
    target: pathlib.Path,
    tensors: Tensors,
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
      tensors: of_source or of_arrays.
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
    family, config, form = form_of(model)
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not")
    layout = Layout(family, form, parameter_shapes(form))
    with files.complete_folder(target, "writing") as folder:
        writer = FolderWriter(folder, {name: (dtype, shape) for name, shape in layout.shapes.items()}, shard_bytes)
        for name, pieces in tensors(layout):
            try:
                writer.write(name, pieces)
            except ValueError as e:
                raise ConfigError(f"{e}; choose another --dtype") from None
        _write_companions(folder, config, tokenizer, dtype, kept)
        (folder / "README.md").write_text(card)
        writer.verify()
    return family.model_type, layout.num_params


def of_source(source: Source) -> Tensors:
    """The tensors of weights that are in a folder, block by block: no parameter is in memory as a whole. Those that the
    folder does not have are zero. Raises DataError if they are not what launch.convert copied."""

    def tensors(layout: Layout) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        own = Layout(source.family, source.model, parameter_shapes(source.model))
        read = source.reader(own)
        checksums.check(source.weights.path, checksums.of_tensors(own, read))
        _say_missing([name for name in layout.shapes if name not in own.shapes])
        for name, shape in layout.shapes.items():
            yield name, _rows(name, shape, read if name in own.shapes else None)
        source.check_unchanged()

    return tensors


def _rows(name: str, shape: tuple[int, ...], read: Read | None) -> Iterator[np.ndarray]:
    rest = tuple(slice(0, n) for n in shape[1:])
    for rows in row_blocks(shape):
        yield np.zeros((rows.stop - rows.start, *shape[1:]), np.float32) if read is None else read(name, (rows, *rest))


def of_arrays(load: Load, model: ModelConfig) -> Tensors:
    """The tensors of `model`. Parameters that it does not have are zero.

    Args:
      load: returns some of the model's parameters, nested: JAX arrays that this process can read as a whole. It is
        called for those of one kind of tensor at a time.
    """
    existing = parameter_shapes(model)

    def tensors(layout: Layout) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        _say_missing([path for paths, _ in layout.groups() for path in paths if path not in existing])
        for paths, names in layout.groups():
            known = [path for path in paths if path in existing]
            yield from _of_group(layout, names, load(known) if known else {})

    return tensors


def _of_group(layout: Layout, names: list[str], params: dict) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """The tensors `names`, which hold `params`. These are freed before the next ones are read."""
    leaves = traverse_util.flatten_dict(params, sep=".")
    for name in names:
        yield name, [layout.tensor(functools.partial(_of_layer, layout, leaves), name)]


def _of_layer(layout: Layout, leaves: dict[str, jax.Array], path: str, layer: int | None) -> np.ndarray:
    if path not in leaves:
        return np.zeros(layout.shape(path, layer), np.float32)
    return np.asarray(leaves[path] if layer is None else _layer(leaves[path], layer))


def _say_missing(names: list[str]) -> None:
    if names:
        log.info("written as zeros, because the model does not have them: %s", ", ".join(names))


@jax.jit
def _layer(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _write_companions(
    folder: pathlib.Path, config: Json, tokenizer: Tokenizer | None, dtype: str, kept: pathlib.Path | None
) -> None:
    """config.json, the tokenizer's files, generation_config.json, and what was kept of the original model."""
    ids: dict[str, Any] = {}
    if kept is not None and kept.is_dir():
        for name, path in companions_in(kept).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
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
        if "bos_token" not in keys:
            keys["add_bos_token"] = False  # otherwise llama.cpp adds one to some kinds of BPE
        _write_json(folder / "tokenizer_config.json", keys)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    # The dtype has two names: transformers 4 and others read torch_dtype, and transformers 5 writes dtype.
    _write_json(folder / "config.json", config | ids | {"torch_dtype": dtype, "dtype": dtype})


def _write_json(path: pathlib.Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
