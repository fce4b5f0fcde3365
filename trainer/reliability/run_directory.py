"""The run directory: the resolved configuration, its comparison with the run's own, and what a start records.

    RUN/config.json  command.txt  environment.json  tokenizer/  metrics.jsonl  tensorboard/  samples.jsonl
    RUN/log.<process>.txt  checkpoints/<step>/

No heavy imports: all of this is checked before JAX is loaded, so that a mistake is reported at once.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from data import sources, tokenizers
from data.config import Task
from data.errors import DataError
from data.storage import files, remote
from data.token_files import ends
from trainer import schedule
from trainer.config import Config, changes, complete, from_dict, to_json
from trainer.errors import ConfigError
from trainer.reliability import identity, reading, restarts

log = logging.getLogger("meshlm")
NOT_USABLE = "--workdir={} cannot be used:"
# Prefixes of files that may exist if the first start was killed before it wrote config.json.
BEFORE_A_RUN = (".lock", "config.json.writing", "lives.")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml-collections")


def resolve(config: Config) -> Config:
    """`config` with the values that depend on the dataset filled in: vocabulary, longest context, end of text.

    Raises:
      DataError: the dataset does not exist (the message has the command that prepares it) or cannot be used.
      ConfigError: `config` contradicts the dataset.
    """
    if not config.data.path:
        raise ConfigError("config.data.path is not set; name a dataset folder made by python -m launch.prepare")
    model = config.model
    try:
        found = sources.open_sources(config.data, vocab_size(config))
    except FileNotFoundError as e:
        folder = pathlib.Path(str(e))
        source = config.data.source or "PATH"
        raise DataError(
            f"{folder} is not a prepared dataset; prepare it with: python -m launch.prepare "
            f"--source={source} --tokenizer={config.data.tokenizer} --out={folder}"
            + r" (a comma separates datasets; write \, for one in a name)"
            * ("," in config.data.path)
        ) from None
    known = found.vocab_size
    if not known:
        raise ConfigError(
            f"config.model.vocab_size is not set, and {config.data.path} does not have it; set it (the largest id seen "
            f"is {found.largest_id}), or name the tokenizer with config.data.tokenizer_path"
        )
    if config.init_from:  # weights may have, or get, more rows than the tokenizer has tokens
        known = max(known, model.vocab_size)
    elif model.vocab_size not in (0, known):
        raise ConfigError(
            f"config.model.vocab_size is {model.vocab_size}, but the tokenizer {found.tokenizer_path} has "
            f"{known} tokens; leave it 0"
        )
    config = _with_task(config, found.task)
    by_token = (config.data.mask_documents or config.data.packed) and not found.are_chats
    eos_id = found.eos_id() if by_token else None
    config = complete(config, vocab_size=known, eos_id=eos_id)
    data = config.data
    if data.packed and data.eos_id not in (-1, eos_id):
        raise ConfigError(
            f"config.data.eos_id is {data.eos_id}, but documents of {data.path} end with {eos_id}; leave it -1"
        )
    if data.mask_documents and by_token and not 0 <= data.eos_id < known:
        raise ConfigError(
            f"config.data.mask_documents needs the token that ends a document: {data.path} has none; set "
            f"config.data.eos_id to a token below {known}"
        )
    if data.mask_documents and by_token:
        ends.check_documents_end(found.datasets.values(), data.eos_id)
    return config


def _with_task(config: Config, task: Task) -> Config:
    """`config` with the task of its dataset. Raises ConfigError if it names another, or cannot do this one."""
    if config.task not in (None, task):
        raise ConfigError(f"config.task is {config.task}, but {config.data.path} is for {task}; leave it out")
    if task == "dpo" and config.z_loss:
        raise ConfigError(f"config.z_loss is {config.z_loss}; for dpo it must be 0")
    return dataclasses.replace(config, task=task)


def vocab_size(config: Config) -> int:
    """The vocabulary size to open the data with; 0: that of the tokenizer, since weights may have more rows."""
    return 0 if config.init_from and config.data.tokenizer_path else config.model.vocab_size


def read_config(run_dir: pathlib.Path) -> Config:
    """The configuration of an existing run: config.json or, if that is lost, the copy in the newest checkpoint.

    Raises ConfigError, Unreadable.
    """
    check_links(run_dir)
    path = run_dir / "config.json"
    try:
        if (text := _text(path)) is not None:
            return from_dict(json.loads(text), recorded=True)
        problem = f"{run_dir} is not a run directory: it has no config.json; name one with --workdir"
    except (ValueError, RecursionError) as e:
        problem = f"{path} is damaged ({e}), and no checkpoint has a copy; choose another --workdir"
    if (meta := identity.newest_meta(run_dir / "checkpoints")) is None:
        raise ConfigError(problem)
    log.warning("%s is lost or damaged; using the copy in the newest checkpoint", path)
    return from_dict(meta["config"], recorded=True)


def check_links(run_dir: pathlib.Path) -> None:
    """Checks the symlinks on the paths of the run and its checkpoints, which may lead to a disk that is not mounted.

    Raises:
      ConfigError: a link is broken.
      Unreadable: the path cannot be read just now.
    """
    for path in (*run_dir.absolute().parents, run_dir, run_dir / "checkpoints"):
        if os.path.islink(path) and not reading.writing(functools.partial(reading.is_there, path), path):
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}, which cannot be reached; bring that back, or remove the link"
            )


def config_of_run(run_dir: pathlib.Path) -> Config | None:
    """The configuration of the run in `run_dir`; None if nothing was started there.

    Raises:
      ConfigError: something else is in `run_dir`, or it is damaged.
      Unreadable: the run directory cannot be read just now.
    """
    check_links(run_dir)
    exists = reading.writing(lambda: is_run(run_dir), run_dir, NOT_USABLE.format(run_dir))
    return read_config(run_dir) if exists else None


def check_changes(run_dir: pathlib.Path, config: Config, before: Config | None, allow: bool) -> Config:
    """Compares `config` with the configuration of the run in `run_dir`, if there is one.

    Returns `config` with a fixed length of the schedule: the length that the run started with, unless `config` sets it.

    Args:
      before: what config_of_run returns.
      allow: accept changes that need --allow_config_change.

    Raises:
      ConfigError: the run cannot be resumed with `config`; the message names the fields that differ.
      Unreadable: the run directory cannot be read just now.
    """
    if before is None or not before.data.path:  # launch.convert made the run, and nothing was trained yet
        return schedule.fixed(config)
    before = schedule.fixed(before)
    config = schedule.fixed(config, before)
    found = changes(before, config)
    step = reading.writing(lambda: restarts.newest_committed(run_dir), run_dir, NOT_USABLE.format(run_dir))
    old, new = (schedule.learning_rate(c.optimizer, c.num_train_steps, step) for c in (before, config))
    if step and not math.isclose(old, new, rel_tol=1e-6):
        found["flag"].append(f"the learning rate of step {step + 1}: {old:.4g} -> {new:.4g}")
    if found["refused"]:
        raise ConfigError(
            f"{run_dir} was started with another configuration; {'; '.join(found['refused'])}; "
            "undo the change or choose another --workdir"
        )
    if found["flag"] and not allow:
        raise ConfigError(
            f"{run_dir} was started with other settings; {'; '.join(found['flag'])}; "
            "undo the change, or pass --allow_config_change to resume with it"
        )
    for line in found["harmless"] + found["flag"]:
        log.info("changed   %s", line)
    return config


def check_mirror(run_dir: pathlib.Path, mirror: str) -> None:
    """Raises ConfigError if the mirror is in the run directory, because both would be lost together."""
    if mirror and not remote.is_remote(mirror):
        place, own = pathlib.Path(mirror).resolve(), run_dir.resolve()
        if own in (place, *place.parents):
            raise ConfigError(
                f"config.checkpoint.mirror = {mirror} is in the run directory {run_dir} itself; name a folder "
                "elsewhere, or gs://… or s3://…"
            )


def is_run(run_dir: pathlib.Path) -> bool:
    """Whether `run_dir` has a run; False if it is missing or empty. Raises ConfigError for other files, OSError."""
    if reading.is_there(run_dir / "config.json") or identity.newest_meta(run_dir / "checkpoints") is not None:
        return True
    if reading.is_there(run_dir) and not all(p.name.startswith(BEFORE_A_RUN) for p in run_dir.iterdir()):
        raise ConfigError(f"{run_dir} exists, is not empty and is not a run directory; choose another --workdir")
    return False


def record(
    run_dir: pathlib.Path,
    config: Config,
    data: sources.Sources,
    argv: list[str],
    numbers: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes config.json, tokenizer/ (if there is one) and environment.json, and appends the command to command.txt.

    Args:
      numbers: settings that losses depend on but that are not in the configuration; they go into environment.json.

    Raises ConfigError or Unreadable if a file cannot be written.
    """
    reading.writing(
        lambda: _record(run_dir, config, data, argv, numbers), run_dir, f"cannot write to --workdir={run_dir}:"
    )


def recorded(run_dir: pathlib.Path) -> str:
    """The text of environment.json from the last start, which processes compare. Raises ConfigError, Unreadable."""
    text = _text(run_dir / "environment.json")
    if text is None:
        raise ConfigError(
            f"--workdir={run_dir} is not the same folder for all processes; name one on a shared file system"
        )
    return text


def _text(path: pathlib.Path) -> str | None:
    """The content of a file; None if it is missing. Raises ConfigError, Unreadable."""
    return reading.writing(lambda: path.read_text() if reading.is_there(path) else None, path, "cannot read")


def _record(
    run_dir: pathlib.Path, config: Config, data: sources.Sources, argv: list[str], numbers: Mapping[str, Any]
) -> None:
    files.write_durably(run_dir / "config.json", to_json(config).encode())
    tokenizer = data.load_tokenizer()
    if tokenizer is not None and not _has_tokenizer(run_dir, tokenizer):
        tokenizers.save(tokenizer, run_dir / "tokenizer")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = {
        "time": now,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "numbers": dict(numbers),
        **_commit(),
    }
    files.write_durably(run_dir / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
    with (run_dir / "command.txt").open(
        "a", encoding="utf-8", errors="backslashreplace"
    ) as f:  # last, because a retry repeats all steps of this function
        f.write(f"{now} {shlex.join(argv)}\n")


def _has_tokenizer(run_dir: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> bool:
    try:
        there = tokenizers.load(run_dir / "tokenizer")
    except DataError:  # the tokenizer is missing or damaged
        return False
    return identity.tokenizer_sha256(there) == identity.tokenizer_sha256(tokenizer)


def _commit() -> dict[str, str | None]:
    """The commit of this code, with '+' if files have changed since; without a git checkout None and the reason."""
    # In a container another user often owns the checkout, which git refuses by default. Git may read it here,
    # because the checkout's code is running already.
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "-c", "safe.directory=*"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"commit": None, "no_commit": str(e)}
    if head.returncode:
        return {"commit": None, "no_commit": " ".join(head.stderr.split())}
    return {"commit": head.stdout.strip() + ("+" if dirty.stdout else "")}
