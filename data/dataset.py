"""A dataset: a folder made by launch.prepare, or token files of other programs, which are read in place (external.py).

Nothing here needs JAX: a launcher opens the data, and reports what is wrong with it, before it loads JAX.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator

from data import tokenizers
from data.config import DataConfig
from data.errors import DataError
from data.storage import names, remote
from data.token_files import external, fingerprint, formats

log = logging.getLogger("meshlm")

MANIFEST_BYTES = 64  # enough to recognise a manifest


@dataclasses.dataclass(frozen=True)
class Dataset:
    path: str  # data.path as it was given
    folder: pathlib.Path  # the path on this machine; used for a dataset folder
    manifest: formats.Manifest  # for external files: made from their headers and content, with vocab_size 0
    vocab_size: int  # 0: not known
    tokenizer_path: str  # '' if there is no tokenizer
    load_tokenizer: Callable[[], tokenizers.Tokenizer | None]  # None: no tokenizer is configured; raises DataError
    external_files: dict[str, list[external.TokenFile]]  # the files of each split; empty for a dataset folder
    largest_id: int = -1  # the largest id seen when external files were opened

    def files(self, split: str) -> formats.TokenFiles:
        """The token files of a split, memory-mapped and checked. Raises DataError."""
        try:
            if not self.external_files:
                return formats.TokenFiles(self.folder, self.manifest, split)
            if split not in self.external_files:
                raise DataError(f"{self.path} has no {split!r} files; name them with data.val_path")
            return external.Files(self.external_files[split], self.vocab_size)
        except OSError as e:
            raise DataError(f"{e.filename} cannot be read: {e.strerror}") from None

    def paths(self) -> Iterator[tuple[str, pathlib.Path]]:
        """(split, path) of all token files."""
        for split, spec in self.manifest.splits.items():
            if self.external_files:
                yield from ((split, file.path) for file in self.external_files[split])
            else:
                yield from ((split, self.folder / shard.file) for shard in spec.shards)

    def has(self, split: str) -> bool:
        """Whether the split has a token to predict."""
        return split in self.manifest.splits and self.manifest.splits[split].tokens > 1


def fetch(path: str) -> pathlib.Path:
    """A path of the configuration as a path on this machine; objects in a store are downloaded to the cache.

    Raises:
      DataError: the download fails.
    """
    return pathlib.Path(remote.fetch(path) if remote.is_remote(path) else path)


def is_prepared(config: DataConfig) -> bool:
    """Whether config.path is a dataset folder; for a store, its current listing decides. Raises DataError."""
    if config.format not in ("", "meshlm"):
        return False
    manifest = fetch(config.path) / formats.MANIFEST
    return manifest in remote.fetch_files(config.path) if remote.is_remote(config.path) else _is_there(manifest)


def _is_there(path: pathlib.Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    return True


def open_dataset(config: DataConfig, vocab_size: int = 0) -> Dataset:
    """Opens config.path.

    Args:
      vocab_size: the model's, or 0 if it is not known; used for external files without a tokenizer.

    Raises:
      FileNotFoundError: config.path does not exist.
      DataError: config.path cannot be used.
    """
    path = fetch(config.path)
    prepared = is_prepared(config)
    named_as_external = config.format or path.suffix in external.SUFFIXES or names.is_pattern(config.path)
    if not prepared and (config.format == "meshlm" or not (named_as_external or _is_there(path))):
        raise FileNotFoundError(config.path)
    try:
        return _open_prepared(config, path) if prepared else _open_external(config, path, vocab_size)
    except OSError as e:
        raise DataError(f"{e.filename or path} cannot be read: {e.strerror or e}") from None


def _open_prepared(config: DataConfig, path: pathlib.Path) -> Dataset:
    given = [f"data.{name}" for name in ("dtype", "val_path", "tokenizer_path") if getattr(config, name)]
    if given:
        raise DataError(f"{config.path} is a dataset of launch.prepare; leave {', '.join(given)} empty")
    manifest = formats.read_manifest(path)
    folder = path / "tokenizer"
    load = functools.cache(functools.partial(tokenizers.load, folder, manifest.tokenizer_sha256))
    return Dataset(config.path, path, manifest, manifest.vocab_size, str(folder), load, {})


def _open_external(config: DataConfig, path: pathlib.Path, vocab_size: int) -> Dataset:
    tokenizer = tokenizers.make(str(fetch(config.tokenizer_path))) if config.tokenizer_path else None
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    paths = _paths_by_split(config)
    read = external.read_headers([p for split in paths.values() for p in split], config.format, config.dtype)
    remaining = iter(read)
    files = {name: list(itertools.islice(remaining, len(split))) for name, split in paths.items()}
    splits, largest = {}, -1
    for name, of_split in files.items():
        contents = fingerprint.read_contents(of_split)
        for file, found in zip(of_split, contents, strict=True):
            fingerprint.check_ids(file, found, config.dtype, vocab_size)
            largest = max(largest, found.largest_id)
        shards = tuple(formats.Shard(f.path.name, f.tokens, c.digest) for f, c in zip(of_split, contents, strict=True))
        documents = sum(f.documents for f in of_split)
        splits[name] = formats.Split(sum(f.tokens for f in of_split), 0, documents, shards)
    # Only basenames, so that moving files keeps the fingerprint; no tokenizer, because it does not affect the tokens.
    manifest = formats.Manifest(read[0].dtype, 0, None, "", splits, {"format": read[0].kind})
    tokenizer_path = config.tokenizer_path
    return Dataset(config.path, path, manifest, vocab_size, tokenizer_path, lambda: tokenizer, files, largest)


def _paths_by_split(config: DataConfig) -> dict[str, list[pathlib.Path]]:
    """The training and the validation files; a file is never in both lists."""
    paths = external.find_token_files(config.path)
    _refuse_parts_of_datasets(config.path, paths)
    if config.val_path:
        val = external.find_token_files(config.val_path)
        held_out = {p.resolve() for p in val}
        train = [p for p in paths if p.resolve() not in held_out]
    else:
        root, _ = external.folder_and_pattern(fetch(config.path))
        val = [p for p in paths if _validates(p, root)]
        train = sorted(set(paths) - set(val))
    if not train:
        raise DataError(
            f"all {len(paths)} file(s) of {config.path} are validation files ({paths[0]}); name training files with "
            "data.path, or the validation files with data.val_path"
        )
    _warn_of_tests(config.path, train)
    return {"train": train, "val": val} if val else {"train": train}


def _refuse_parts_of_datasets(path: str, found: list[pathlib.Path]) -> None:
    """Raises DataError for files in a dataset folder of launch.prepare: only its manifest says what each file is and
    which files are for training."""
    for folder in sorted({file.parent for file in found}):
        name, ours = str(folder), formats.is_dataset(folder) or (folder / "tokenizer" / tokenizers.FILE_NAME).exists()
        if remote.is_remote(path):  # the cache may have copies of objects that were deleted
            name = remote.source_of(folder)
            ours = formats.MARK.match(remote.read_head(f"{name}/{formats.MANIFEST}", MANIFEST_BYTES)) is not None
        if ours:
            raise DataError(
                f"{path} names files of {name}, a dataset of launch.prepare; name the folder itself: {name}"
            )


def _warn_of_tests(path: str, train: list[pathlib.Path]) -> None:
    """Warns of training files whose names say that they are for tests, unless data.path is such a file itself."""
    place = fetch(path)
    if place.is_file():
        return
    root, _ = external.folder_and_pattern(place)
    if tests := [str(p) for p in train if names.has_word(_below(p, root).as_posix(), names.TEST)]:
        first = ", ".join(map(repr, tests[:3])) + (" …" if len(tests) > 3 else "")
        log.warning(
            "WARNING: %s: %d file(s) are named as for tests, but will be trained on: %s; name the files to train on, "
            "for example by another glob", path, len(tests), first,
        )  # fmt: skip


def _validates(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Whether the name of the file, or of a folder between `root` and it, says that it is for validation."""
    return any(names.has_word(part, names.VALIDATION) for part in _below(path, root).with_suffix("").parts)


def _below(path: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    return path.relative_to(root) if path.is_relative_to(root) and path != root else pathlib.Path(path.name)
