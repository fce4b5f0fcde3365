"""The weights that a run begins with (config.init_from): those of another run, or of a folder of Hugging Face.

The architecture comes with them; how it is trained (dropout, dtype, remat, …) is the configuration's. A run that exists
keeps its own architecture, and its first weights are not read again. JAX is imported only when they are read.
"""

import dataclasses
import logging
import pathlib
import re
from typing import TYPE_CHECKING

from data import tokenizers
from data.errors import DataError
from data.tokenizers.base import Tokenizer
from model import families
from model.config import ModelConfig
from model.families import Unsupported
from model.families.base import OF_TRAINING
from model.families.layout import VOCAB_AXIS
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.interchange.folder import read_json
from trainer.interchange.gguf_file import GgufFile
from trainer.reliability import identity, run_directory

if TYPE_CHECKING:
    from trainer.state import Program

log = logging.getLogger("meshlm")
HF_CONFIG = "a folder of Hugging Face has one"


def place_of(init_from: str) -> tuple[pathlib.Path, int | None]:
    """The folder, and the step of a run; None: its newest, or no run. A folder's own name may end in :N."""
    path = pathlib.Path(init_from)
    match = re.fullmatch(r"(.+):(\d+)", init_from)
    return (path, None) if match is None or path.exists() else (pathlib.Path(match[1]), int(match[2]))


def is_run(path: pathlib.Path) -> bool:
    return (path / "checkpoints").is_dir()


def model_of(init_from: str) -> ModelConfig:
    """The model whose weights are there. Raises ConfigError."""
    path, step = place_of(init_from)
    if is_run(path):
        return run_directory.read_config(path).model
    if path.is_file() and path.suffix == ".gguf":
        return families.loaded(GgufFile(path).config)[1]
    if not path.is_dir() or step is not None:
        raise ConfigError(
            f"config.init_from = {init_from}: {path} is not a run directory, a folder with config.json or a .gguf file"
        )
    try:
        return families.loaded(read_json(path / "config.json", HF_CONFIG))[1]
    except Unsupported as e:
        raise ConfigError(f"config.init_from: {path / 'config.json'}: {e}") from None


def adopted(config: Config, run_dir: pathlib.Path) -> Config:
    """`config` with the architecture of the weights that the run began with, or is to begin with.

    Raises:
      ConfigError: there are none, or the run in `run_dir` began with others.
    """
    before = run_directory.read_config(run_dir) if run_directory.is_run(run_dir) else None
    if before is not None and before.init_from:
        if config.init_from not in ("", before.init_from):
            raise ConfigError(
                f"{run_dir} began from {before.init_from}, not from config.init_from = {config.init_from}; leave that "
                "out, or choose another --workdir"
            )
        return _with_model(dataclasses.replace(config, init_from=before.init_from), before.model)
    return _with_model(config, model_of(config.init_from)) if config.init_from else config


def _with_model(config: Config, model: ModelConfig) -> Config:
    chosen = {name: getattr(config.model, name) for name in OF_TRAINING}
    if model.position == "rope":  # positions that it has not seen, but can compute
        chosen["max_seq_len"] = max(model.max_seq_len, config.data.seq_len)
    return dataclasses.replace(config, model=dataclasses.replace(model, **chosen))


def check_tokenizer(config: Config, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if the ids of the run's tokenizer do not mean what the weights were trained with."""
    path, _ = place_of(config.init_from)
    theirs = _tokenizer_of(path)
    if theirs is None or tokenizer is None:
        log.warning("init_from: the tokenizer of %s cannot be compared with that of the data", path)
        return
    if identity.tokenizer_sha256(theirs) == identity.tokenizer_sha256(tokenizer):
        return
    for id in range(min(theirs.vocab_size, tokenizer.vocab_size)):
        if (one := _bytes(theirs, id)) != (other := _bytes(tokenizer, id)):
            raise ConfigError(
                f"config.init_from = {config.init_from} was trained with another tokenizer: token {id} is {one!r} "
                f"there and {other!r} in the data; prepare the data with --tokenizer={path}"
            )
    added = tokenizer.vocab_size - theirs.vocab_size
    log.info("init_from: the tokenizer of the data has the tokens of %s, and %d more", path, max(added, 0))


def _tokenizer_of(path: pathlib.Path) -> Tokenizer | None:
    if is_run(path):
        return tokenizers.load(path / "tokenizer") if (path / "tokenizer").exists() else None
    named = any((path / name).exists() for name in tokenizers.STANDARD_NAMES)
    return tokenizers.make(str(path)) if named else None


def _bytes(tokenizer: Tokenizer, id: int) -> bytes | None:
    try:
        return tokenizer.token_bytes(id)
    except DataError:  # an id without a token
        return None


def params_of(program: "Program") -> dict:
    """The parameters of config.init_from on the mesh of `program`, each process reading what its devices hold.

    Rows of tokens that the weights do not know are the mean of those that they know.

    Raises ConfigError, CheckpointError.
    """
    import jax

    from trainer.interchange.importing import Source
    from trainer.reliability.checkpoint import Checkpoints, choose_step
    from trainer.state import Program

    config = program.config
    path, step = place_of(config.init_from)
    if is_run(path):
        theirs = run_directory.read_config(path)
        # Their model on our mesh; what does not change its parameters is ours.
        model = dataclasses.replace(theirs.model, **{name: getattr(config.model, name) for name in OF_TRAINING})
        checkpoints = Checkpoints(path)
        step = choose_step(checkpoints, step)
        params, _ = checkpoints.restore_params(Program(dataclasses.replace(config, model=model), program.mesh), step)
        what = f"step {step} of {path}"
    else:
        source = Source.open(path)
        model, params = source.model, source.params(program)
        what = f"{path} ({source.family.model_type})"
    log.info("init_from %s: %s parameters; the optimizer is fresh", what, f"{program.num_params:,}")
    if config.model.vocab_size > model.vocab_size:
        added = config.model.vocab_size - model.vocab_size
        log.info("init_from: rows of %d new tokens are the mean of the other %d", added, model.vocab_size)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.params)
    fit = jax.jit(lambda params: _with_rows(params, model.vocab_size, config.model), out_shardings=shardings)
    return fit(params)


def _with_rows(params: dict, known: int, model: ModelConfig) -> dict:
    """`params` with tables of model.vocab_size rows, padded, of which the first `known` are given."""
    import jax.numpy as jnp
    from flax import traverse_util

    def one(path: str, table):
        if (axis := VOCAB_AXIS.get(path)) is None:
            return table
        rows = jnp.moveaxis(table, axis, 0)[:known]
        added, padding = model.vocab_size - known, model.padded_vocab_size - model.vocab_size
        new = jnp.broadcast_to(rows.mean(0), (added, rows.shape[1]))
        return jnp.moveaxis(jnp.concatenate([rows, new, jnp.zeros((padding, rows.shape[1]), rows.dtype)]), 0, axis)

    flat = traverse_util.flatten_dict(params, sep=".")
    return traverse_util.unflatten_dict({path: one(path, leaf) for path, leaf in flat.items()}, sep=".")
