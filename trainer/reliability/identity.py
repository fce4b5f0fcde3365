"""The identity of a run, as its checkpoints record it: data, tokenizer and configuration.

A start is compared with the newest checkpoint before it changes any file of the run. No JAX is needed: the meta of a
checkpoint is a JSON file.
"""

import hashlib
import json
import pathlib
import re
from typing import Any

from data import mixture, sources, tokenizers
from trainer.config import Config, changes, from_dict
from trainer.errors import ConfigError
from trainer.reliability import reading
from trainer.reliability.reading import Damaged
from trainer.reliability.restarts import METADATA_FILE

STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a step's folder


def digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def meta_from(raw: bytes) -> dict[str, Any]:
    """The meta of a step in the content of Orbax's metadata file. Raises ValueError if it is not what was saved."""
    try:
        meta = json.loads(raw.decode())["custom_metadata"]
        if meta.pop("digest") != digest(meta):
            raise ValueError("it is not what was saved (digest)")
        return meta
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(repr(e)) from None


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The meta of the step in `folder`, whose name does not matter. Raises Damaged, Unreadable."""
    path = folder / METADATA_FILE
    try:
        return meta_from(path.read_bytes())
    except OSError as e:
        if e.errno not in reading.MISSING:
            raise reading.cannot_read(e, path) from None
        raise Damaged(f"{path} is missing") from None
    except ValueError as e:
        raise Damaged(f"{path} is damaged: {e}") from None


def newest_meta(checkpoints: pathlib.Path) -> dict[str, Any] | None:
    """The meta of the newest step whose metadata is not damaged; None if there is no such step. Raises Unreadable."""

    def find() -> dict[str, Any] | None:
        if not reading.is_there(checkpoints):
            return None
        names = [int(path.name) for path in checkpoints.iterdir() if STEP.fullmatch(path.name)]
        for step in sorted(names, reverse=True):
            try:
                return read_meta(checkpoints / str(step))
            except Damaged:  # the restore reports it
                continue
        return None

    return reading.patiently(find, checkpoints)


def check(meta: dict[str, Any], config: Config, data: sources.Sources, where: object) -> None:
    """Raises ConfigError or DataError if a checkpoint in `where` does not fit `config` and `data`."""
    if meta["data_fingerprint"] != data.fingerprint():
        raise ConfigError(
            f"{where} was trained on another dataset (fingerprint {meta['data_fingerprint']}) than "
            f"{config.data.path} ({data.fingerprint()}); name that one, or another --workdir"
        )
    check_tokenizer(meta, data.load_tokenizer(), where)
    saved = from_dict(meta["config"], recorded=True)
    if refused := refused_changes(meta, config):
        raise ConfigError(
            f"{where} was trained with another configuration; {'; '.join(refused)}; undo the change or choose another "
            "--workdir"
        )
    old = mixture.parse_stages(saved.data.weights, len(data.datasets))
    mixture.check_change(old, data.stages, meta["samples"])


def refused_changes(meta: dict[str, Any], config: Config) -> list[str]:
    """The changes to the configuration of a checkpoint that no flag allows, as lines of trainer.config.changes."""
    return changes(from_dict(meta["config"], recorded=True), config)["refused"]


def check_tokenizer(meta: dict[str, Any], tokenizer: tokenizers.Tokenizer | None, where: object) -> None:
    """Raises ConfigError if the tokenizer is not the checkpoint's. A run without one may get one later."""
    trained_with = meta.get("tokenizer_sha256")  # also None for a checkpoint of an earlier version, which lacks it
    if trained_with is None or (found := tokenizer_sha256(tokenizer)) == trained_with:
        return
    here = f"this one is {found[:12]}…" if found else "none is named here"
    raise ConfigError(
        f"{where} was trained with the tokenizer {trained_with[:12]}…, but {here}; name that one with "
        "--config.data.tokenizer_path, or choose another --workdir"
    )


def tokenizer_sha256(tokenizer: tokenizers.Tokenizer | None) -> str | None:
    """Hash of the tokenizer's content and of its standard file, if it has one."""
    if tokenizer is None:
        return None
    content, file = tokenizer.to_json(), tokenizer.file()
    if file is not None:
        content |= {"file sha256": hashlib.sha256(file[1]).hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
