"""Makes a run of the weights in a folder of Hugging Face, or in a file of another system.

RUN/hf gets a copy of the weights, and a run without checkpoints begins with it (initial.py). No device is needed, and
memory holds a few rows of a tensor at a time, or a tensor of a file that cannot be read by rows.
"""

import logging
import os
import pathlib
import shlex

from data import tokenizers
from data.config import DataConfig
from data.errors import DataError
from data.storage import files
from data.tokenizers.base import Tokenizer
from model.families.layout import Layout, Read
from model.transformer import parameter_shapes
from trainer.config import Config, to_json
from trainer.errors import ConfigError
from trainer.interchange import checksums
from trainer.interchange.folder import KEPT
from trainer.interchange.safetensors_writer import FolderWriter, row_blocks
from trainer.interchange.source import Source

log = logging.getLogger("meshlm")
LONGEST_CONTEXT = 2048  # data.seq_len of a converted run is at most this, until it is trained with another one
DTYPES = {"F16": "float16", "BF16": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}  # others: float32


def as_run(source: Source, workdir: pathlib.Path, argv: list[str], tokenizer: Tokenizer | None = None) -> int:
    """Makes `workdir`, which must not exist, a run at step 0 with the weights of `source`.

    The folder gets its name when everything in it was written and read back.

    Args:
      tokenizer: that of the weights, if they come without one.

    Returns:
      the number of parameters.

    Raises:
      ConfigError: `workdir` exists, the weights do not fit the config.json, or they have another tokenizer.
      DataError: the weights are damaged, or were changed while they were read.
      CheckpointError: what was read back is not what was written.
      OSError: `workdir` cannot be written; what was written of it is deleted.
    """
    if os.path.lexists(workdir):
        raise ConfigError(f"{workdir} exists; name a --workdir that does not")
    layout = Layout(source.family, source.model, parameter_shapes(source.model))
    read = source.reader(layout)
    data = DataConfig(seq_len=min(source.model.max_seq_len, LONGEST_CONTEXT))
    config = Config(model=source.model, data=data, init_from=os.path.abspath(source.weights.path))
    with files.complete_folder(workdir, "converting") as folder:
        kept = folder / KEPT
        kept.mkdir()
        for name, content in source.weights.companions().items():
            (kept / name).parent.mkdir(exist_ok=True)
            (kept / name).write_bytes(content)
        _write_tokenizer(source, folder, tokenizer)
        _copy(source, layout, read, kept)
        (folder / "config.json").write_text(to_json(config))
        (folder / "command.txt").write_text(shlex.join(argv) + "\n")
    return layout.num_params


def _write_tokenizer(source: Source, folder: pathlib.Path, given: Tokenizer | None) -> None:
    try:
        own = tokenizers.in_folder(folder / KEPT)
    except DataError as e:
        raise DataError(str(e).replace(str(folder / KEPT), str(source.weights.path))) from None
    if given is not None and own is not None:
        raise ConfigError(f"{source.weights.path} has a tokenizer; leave --tokenizer out")
    if given is not None:  # training in place may change RUN/tokenizer; this one stays with the weights
        tokenizers.save(given, folder / KEPT / "tokenizer")
    if (tokenizer := own or given) is not None:
        tokenizers.save(tokenizer, folder / "tokenizer")
        rows, tokens = source.model.vocab_size, tokenizer.vocab_size
        if rows > tokens:
            log.info("%d rows of the embedding have no token; they are never predicted in a text", rows - tokens)
        elif rows < tokens:
            log.warning(
                "%d tokens of the tokenizer have no row in the embedding: prompts cannot have them", tokens - rows
            )
    else:
        log.info("%s has no tokenizer that can be read; --tokenizer=PATH names one", source.weights.path)


def _copy(source: Source, layout: Layout, read: Read, kept: pathlib.Path) -> None:
    """Copies the tensors to `kept`, with the checksums of the parameters that they are."""
    specs = {name: (DTYPES.get(source.dtype(name, layout), "float32"), shape) for name, shape in layout.shapes.items()}
    writer = FolderWriter(kept, specs)
    for name, shape in layout.shapes.items():
        rest = [slice(None)] * (len(shape) - 1)
        blocks = row_blocks(shape) if source.weights.by_rows else [slice(0, shape[0])]
        try:
            writer.write(name, (read(name, (rows, *rest)) for rows in blocks))
        except ValueError as e:
            raise ConfigError(f"{source.weights.path}: {e}; these weights are broken") from None
    writer.verify()
    source.check_unchanged()
    sums = checksums.of_tensors(layout, Source.open(kept).reader(layout))
    checksums.check(source.weights.path, sums)
    checksums.write(kept, sums)
