"""What a run reads: one dataset, or several datasets that share a vocabulary and are mixed by weights.

data.path names the sources, separated by commas; data.weights says how they are mixed (mixture.py). Nothing here needs
JAX.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from data import mixture, packing, tokenizers
from data.config import DataConfig, Task
from data.dataset import Dataset, is_prepared, open_dataset
from data.errors import DataError
from data.token_files import external, formats


@dataclasses.dataclass(frozen=True)
class Sources:
    datasets: dict[str, Dataset]  # by name, in the order of data.path
    stages: tuple[mixture.Stage, ...]
    tokenizer_source: Dataset  # the dataset whose vocabulary and tokenizer are used for all
    packings: dict[str, packing.Index] = dataclasses.field(default_factory=dict)  # by name, if data.packed
    val_packings: dict[str, packing.Index] = dataclasses.field(default_factory=dict)  # by name, of chats

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; 0 if it is not known."""
        return self.tokenizer_source.vocab_size

    @property
    def tokenizer_path(self) -> str:
        """The path of the tokenizer; '' if there is no tokenizer."""
        return self.tokenizer_source.tokenizer_path

    def load_tokenizer(self) -> tokenizers.Tokenizer | None:
        """The tokenizer; None if the configuration does not name one. Raises DataError."""
        return self.tokenizer_source.load_tokenizer()

    @property
    def are_chats(self) -> bool:
        """Whether the documents are chats: the datasets have their ends and their loss masks."""
        return any(data.manifest.loss_masks for data in self.datasets.values())

    @property
    def task(self) -> Task:
        """What the datasets are for: pretrain, sft, or dpo."""
        return next(iter(self.datasets.values())).manifest.task

    def eos_id(self) -> int | None:
        """The token after each document: from a prepared dataset, or else from the tokenizer; None if there is none."""
        found = [d.manifest.eos_id for d in self.datasets.values() if d.manifest.eos_id is not None]
        tokenizer = None if found else self.load_tokenizer()
        return found[0] if found else tokenizer.eos_id if tokenizer is not None else None

    @property
    def largest_id(self) -> int:
        return max(d.largest_id for d in self.datasets.values())

    def fingerprint(self) -> str:
        """16 hex digits that change with any token and with the order of sequences. They do not change with the
        weights, which a run may change for later sequences."""
        prints = [d.manifest.fingerprint() for d in self.datasets.values()]
        if self.packings:  # the same tokens, but in other rows and another order
            prints = [index.sha256 + of_data for index, of_data in zip(self.packings.values(), prints, strict=True)]
            return hashlib.sha256(json.dumps([mixture.VERSION, "packed", prints]).encode()).hexdigest()[:16]
        if len(prints) == 1:
            return prints[0]
        return hashlib.sha256(json.dumps([mixture.VERSION, prints]).encode()).hexdigest()[:16]

    def files(self, split: str) -> dict[str, formats.TokenFiles]:
        """The token files of each source; for 'val', only of sources with a token to predict. Raises DataError."""
        found = {name: d.files(split) for name, d in self.datasets.items() if split == "train" or d.has(split)}
        for name, of_source in found.items():
            if of_source.loss_mask is not None:
                of_source.index = (self.packings if split == "train" else self.val_packings)[name]
        return found


def open_sources(config: DataConfig, vocab_size: int = 0) -> Sources:
    """Opens all sources of config.path. Arguments and errors are those of open_dataset.

    Token files of other programs get the vocabulary of the prepared datasets that they are mixed with, unless
    data.tokenizer_path names a tokenizer. All prepared datasets must have been made with the same tokenizer.
    """
    configs = _config_of_each(config)
    datasets: dict[str, Dataset] = {}
    prepared: Dataset | None = None
    # Prepared datasets first, because they define the vocabulary.
    for name, of_source in sorted(configs.items(), key=lambda item: not is_prepared(item[1])):
        data = datasets[name] = open_dataset(of_source, vocab_size)
        if is_prepared(of_source):
            if prepared and data.manifest.tokenizer_sha256 != prepared.manifest.tokenizer_sha256:
                raise DataError(
                    f"{data.path} was prepared with another tokenizer than {prepared.path}; prepare one again with "
                    f"--tokenizer={prepared.folder}"
                )
            prepared = prepared or data
            vocab_size = data.vocab_size
    datasets = {name: datasets[name] for name in configs}
    for data in datasets.values():
        if data.vocab_size != vocab_size and len(datasets) > 1 and vocab_size:
            raise DataError(
                f"the tokenizer of {data.path} has {data.vocab_size} tokens, but others have {vocab_size}; "
                "the sources of a run must share one tokenizer"
            )
    if len(datasets) > 1:
        _check_distinct(datasets)
    try:
        stages = mixture.parse_stages(config.weights, len(datasets))
    except ValueError as e:
        raise DataError(str(e)) from None
    _check_chats(config, datasets)
    packings = {name: packing_of(data, config.seq_len) for name, data in datasets.items()} if config.packed else {}
    val_packings = {
        name: packing_of(data, config.seq_len, "val")
        for name, data in datasets.items()
        if data.manifest.loss_masks and data.has("val")
    }
    return Sources(datasets, stages, prepared or next(iter(datasets.values())), packings, val_packings)


def _check_chats(config: DataConfig, datasets: dict[str, Dataset]) -> None:
    """Raises DataError for chats that are not packed and masked from each other, or are mixed with other documents."""
    chats = [data.path for data in datasets.values() if data.manifest.loss_masks]
    if chats and not (config.packed and config.mask_documents):
        raise DataError(f"{chats[0]} has chats; they need --config.data.packed=true --config.data.mask_documents=true")
    kinds = {data.manifest.task: data.path for data in datasets.values()}
    if len(kinds) > 1:
        shown = " and ".join(f"{path} is for {task}" for task, path in kinds.items())
        raise DataError(f"{shown}; a run trains on one kind: name one of them")


def _check_distinct(datasets: dict[str, Dataset]) -> None:
    """Raises DataError for a training file that is in another source too: the run would train on it twice, or train and
    validate on it."""
    found: dict[tuple[int, int], tuple[str, str, pathlib.Path]] = {}
    for name, data in datasets.items():
        for split, path in data.paths():
            try:
                stat = path.stat()
            except OSError:  # the error is reported when the file is opened
                continue
            other, of, path_there = found.setdefault((stat.st_dev, stat.st_ino), (name, split, path))
            if other != name and "train" in (split, of):
                how = "both train on" if split == of else "one trains and the other validates on"
                raise DataError(
                    f"{path} of source {name!r} and {path_there} of source {other!r} are the same file, which {how}; "
                    "name it in one source, and set its share with data.weights"
                )


def packing_of(data: Dataset, seq_len: int, split: str = "train") -> packing.Index:
    """The packing of a split of a dataset. Raises DataError if the dataset cannot be packed, or is not packed."""
    if data.external_files:
        raise DataError(
            f"{data.path} was not prepared by launch.prepare, and only that can be packed; leave data.packed false"
        )
    packing.check_packable(data.path, data.manifest)
    return packing.read_index(data.folder, data.manifest, seq_len, split)


def _config_of_each(config: DataConfig) -> dict[str, DataConfig]:
    """The configuration of each source by its name. Raises DataError."""
    paths = _separated(config.path)
    if len(paths) == 1:
        path, val_path = paths[0], ",".join(_separated(config.val_path))
        return {_name(path): dataclasses.replace(config, path=path, val_path=val_path)}
    if os.path.exists(config.path):
        raise DataError(rf"{config.path} exists, with a comma in its name; write \, for a comma that is part of a path")
    if "" in paths:
        raise DataError(f"data.path names an empty source: {config.path}")
    per_source = {
        field: _spread(field, getattr(config, field), len(paths)) for field in ("format", "dtype", "val_path")
    }
    configs = {}
    for i, (path, name) in enumerate(zip(paths, names_of(paths), strict=True)):
        fields: dict[str, Any] = {field: values[i] for field, values in per_source.items()}
        of_source = dataclasses.replace(config, path=path, **fields)
        if is_prepared(of_source):
            of_source = dataclasses.replace(of_source, dtype="", tokenizer_path="")
        configs[name] = of_source
    return configs


def _separated(text: str) -> list[str]:
    r"""The values between commas; '\,' is a comma inside a value."""
    values = [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]
    return [value.strip() for value in values] if len(values) > 1 else values


def names_of(paths: list[str]) -> list[str]:
    """The name of each source in metrics: the last part of its path, and as much before it as makes it unique.

    Raises:
      DataError: a path is given twice.
    """
    places = [os.path.normpath(path) for path in paths]
    if twice := [path for path in places if places.count(path) > 1]:
        raise DataError(f"data.path has the source {_name(twice[0])!r} twice; set its share with data.weights")
    depths = [0] * len(paths)
    while True:
        found = [_name(path, depth) for path, depth in zip(paths, depths, strict=True)]
        depths = [depth + (found.count(name) > 1) for name, depth in zip(found, depths, strict=True)]
        if len(set(found)) == len(found):
            return found


def _name(path: str, depth: int = 0) -> str:
    """A source's name: datasets/books is books, tokens/fineweb_*.bin is fineweb, tokens/*.bin is tokens.

    If `depth` is above 0, the name has that many parts of the path, without wildcards and the suffixes of token files;
    at most, it is the full path.
    """
    parts = list(pathlib.PurePath(path).parts)
    if depth == 0:
        parts = [pathlib.PurePath(part).stem for part in parts]
    for suffix in external.SUFFIXES:
        parts = [part.removesuffix(suffix) for part in parts]
    parts = [re.sub(r"[*?\[\]]", "", part) for part in parts]
    parts = [stripped for part in parts if (stripped := part.strip("-_./"))]
    return "-".join(parts[-max(1, depth) :]) if parts and depth <= len(parts) + 1 else path


def _spread(field: str, text: str, count: int) -> list[str]:
    """The values of a field for `count` sources: `text` has one for all, or one for each, separated by commas."""
    values = [value.strip() for value in _separated(text)]
    if len(values) == 1 and field != "val_path":
        values *= count
    if values == [""]:
        values *= count
    if len(values) != count:
        raise DataError(f"data.{field} has {len(values)} values, but data.path has {count} sources; separate by commas")
    return values
