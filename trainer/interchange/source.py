"""Weights of other systems, whatever file holds them: their model, and any slice of its tensors. No JAX."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from data.errors import DataError
from model import families
from model.config import ModelConfig
from model.families import Json, Unsupported
from model.families.layout import Index, Layout, Read
from trainer.errors import ConfigError
from trainer.interchange.folder import Folder
from trainer.interchange.gguf_file import GgufFile
from trainer.interchange.llmc_file import LlmcFile
from trainer.interchange.nanogpt_file import NanoGptFile

SHOWN = 20  # how many problems of tensors a message lists; there may be thousands
COMPARED_BYTES = 64 << 20  # how much of two tables is compared at a time


class Weights(Protocol):
    """The tensors of a folder or file, under the names that Hugging Face gives them.

    Attributes:
      config: the model as a config.json describes it.
      shapes: the shape of each tensor, by name.
      dtypes: the dtype of each tensor, by name, as the file calls it.
      by_rows: whether rows of a tensor can be read without reading more.
    """

    path: pathlib.Path
    config: Json
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    by_rows: bool

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, as floating-point numbers."""

    def companions(self) -> dict[str, bytes]:
        """config.json and the files that say how the model is used: contents by file name."""


FILES: dict[str, Callable[[pathlib.Path], Weights]] = {".gguf": GgufFile, ".pt": NanoGptFile, ".bin": LlmcFile}


def opened(path: pathlib.Path) -> Weights:
    """The weights in a folder of Hugging Face, or in a file of another system. Raises ConfigError, DataError."""
    return Folder(path) if path.is_dir() else FILES.get(path.suffix, Folder)(path)


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights whose model is understood; they are not read yet.

    Attributes:
      unused: keys of the config.json that this program does not use.
      signature: of the files, when they were opened.
    """

    weights: Weights
    family: families.Family
    model: ModelConfig
    unused: list[str]
    signature: list[tuple]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Source":
        """Reads what describes the model. Raises ConfigError if it is not supported, DataError if a file is damaged."""
        signature = _signature(path)
        weights = opened(path)
        try:
            return cls(weights, *families.loaded(weights.config), signature)
        except Unsupported as e:
            raise ConfigError(f"{path if path.is_file() else path / 'config.json'}: {e}") from None

    def reader(self, layout: Layout) -> Read:
        """Reads slices of the tensors of `layout`. Raises ConfigError with a list of what is wrong with the tensors."""
        named: dict[str, str] = {}
        for name in self.weights.shapes:
            if (other := named.setdefault(self._full_name(name, layout), name)) != name:
                raise ConfigError(f"{self.weights.path} holds one tensor twice, as {other} and as {name}; remove one")
        problems = layout.problems({full: self.weights.shapes[name] for full, name in named.items()})
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ConfigError(f"{self.weights.path} is not a {self.family.model_type} of its config.json: "
                              f"{'; '.join(problems[:SHOWN])}{more}")  # fmt: skip
        self._check_tied(named)
        return lambda full, index: self.weights.read(named[full], index)

    def check_unchanged(self) -> None:
        """Raises DataError if a file was changed or replaced since it was opened: what was read may be a mixture."""
        if _signature(self.weights.path) != self.signature:
            raise DataError(f"{self.weights.path} was changed while it was read; try again when nothing writes there")

    def dtype(self, full: str, layout: Layout) -> str:
        """The dtype of a tensor of `layout`, as the file calls it."""
        dtypes = self.weights.dtypes
        return dtypes[full] if full in dtypes else next(dtypes[n] for n in dtypes if self._full_name(n, layout) == full)

    def _full_name(self, name: str, layout: Layout) -> str:
        """The tensor's name in a file of the whole model; a file of the bare model lacks the prefix."""
        return name if name in layout.shapes or layout.name(name) not in layout.shapes else layout.name(name)

    def _check_tied(self, named: dict[str, str]) -> None:
        """Raises ConfigError if the config says that the head is the embedding, but the file has another head."""
        head = named.get(families.HEAD)
        if not self.model.tie_embeddings or head is None:
            return
        table = named[self.family.prefix + self.family.tensors[0].theirs]
        if (shape := self.weights.shapes[head]) != self.weights.shapes[table]:
            raise ConfigError(
                f"{self.weights.path}: config.json ties the head to the embedding, but {head} is {list(shape)} and "
                f"{table} is {list(self.weights.shapes[table])}"
            )
        rows = max(1, COMPARED_BYTES // (4 * self.model.embed_dim))
        for first in range(0, self.model.vocab_size, rows):
            index = (slice(first, min(first + rows, self.model.vocab_size)), slice(None))
            if (self.weights.read(head, index) != self.weights.read(table, index)).any():
                raise ConfigError(
                    f"{self.weights.path}: config.json ties the head to the embedding, but {head} differs from "
                    f"{table}; set tie_word_embeddings to what the model was trained with"
                )


def _signature(path: pathlib.Path) -> list[tuple]:
    """What changes if a file of the weights is written or replaced."""
    try:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in files]
    except OSError:  # opening it reports what is wrong
        return []
    return [(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats]


def described(source: Source) -> list[str]:
    """Lines for the log about the tensors that were found."""
    dtypes: dict[str, int] = {}
    for dtype in source.weights.dtypes.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    lines = [f"{source.family.model_type}: {len(source.weights.shapes)} tensors, "
             + ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.items())]  # fmt: skip
    if source.unused:
        lines.append(f"not used of its config.json: {', '.join(source.unused)}")
    return lines
