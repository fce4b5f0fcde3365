"""What a run is, as its checkpoints know it: its data, its tokenizer, its model.

A start compares it with the newest checkpoint before it changes any file of the run. No JAX: the meta of a checkpoint
is a JSON file.
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
    """The meta in Orbax's metadata of a step. Raises ValueError when it is not what was saved."""
    try:
        meta = json.loads(raw.decode())["custom_metadata"]
        if meta.pop("digest") != digest(meta):
            raise ValueError("it is not what was saved (digest)")
        return meta
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(repr(e)) from None


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The meta of the step in `folder`, under whatever name. Raises Damaged, Unreadable."""
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
    """Of the newest step whose meta is whole; None where there is none. Raises Unreadable."""

    def find() -> dict[str, Any] | None:
        if not reading.is_there(checkpoints):
            return None
        names = [int(path.name) for path in checkpoints.iterdir() if STEP.fullmatch(path.name)]
        for step in sorted(names, reverse=True):
            try:
                return read_meta(checkpoints / str(step))
            except Damaged:  # it is found, and said, when it is restored
                continue
        return None

    return reading.patiently(find, checkpoints)


def check(meta: dict[str, Any], config: Config, data: sources.Sources, where: object) -> None:
    """Raises ConfigError or DataError if a checkpoint in `where` is of another run than `config` and `data`."""
    if meta["data_fingerprint"] != data.fingerprint():
        raise ConfigError(
            f"{where} was trained on another dataset (fingerprint {meta['data_fingerprint']}) than the one at "
            f"{config.data.path} ({data.fingerprint()}); name that one, or another --workdir"
        )
    check_tokenizer(meta, data.load_tokenizer(), where)
    saved = from_dict(meta["config"], recorded=True)
    if refused := changes(saved, config)["refused"]:
        raise ConfigError(
            f"{where} was trained with another configuration; {'; '.join(refused)}; undo the change or choose another "
            "--workdir"
        )
    old = mixture.parse_stages(saved.data.weights, len(data.datasets))
    mixture.check_change(old, data.stages, meta["samples"])


def check_tokenizer(meta: dict[str, Any], tokenizer: tokenizers.Tokenizer | None, where: object) -> None:
    """Raises ConfigError for another tokenizer than the checkpoint's. A run may get one that had none."""
    trained_with = meta.get("tokenizer_sha256")  # None also in checkpoints of earlier versions, which do not say
    if trained_with is None or (found := tokenizer_sha256(tokenizer)) == trained_with:
        return
    here = f"another one is here ({found[:12]}…)" if found else "none is named here"
    raise ConfigError(
        f"{where} was trained with the tokenizer {trained_with[:12]}…, and {here}; name that one with "
        "--config.data.tokenizer_path, or choose another --workdir"
    )


def tokenizer_sha256(tokenizer: tokenizers.Tokenizer | None) -> str | None:
    """Of all that it is, also of its own file."""
    if tokenizer is None:
        return None
    content, file = tokenizer.to_json(), tokenizer.file()
    if file is not None:
        content |= {"file sha256": hashlib.sha256(file[1]).hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
