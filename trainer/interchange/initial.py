"""The weights that a run begins with: its own copy in RUN/hf (launch.convert made the run), or config.init_from, which
names another run, a folder of Hugging Face, or a file of another system.

They decide the architecture; the configuration decides how it is trained (dropout, dtype, remat, …). A run that exists
keeps its own architecture, and its first weights are not read again. JAX is imported only when weights are read.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from data import tokenizers
from data.errors import DataError
from data.storage import files
from data.tokenizers.base import Tokenizer
from model.config import LoraConfig, ModelConfig
from model.families.base import OF_TRAINING
from model.families.layout import VOCAB_AXIS, Layout
from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError
from trainer.interchange import checksums, peft
from trainer.interchange.folder import CHECKSUMS, KEPT, companions_in, is_run
from trainer.interchange.source import Source, opened
from trainer.reliability import identity, reading, restarts, run_directory

if TYPE_CHECKING:
    from trainer.reliability.coordination import Processes
    from trainer.state import Program

SAVED = ("checkpoints", "quarantine")  # folders of a run with its steps
log = logging.getLogger("meshlm")


def place_of(init_from: str) -> tuple[pathlib.Path, int | None]:
    """The absolute path, and the step; None: a run's newest, or not a run. An existing path may itself end in :N."""
    match = re.fullmatch(r"(.+):(\d+)", init_from)
    if match is None or os.path.exists(init_from):
        return pathlib.Path(os.path.abspath(init_from)), None
    return pathlib.Path(os.path.abspath(match[1])), int(match[2])


def own_weights(run_dir: pathlib.Path) -> pathlib.Path | None:
    """RUN/hf, if launch.convert made the run in `run_dir`: the weights of its step 0."""
    return run_dir / KEPT if os.path.exists(run_dir / KEPT / CHECKSUMS) else None


def is_untrained(run_dir: pathlib.Path) -> bool:
    """Whether launch.convert made the run in `run_dir`, and it has never saved a step (which may be lost by now)."""
    if own_weights(run_dir) is None or os.path.exists(run_dir / "saved_step"):
        return False
    return not any(os.path.isdir(run_dir / name) and os.listdir(run_dir / name) for name in SAVED)


def place_for(config: Config, run_dir: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Where the first weights of the run in `run_dir` are: as place_of."""
    own = own_weights(run_dir)
    return (own, None) if own is not None else place_of(config.init_from)


def is_needed(run_dir: pathlib.Path) -> bool:
    """Whether the run in `run_dir` has no checkpoint yet, and so begins with config.init_from. Raises Unreadable."""
    return identity.newest_meta(run_dir / "checkpoints") is None


def model_of(init_from: str) -> ModelConfig:
    """The model whose weights `init_from` names. Raises ConfigError."""
    path, step = place_of(init_from)
    if is_run(path):
        return run_directory.read_config(path).model
    if not os.path.exists(path) or step is not None:
        raise ConfigError(
            f"config.init_from = {init_from}: {path} is not a run directory, a folder with config.json, or a .gguf, "
            ".pt or .bin file"
        )
    return Source.open(path).model


def adopted(config: Config, run_dir: pathlib.Path, before: Config | None) -> Config:
    """`config` with the architecture of the weights that the run began with, or is to begin with.

    Args:
      before: the configuration of the run in `run_dir`; None for a new run.

    Raises:
      ConfigError: there are no such weights, or the run in `run_dir` began with others.
      Unreadable: the run directory cannot be read just now.
    """
    if before is not None and before.init_from and (own_weights(run_dir) or not is_needed(run_dir)):
        if config.init_from and not _same_place(config.init_from, before.init_from):
            raise ConfigError(
                f"{run_dir} began from {before.init_from}, not from config.init_from = {config.init_from}; leave that "
                "out, or choose another --workdir"
            )
        config = dataclasses.replace(config, init_from=before.init_from)
        return _adopting(_with_adapters(config, run_dir, before, before.model), before.model)
    if before is not None and not before.init_from and config.init_from and not is_needed(run_dir):
        raise ConfigError(
            f"{run_dir} did not begin from other weights; leave config.init_from out, or choose another --workdir"
        )
    init_from = config.init_from or (before.init_from if before is not None else "")
    if not init_from:
        if config.model.lora.rank or config.init_adapters:
            raise ConfigError("config.model.lora trains adapters of a model: name its weights by --config.init_from")
        return config
    model = model_of(init_from)
    config = _with_adapters(config, run_dir, before, model)
    return _adopting(dataclasses.replace(config, init_from=_fixed(init_from)), model)


def _with_adapters(config: Config, run_dir: pathlib.Path, before: Config | None, model: ModelConfig) -> Config:
    """`config` with the adapters of `model` that the run began with, or is to begin with. Raises ConfigError."""
    recorded = before.init_adapters if before is not None else ""
    given = os.path.abspath(config.init_adapters) if config.init_adapters else recorded
    if before is not None and not is_needed(run_dir):  # the folder is not read again, and may be gone
        if given != recorded:
            raise ConfigError(
                f"{run_dir} began with {recorded or 'no adapters of a folder'}, not with config.init_adapters = "
                f"{given}; leave that out, or choose another --workdir"
            )
        config = dataclasses.replace(config, init_adapters=recorded)
        return _with_lora(config, before.model.lora) if recorded else config
    config = dataclasses.replace(config, init_adapters=given)
    return _with_lora(config, peft.read(pathlib.Path(given), model)[0]) if given else config


def sha256_of_adapters(config: Config) -> str:
    """Of the file of config.init_adapters; '' if there is none."""
    if not config.init_adapters:
        return ""
    return hashlib.sha256((pathlib.Path(config.init_adapters) / peft.TENSORS).read_bytes()).hexdigest()


def _with_lora(config: Config, lora: LoraConfig) -> Config:
    """`config` with these adapters, except their dropout. Raises ConfigError if it names others."""
    given = config.model.lora
    lora = dataclasses.replace(lora, dropout=given.dropout)
    if given.rank and given != lora:
        raise ConfigError(
            f"config.model.lora is {given}, but config.init_adapters = {config.init_adapters} has {lora}; leave all "
            "except its dropout out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


def _fixed(init_from: str) -> str:
    """`init_from` with an absolute path, and with a step if it is a run, which may still train. Raises ConfigError."""
    path, step = place_of(init_from)
    if not is_run(path):
        return str(path)
    if own_weights(path) is not None and (step == 0 or (step is None and is_untrained(path))):
        return str(path / KEPT)
    newest = reading.writing(lambda: restarts.newest_committed(path), path, "cannot read")
    chosen = newest if step is None else step
    if not os.path.exists(path / "checkpoints" / str(chosen) / restarts.METADATA_FILE):
        raise ConfigError(
            f"config.init_from = {init_from}: {path} has no checkpoint at step {chosen}; its newest is {newest}"
        )
    return f"{path}:{chosen}"


def _same_place(given: str, recorded: str) -> bool:
    (path, step), (before, at) = place_of(given), place_of(recorded)
    return (path == before and step in (None, at)) or (path / KEPT == before and not step)


def _adopting(config: Config, model: ModelConfig) -> Config:
    """with_model, and a line in the log about what of config.model does not count."""
    default, given = vars(ModelConfig()), vars(config.model)
    lost = [f"{name} = {given[name]}" for name in given if name not in OF_TRAINING and name != "max_seq_len"
            and given[name] not in (default[name], getattr(model, name))]  # fmt: skip
    if lost:
        log.info("init_from: the model is that of the weights, so these do not count: %s", ", ".join(lost))
    return with_model(config, model)


def with_model(config: Config, model: ModelConfig) -> Config:
    """`config` with the architecture of `model`, and its own values of the fields of training."""
    chosen = {name: getattr(config.model, name) for name in OF_TRAINING}
    if model.position == "rope":  # RoPE can compute positions that the model was not trained on
        chosen["max_seq_len"] = max(model.max_seq_len, config.data.seq_len)
    return dataclasses.replace(config, model=dataclasses.replace(model, **chosen))


def keep_companions(config: Config, run_dir: pathlib.Path) -> None:
    """Copies the files that say how the model is used to RUN/hf of a new run, from which an export takes them.

    Raises ConfigError, DataError, Unreadable.
    """
    if own_weights(run_dir) is not None:
        return
    path, _ = place_of(config.init_from)
    if is_run(path):
        found = {name: path.read_bytes() for name, path in companions_in(path / KEPT).items()}
    else:
        found = opened(path).companions()

    def write() -> None:
        for name, content in found.items():
            (run_dir / KEPT / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_durably(run_dir / KEPT / name, content)

    reading.writing(write, run_dir, f"cannot write to --workdir={run_dir}:")


def check_tokenizer(config: Config, run_dir: pathlib.Path, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if the ids of the run's tokenizer do not mean what the weights were trained with."""
    path, _ = place_for(config, run_dir)
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
    if (added := tokenizer.vocab_size - theirs.vocab_size) < 0:
        raise ConfigError(
            f"config.init_from = {config.init_from} was trained with {-added} tokens more than the data's tokenizer "
            f"has; prepare the data with --tokenizer={path}"
        )
    log.info("init_from: the tokenizer of the data has the tokens of %s, and %d more", path, added)


def _tokenizer_of(path: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of the weights; None if they come without one."""
    if (path / "tokenizer").is_dir():  # of a run, or of converted weights
        return tokenizers.load(path / "tokenizer")
    if path.is_dir():
        return None if is_run(path) else tokenizers.in_folder(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in opened(path).companions().items():
            (pathlib.Path(folder) / name).parent.mkdir(exist_ok=True)
            (pathlib.Path(folder) / name).write_bytes(content)
        return tokenizers.in_folder(pathlib.Path(folder))


def _bytes(tokenizer: Tokenizer, id: int) -> bytes | None:
    try:
        return tokenizer.token_bytes(id)
    except DataError:  # an id without a token
        return None


def params_of(program: "Program", run_dir: pathlib.Path, tokenizer: Tokenizer | None, processes: "Processes") -> dict:
    """The first parameters of the run in `run_dir`, on the mesh of `program`: each process reads what its devices hold.

    If `tokenizer` has tokens that the weights were not trained with, their rows are the mean of the other tokens' rows.

    Adapters are among them only if config.init_adapters names some. Raises ConfigError, CheckpointError, DataError.
    """
    import jax
    from flax import traverse_util

    config = program.config
    path, step = place_for(config, run_dir)
    if is_run(path):
        model, params, step = _of_run(path, step, program, processes)
        what = f"step {step} of {path}"
    else:
        source = Source.open(path)
        model, params = source.model, read(source, program)
        what = f"{path} ({source.family.model_type})"
    log.info("init_from %s: %s parameters; the optimizer is fresh", what, f"{program.num_params:,}")
    before = _tokenizer_of(path)
    known = model.vocab_size if before is None else min(model.vocab_size, before.vocab_size)
    new = range(known, known if tokenizer is None else max(known, tokenizer.vocab_size))
    if new:
        log.info("init_from: the rows of %d new tokens are the mean of the other %d", len(new), known)
        if lost := [path for path in VOCAB_AXIS if path in _abstract(program) and not config.trains(path)]:
            log.warning("the rows of new tokens stay what they are: %s is not trained", " and ".join(lost))
    wanted = traverse_util.unflatten_dict(_abstract(program), sep=".")
    if new or jax.tree.map(jax.numpy.shape, params) != jax.tree.map(jax.numpy.shape, wanted):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        params = jax.jit(lambda params: _with_rows(params, new, config.model), out_shardings=shardings)(params)
    return _with_arrays(params, program) if config.init_adapters else params


def _with_arrays(params: dict, program: "Program") -> dict:
    """`params` with the adapters of config.init_adapters."""
    import jax
    from flax import traverse_util

    config, flat = program.config, traverse_util.flatten_dict(params, sep=".")
    _, arrays = peft.read(pathlib.Path(config.init_adapters), config.model)
    abstract = traverse_util.flatten_dict(program.params, sep=".")
    flat |= {
        path: jax.make_array_from_callback(array.shape, abstract[path].sharding, array.__getitem__)
        for path, array in arrays.items()
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def _of_run(
    path: pathlib.Path, step: int | None, program: "Program", processes: "Processes"
) -> tuple[ModelConfig, dict, int]:
    """The model and the parameters of another run's step, on our mesh, with our values of the fields of training."""
    from trainer.interchange.adapters import Reader
    from trainer.reliability.checkpoint import Checkpoints, choose_step

    config, theirs = program.config, run_directory.read_config(path)
    chosen = {name: getattr(config.model, name) for name in OF_TRAINING} | {"lora": theirs.model.lora}
    model = dataclasses.replace(theirs.model, **chosen)
    checkpoints = Checkpoints(path, processes=processes)
    try:
        step = choose_step(checkpoints, step)
    except CheckpointError as e:
        raise ConfigError(f"config.init_from = {config.init_from}: {e}") from None
    reader = Reader(dataclasses.replace(config, model=model, frozen=()), program.mesh, checkpoints, step)
    return model, reader.read(), step


def read(source: Source, program: "Program", only: Iterable[str] | None = None) -> dict:
    """The parameters of `source` on the mesh of `program`.

    Args:
      only: the dotted paths of the parameters to read; None: all.

    Raises:
      ConfigError: the tensors are not those of the model; the message lists what is wrong.
      DataError: they are not what launch.convert copied.
    """
    import jax
    from flax import traverse_util

    from trainer.reliability.checkpoint import checksums_by_name

    abstract = _abstract(program)
    layout = Layout(source.family, source.model, {path: leaf.shape for path, leaf in abstract.items()})
    reader = source.reader(layout)

    def one(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: layout.parameter(reader, path, index or ())
        )

    flat = {path: one(path, leaf) for path, leaf in abstract.items() if only is None or path in only}
    params = traverse_util.unflatten_dict(flat, sep=".")
    source.check_unchanged()
    if source.weights.path.is_dir():
        checksums.check(source.weights.path, checksums_by_name(params))
    return params


def _abstract(program: "Program") -> dict[str, Any]:
    """The shapes and shardings, by dotted path, of the parameters that come from weights: all except adapters."""
    from flax import traverse_util

    from model.transformer import without_adapters

    return without_adapters(traverse_util.flatten_dict(program.params, sep="."))


def _with_rows(params: dict, new: range, model: ModelConfig) -> dict:
    """`params` with as many rows in its tables as `model` has. The rows `new` are the mean of the rows before them."""
    import jax.numpy as jnp
    from flax import traverse_util

    def one(path: str, table):
        if (axis := VOCAB_AXIS.get(path)) is None:
            return table
        rows = jnp.moveaxis(table, axis, 0)
        rows = jnp.pad(rows, [(0, max(0, model.padded_vocab_size - len(rows))), (0, 0)])[: model.padded_vocab_size]
        if new:
            rows = rows.at[new.start : new.stop].set(rows[: new.start].mean(0))
        return jnp.moveaxis(rows, 0, axis)

    flat = traverse_util.flatten_dict(params, sep=".")
    return traverse_util.unflatten_dict({path: one(path, leaf) for path, leaf in flat.items()}, sep=".")
