"""Makes a run of the weights in a folder of Hugging Face or a .gguf file; each device reads only its shards."""

import dataclasses
import json
import logging
import os
import pathlib
import shlex
from typing import Any

import jax
from flax import traverse_util

from data import tokenizers
from data.config import DataConfig
from data.errors import DataError
from data.storage import files
from model import families
from model.config import ModelConfig
from model.families import Unsupported
from model.families.layout import Index, Layout
from trainer import sharding
from trainer.config import Config, MeshConfig, to_json
from trainer.errors import CheckpointError, ConfigError
from trainer.interchange.folder import KEPT, Folder
from trainer.interchange.gguf_file import GgufFile
from trainer.reliability import identity
from trainer.reliability.checkpoint import Checkpoints
from trainer.state import Program

log = logging.getLogger("meshlm")
LONGEST_CONTEXT = 2048  # data.seq_len of a converted run is at most this, until it is trained with another one
SHOWN = 20  # how many problems of tensors a message lists; there may be thousands


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of Hugging Face or a .gguf file whose model is understood; its weights are not read yet.

    Attributes:
      unused: keys of its config.json that this program does not use.
    """

    folder: Folder | GgufFile
    family: families.Family
    model: ModelConfig
    unused: list[str]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Source":
        """Reads what describes the model. Raises ConfigError if it is not supported."""
        folder = GgufFile(path) if path.suffix == ".gguf" else Folder(path)
        try:
            return cls(folder, *families.loaded(folder.config))
        except Unsupported as e:
            raise ConfigError(f"{path if path.is_file() else path / 'config.json'}: {e}") from None

    def params(self, program: Program) -> dict:
        """The parameters on the mesh of `program`, which has this model. Raises ConfigError with a list of problems."""
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
                leaf.shape, leaf.sharding, lambda index: layout.parameter(read, name, index or ())
            )

        return traverse_util.unflatten_dict({path: one(path, leaf) for path, leaf in abstract.items()})

    def _full_name(self, name: str, layout: Layout) -> str:
        """The tensor's name in a file of the whole model; a file of the bare model lacks the prefix."""
        return name if name in layout.shapes or layout.name(name) not in layout.shapes else layout.name(name)

    def _check_tied(self, named: dict[str, str]) -> None:
        """Raises ConfigError if the config says that the head is the embedding, but the file has another head."""
        head = named.get(families.HEAD)
        if not self.model.tie_embeddings or head is None:
            return
        table = named[self.family.prefix + self.family.tensors[0].theirs]
        rows = max(1, (64 << 20) // (4 * self.model.embed_dim))
        for first in range(0, self.model.vocab_size, rows):
            index = (slice(first, min(first + rows, self.model.vocab_size)), slice(None))
            if (self.folder.read(head, index) != self.folder.read(table, index)).any():
                raise ConfigError(
                    f"{self.folder.path}: config.json ties the head to the embedding, but {head} differs from {table}; "
                    "set tie_word_embeddings to what the model was trained with"
                )


def describe(source: Source) -> list[str]:
    """Lines for the log about the tensors that were found."""
    dtypes: dict[str, int] = {}
    for dtype in source.folder.dtypes.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    lines = [f"{source.family.model_type}: {len(source.folder.shapes)} tensors, "
             + ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.items())]  # fmt: skip
    if source.unused:
        lines.append(f"not used of its config.json: {', '.join(source.unused)}")
    return lines


def numbers(source: Source) -> dict[str, Any]:
    """What a checkpoint's metadata records about the origin of its weights."""
    return {"path": str(source.folder.path.resolve()), "family": source.family.model_type}


def as_run(source: Source, workdir: pathlib.Path, argv: list[str]) -> Program:
    """Makes `workdir`, which must not exist, a run at step 0 with the weights of `source` and a fresh optimizer.

    The folder gets its name when everything in it is written and the checkpoint was read back.

    Raises:
      ConfigError: `workdir` exists, or the weights do not fit the config.json.
      CheckpointError: `workdir` cannot be written, or what was read back is not what was written.
    """
    if workdir.exists():
        raise ConfigError(f"{workdir} exists; name a --workdir that does not")
    config = config_of(source)
    program = Program(config, sharding.make_mesh(_sharded(config)))
    jax.set_mesh(program.mesh)
    with files.complete_folder(workdir, "converting") as folder:
        _write_run(source, program, folder, argv)
    return program


def config_of(source: Source) -> Config:
    """The configuration of a run with this model that has not seen any data."""
    data = DataConfig(seq_len=min(source.model.max_seq_len, LONGEST_CONTEXT))
    return Config(model=source.model, data=data, init_from=os.path.abspath(source.folder.path))


def _sharded(config: Config) -> Config:
    """`config` with the parameters split over all devices, if their shapes allow it."""
    try:
        split = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
        sharding.make_mesh(split)
        return split
    except ConfigError:
        return config


def _write_run(source: Source, program: Program, folder: pathlib.Path, argv: list[str]) -> None:
    kept = folder / KEPT
    kept.mkdir()
    for name, content in source.folder.companions().items():
        (kept / name).write_bytes(content)
    try:
        tokenizer = tokenizers.in_folder(kept)
    except DataError as e:
        raise DataError(str(e).replace(str(kept), str(source.folder.path))) from None
    if tokenizer is None:
        log.info("%s has no tokenizer that can be read: text needs config.data.tokenizer_path", source.folder.path)
    config, state = program.config, program.init_with(source.params(program))
    meta = {
        "samples": 0, "data_fingerprint": None, "tokenizer_sha256": identity.tokenizer_sha256(tokenizer),
        "config": json.loads(to_json(config)), "jax": jax.__version__, "converted_from": numbers(source),
    }  # fmt: skip
    checkpoints = Checkpoints(folder, config.checkpoint)
    checkpoints.save(0, state, meta)
    if not checkpoints.wait() or checkpoints.failed:
        raise CheckpointError(f"the weights could not be saved in {folder.parent}; see the error above")
    del state
    Checkpoints(folder).restore_params(program, 0)  # compares checksums with those of the arrays that were saved
    files.write_durably(folder / "config.json", to_json(config).encode())
    if tokenizer is not None:
        tokenizers.save(tokenizer, folder / "tokenizer")
    (folder / "command.txt").write_text(shlex.join(argv) + "\n")
