"""Weights from a folder of Hugging Face, each device reading its own shards, and the run that they become."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
from flax import traverse_util

from data import tokenizers
from model import families
from model.config import ModelConfig
from model.families import Unsupported
from model.families.layout import Index, Layout
from trainer.errors import ConfigError
from trainer.interchange.folder import Folder
from trainer.state import Program

log = logging.getLogger("meshlm")
SHOWN = 20  # problems of tensors that are listed; there may be thousands


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder whose model is understood; its weights are not read yet.

    Attributes:
      unused: keys of its config.json that mean nothing here.
    """

    folder: Folder
    family: families.Family
    model: ModelConfig
    unused: list[str]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Source":
        """Raises ConfigError."""
        folder = Folder(path)
        try:
            return cls(folder, *families.loaded(folder.config))
        except Unsupported as e:
            raise ConfigError(f"{path / 'config.json'}: {e}") from None

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """That of the folder, if it has one. Raises DataError if it cannot be read."""
        if not any((self.folder.path / name).exists() for name in tokenizers.STANDARD_NAMES):
            return None
        return tokenizers.make(str(self.folder.path))

    def params(self, program: Program) -> dict:
        """The parameters on the mesh of `program`, whose model is this one. Raises ConfigError, with all problems."""
        abstract = traverse_util.flatten_dict(program.params)
        shapes = {".".join(path): leaf.shape for path, leaf in abstract.items()}
        layout = Layout(self.family, self.model, shapes)
        named = {self._full_name(name, layout): name for name in self.folder.shapes}
        problems = layout.problems({full: self.folder.shapes[name] for full, name in named.items()})
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ConfigError(f"{self.folder.path} is not a {self.family.model_type} of its config.json: "
                              f"{'; '.join(problems[:SHOWN])}{more}")  # fmt: skip

        def read(full: str, index: Index):
            return self.folder.read(named[full], index)

        self._check_tied(named)

        def one(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = ".".join(path)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: layout.parameter(read, name, index)
            )

        return traverse_util.unflatten_dict({path: one(path, leaf) for path, leaf in abstract.items()})

    def _full_name(self, name: str, layout: Layout) -> str:
        """The name in files of the whole model; those of the bare one lack its prefix."""
        return name if name in layout.shapes or layout.name(name) not in layout.shapes else layout.name(name)

    def _check_tied(self, named: dict[str, str]) -> None:
        """Raises ConfigError if the config says that the head is the embedding, and the file has another one."""
        head = named.get(families.HEAD)
        if not self.model.tie_embeddings or head is None:
            return
        table = named[self.family.prefix + self.family.tensors[0].theirs]
        rows = max(1, (64 << 20) // (4 * self.model.embed_dim))
        for first in range(0, self.model.vocab_size, rows):
            index = (slice(first, first + rows), slice(None))
            if (self.folder.read(head, index) != self.folder.read(table, index)).any():
                raise ConfigError(
                    f"{self.folder.path}: config.json ties the head to the embedding, but {head} differs from {table}; "
                    "set tie_word_embeddings to what the model was trained with"
                )


def describe(source: Source) -> list[str]:
    """Lines on what was found, for the log."""
    dtypes: dict[str, int] = {}
    for dtype in source.folder.dtypes.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    lines = [f"{source.family.model_type}: {len(source.folder.shapes)} tensors, "
             + ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.items())]  # fmt: skip
    if source.unused:
        lines.append(f"not used of its config.json: {', '.join(source.unused)}")
    return lines


def numbers(source: Source) -> dict[str, Any]:
    """What the meta of a checkpoint says of where its weights are from."""
    return {"path": str(source.folder.path.resolve()), "family": source.family.model_type}
