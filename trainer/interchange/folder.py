"""A folder as Hugging Face's `save_pretrained` writes it: config.json and tensors in .safetensors files. No JAX."""

import json
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from data.errors import DataError
from model.families.layout import Index
from trainer.errors import ConfigError
from trainer.interchange.stored import Stored

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
KEPT = "hf"  # the folder of a run with the files of the model that it began with
# Files of a model that say how it is used. They are copied unchanged with the weights.
COMPANIONS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder of transformers 5, with templates that are chosen by name
CHECKSUMS = "checksums.json"  # in RUN/hf, if launch.convert made the run: the folder then also holds its first weights
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype("<f8")}


def is_run(path: pathlib.Path) -> bool:
    """Whether a run that has weights is in `path`."""
    return os.path.isdir(path / "checkpoints") or os.path.exists(path / KEPT / CHECKSUMS)


class Folder:
    """The tensors of a folder, read slice by slice.

    Attributes:
      config: the content of config.json.
      shapes: the shape of each tensor, by name.
      dtypes: the dtype of each tensor, by name, as safetensors calls it: F32, BF16, ….

    Raises:
      ConfigError: `path` is not such a folder.
      DataError: a file in it is damaged.
    """

    by_rows = True

    def __init__(self, path: pathlib.Path):
        self.path = path
        if is_run(path):
            raise ConfigError(
                f"{path} is a run, not a folder of Hugging Face; config.init_from takes it, --to_hf exports it"
            )
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder")
        self.config = read_json(path / CONFIG, "a folder of Hugging Face has one")
        self._file_of: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file, named in self._listed().items():
            self._open(file, named)
        if not_floats := [f"{name} ({dtype})" for name, dtype in self.dtypes.items() if dtype not in FLOATS]:
            raise ConfigError(
                f"{path} holds tensors that are not floating-point numbers: {', '.join(not_floats[:5])}; quantised "
                "weights cannot be converted: name the folder of the full ones"
            )

    def _listed(self) -> dict[str, list[str]]:
        """The .safetensors files, and for each the tensors that it holds according to the index."""
        if (self.path / INDEX).exists():
            index = read_json(self.path / INDEX, "")
            files: dict[str, list[str]] = {}
            of_tensor = index.get("weight_map")
            if not isinstance(of_tensor, dict) or not all(isinstance(file, str) for file in of_tensor.values()):
                raise DataError(f"{self.path / INDEX} has no weight_map of tensors to files; copy the folder again")
            for name, file in of_tensor.items():
                files.setdefault(file, []).append(name)
            for file in list(files):
                if pathlib.PurePath(file).name != file or file == "..":
                    raise ConfigError(f"{self.path / INDEX} names {file!r}, which is not a file of its own folder")
            if missing := [file for file in files if not (self.path / file).is_file()]:
                raise DataError(
                    f"{self.path / INDEX} names {len(missing)} of {len(files)} files that are not there, such as "
                    f"{missing[0]}; copy the whole folder"
                )
            if (self.path / SINGLE).is_file() and SINGLE not in files:
                raise ConfigError(f"{self.path} holds {SINGLE}, and {INDEX} names other files; remove one of the two")
            return files
        if (self.path / SINGLE).is_file():
            return {SINGLE: []}
        if ggufs := sorted(p.name for p in self.path.glob("*.gguf")):
            raise ConfigError(f"{self.path} holds {ggufs[0]}; read it with --from_gguf={self.path / ggufs[0]}")
        pickles = sorted(p.name for p in self.path.glob("*.bin"))
        if pickles:
            raise ConfigError(
                f"{self.path} holds {pickles[0]}, a pickle, which could run code of its own, and no .safetensors; "
                "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        raise ConfigError(f"{self.path} holds no weights: neither {SINGLE} nor {INDEX}")

    def _open(self, file: str, named: list[str]) -> None:
        path = self.path / file
        header, begin = _header(path)
        if lost := sorted(set(named) - set(header)):
            raise DataError(f"{path} lacks {', '.join(lost[:5])}, which {INDEX} says it holds; copy the folder again")
        for name, entry in header.items():
            if name in self._file_of:
                raise ConfigError(f"{name} is in {self._file_of[name]} and in {file}; one of them is not of this model")
            self._file_of[name] = file
            self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), entry["dtype"]
            if (dtype := FLOATS.get(entry["dtype"])) is not None:
                self._stored[name] = Stored(path, begin + entry["data_offsets"][0], self.shapes[name], dtype)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file."""
        return self._stored[name].read(index)

    def companions(self) -> dict[str, bytes]:
        """The contents of config.json and of the files that say how the model is used, by file name."""
        return {name: path.read_bytes() for name, path in companions_in(self.path).items()}


def companions_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """config.json and the files of a folder that say how the model is used, by their paths in it."""
    named = (folder / name for name in (CONFIG, *COMPANIONS))
    found = [*named, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def stored_in(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one .safetensors file, by name. Raises DataError; ConfigError if one is not of floats."""
    header, begin = _header(path)
    if not_floats := [name for name, entry in header.items() if entry["dtype"] not in FLOATS]:
        raise ConfigError(f"{path} holds {not_floats[0]}, which is not of floating-point numbers")
    return {
        name: Stored(path, begin + entry["data_offsets"][0], tuple(entry["shape"]), FLOATS[entry["dtype"]])
        for name, entry in header.items()
    }


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """{name: {dtype, shape, data_offsets}} of a .safetensors file, and where its data begins.

    Raises DataError if the library finds the file damaged; it does not tell the offsets.
    """
    try:
        with safetensors.safe_open(path, "numpy"), path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
    except (safetensors.SafetensorError, OSError) as e:
        raise DataError(f"{path} cannot be read: {e}; copy it again") from None
    header.pop("__metadata__", None)
    return header, 8 + size


def read_json(path: pathlib.Path, why: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError, which ends with `why` if the file does not exist."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {why}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content
