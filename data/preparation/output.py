"""Where a dataset is written and how it gets its name: by one process at a time, without harm to unrelated files.

    NAME.partial              the unfinished dataset; its first file is MARK, written into a new or empty folder
    .NAME.meshlm-lock         held from before NAME.partial is first examined until NAME is complete
    .NAME.meshlm-replaced     the previous dataset NAME, from when the new one is complete until it is removed

So a kill at any point leaves the old dataset or the new one, and the next preparation of NAME finishes the change. Only
a folder with the mark is cleared, and only a dataset is replaced. A file is removed only if the manifest names it, or
if it has the name of a file of an unfinished dataset: a folder with any other file is refused.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data import packing, tokenizers
from data.errors import DataError
from data.storage import files, names
from data.token_files import formats
from data.tokenizers import hf_json, minbpe, sentencepiece_file, tiktoken_file

log = logging.getLogger("meshlm")

PATH_BYTES = 4095  # the longest complete path on Linux
INSIDE_BYTES = 100  # at least as long as any path below the dataset folder
MARK = "meshlm-unfinished.json"
FORMAT = "meshlm-unfinished-dataset"
CHARACTERS, MERGED = "characters.json", "merged.json"  # files with the progress of a preparation
_TOKENIZER_FILES = (
    tokenizers.FILE_NAME,
    hf_json.FILE_NAME,
    minbpe.FILE_NAME,
    sentencepiece_file.FILE_NAME,
    tiktoken_file.FILE_NAME,
)
_WORKING_FILES = (MARK, CHARACTERS, MERGED)
_JSON_FILES = (*_WORKING_FILES, formats.SUMMARY, formats.MANIFEST)


def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, names))


PACKED = re.compile(r"(train|val)\.packed-\d+\.bin")
PACKED_LOCK = re.compile(r"\.(train|val)\.packed-\d+\.bin\.meshlm-lock")
# The names of the files that preparations and launch.pack write, for each folder.
_OWN = {
    "units": re.compile(r"\d+\.(json|hashes|(train|val)\.(tokens|ends))"),
    "tokenizer": re.compile(_any_of(_TOKENIZER_FILES)),
    "": re.compile(
        rf"(train|val)(-\d+|\.documents|\.loss_mask)\.bin|{PACKED.pattern}|{PACKED_LOCK.pattern}|{_any_of(_JSON_FILES)}"
    ),
}


@dataclasses.dataclass(frozen=True)
class _Mark:
    folder: int  # the folder's inode: distinguishes an unfinished dataset from a copy of it
    key: str  # identifies what is being prepared; "" while files of another request are removed


def is_unfinished(folder: pathlib.Path) -> bool:
    """Whether a preparation started to write a dataset in this folder."""
    return _read_mark(folder) is not None


class Output:
    """A dataset folder that exists or will be made.

    Attributes:
      path: the path of the dataset, with links resolved.
      partial: the folder in which the dataset is written.
      own: all paths that a preparation of the dataset may use.

    Raises:
      DataError: a dataset cannot have this path.
    """

    def __init__(self, path: pathlib.Path):
        try:
            self.path = path.resolve()
        except (OSError, RuntimeError, ValueError) as e:
            raise DataError(f"--out={path} cannot be resolved: {getattr(e, 'strerror', None) or e}") from None
        if not self.path.name or self.path.name.endswith(".partial"):
            raise DataError(f"--out={path} cannot be the name of a dataset; choose another")
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._replaced = self.path.with_name(f".{self.path.name}.meshlm-replaced")
        self.own = (self.path, self.partial, self._replaced, files.lock_path(self.path))
        self._check_lengths(path)

    def _check_lengths(self, path: pathlib.Path) -> None:
        """Raises DataError if a file name or path that a preparation uses would be too long."""
        name = len(os.fsencode(self.path.name))
        beside = max(len(os.fsencode(place.name)) for place in self.own) - name
        if name + beside > names.PART_BYTES or len(os.fsencode(self.partial)) + INSIDE_BYTES > PATH_BYTES:
            raise DataError(
                f"--out={path} is too long: file systems allow {names.PART_BYTES} bytes between slashes, {PATH_BYTES} "
                "in all, and longer names are used beside and below it; choose one of at most "
                f"{names.PART_BYTES - beside} bytes, in a folder with a shorter path"
            )

    def has_dataset(self) -> bool:
        """Whether `path` is a dataset, damaged or not. Raises DataError if something else is there."""
        try:
            if formats.is_dataset(self.path):
                return True
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None
        if os.path.lexists(self.path):  # not even --overwrite replaces it
            raise DataError(f"{self.path} exists and is not a dataset; choose another --out")
        return False

    def was_interrupted(self) -> bool:
        """Whether a preparation was killed while it replaced or renamed the dataset."""
        return os.path.lexists(self._replaced) or is_unfinished(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock, so that no other process prepares this dataset; first finishes what a killed process left.

        Raises:
          DataError: another process has the lock, or the block raised an OSError: a file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.locked(self.path):
                self._recover()
                yield
        except files.LockHeld as e:
            raise DataError(f"{self.path} is being written by {e}") from None
        except OSError as e:
            where, why = e.filename or self.partial, e.strerror or e
            raise DataError(f"cannot write {where}: {why}; fix that, then run the same command again") from None

    def _recover(self) -> None:
        if os.path.lexists(self._replaced):
            if os.path.lexists(self.path):
                if self.has_dataset():
                    _check_own(self._replaced)
                    _remove(self._replaced)
            elif formats.is_dataset(self._replaced):
                self._replaced.rename(self.path)
            else:
                raise DataError(f"{self._replaced} is in the way: it is not a dataset; move it away")
        if is_unfinished(self.path) and self.has_dataset():
            (self.path / MARK).unlink()

    def begin(self, key: str) -> None:
        """Makes `partial`, or keeps its files if an earlier run with the same key made them; else removes its files.

        Raises:
          DataError: `partial`, or the dataset that will be replaced, contains a file that preparations do not write.
        """
        if self.has_dataset():
            _check_own(self.path)
        if os.path.lexists(self.partial) and (self.partial.is_symlink() or not self.partial.is_dir()):
            raise DataError(f"{self.partial} is in the way: it is not a folder; move it away or choose another --out")
        self.partial.mkdir(exist_ok=True)
        _check_own(self.partial)
        mark, here = _read_mark(self.partial), _Mark(self.partial.stat().st_ino, key)
        if mark is None and not all(path.name.startswith(f"{MARK}.") for path in _files(self.partial)[0]):
            raise DataError(
                f"{self.partial} is in the way: it does not have the mark of a preparation; move it away or choose "
                "another --out"
            )
        if mark is not None and mark.key != key:
            if mark.folder != here.folder:
                raise DataError(
                    f"{self.partial} is a copy of an unfinished dataset of another request; remove it or choose "
                    "another --out"
                )
            # Before the files are removed, so that no run with the old key resumes from some of them.
            self._write_mark(dataclasses.replace(here, key=""))
            _remove_files(path for path in _files(self.partial)[0] if path.name != MARK)
        if mark != here:
            self._write_mark(here)
        (self.partial / "units").mkdir(exist_ok=True)

    def _write_mark(self, mark: _Mark) -> None:
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(mark)}) + "\n"
        files.write_durably(self.partial / MARK, text.encode())

    def is_complete(self) -> bool:
        """Whether `partial` is complete: it has a manifest, which is written last."""
        return (self.partial / formats.MANIFEST).exists()

    def publish(self) -> None:
        """Renames the complete dataset to its name, then removes the previous dataset.

        Raises:
          DataError: something that is not a dataset has appeared at `path`.
        """
        done = _files(self.partial)[0]
        _remove_files(
            p for p in done if p.parent.name == "units" or p.name in (CHARACTERS, MERGED) or _is_half_written(p)
        )
        (self.partial / "units").rmdir()
        for path in (self.partial, self.partial / "tokenizer"):
            files.sync(path)
        if self.has_dataset():
            self.path.rename(self._replaced)
        self.partial.rename(self.path)
        (self.path / MARK).unlink()
        files.sync(self.path.parent)
        if self._replaced.exists():
            _remove(self._replaced)


def read_note(path: pathlib.Path) -> Any:
    """Reads JSON that a preparation wrote for itself. Raises DataError."""
    return files.read_json(path, start_again(path.parent))


def start_again(partial: pathlib.Path) -> str:
    return f"remove {partial} and run the command again"


def _read_mark(folder: pathlib.Path) -> _Mark | None:
    try:
        raw = json.loads((folder / MARK).read_bytes())
        return _Mark(raw["folder"], raw["key"]) if raw["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The entries of a dataset folder: files that preparations write, and everything else."""
    own: list[pathlib.Path] = []
    others: list[pathlib.Path] = []
    named, unfinished = _named(folder), is_unfinished(folder)
    for name in _OWN:
        inside = folder / name
        if name and (inside.is_symlink() or not inside.is_dir()):
            continue
        for entry in os.scandir(inside):
            if not name and entry.name in _OWN and entry.is_dir(follow_symlinks=False):
                continue
            known = entry.is_file(follow_symlinks=False) and _is_ours(pathlib.Path(entry.path), name, named, unfinished)
            (own if known else others).append(pathlib.Path(entry.path))
    return own, others


def _is_ours(path: pathlib.Path, folder: str, named: set[str] | None, unfinished: bool) -> bool:
    """Whether a file has a name that preparations write, and the manifest does not contradict that.

    Args:
      folder: the file's folder, a key of _OWN.
      named: what _named returned.
      unfinished: whether the mark exists; then there may be files that a complete dataset does not have.
    """
    half = files.WRITING.fullmatch(path.name)
    whole = half[1] if half else path.name
    if not _OWN[folder].fullmatch(whole):
        return False
    if PACKED.fullmatch(path.name):
        return packing.is_index(path)
    if named is None or PACKED.fullmatch(whole) or PACKED_LOCK.fullmatch(whole):
        return True
    working = half or folder == "units" or whole in _WORKING_FILES
    return bool(unfinished and working) or f"{folder}/{path.name}".removeprefix("/") in named


def _named(folder: pathlib.Path) -> set[str] | None:
    """The files that a dataset's manifest names (for one of an earlier version, all that it may have); None if the
    manifest is missing or damaged."""
    try:
        manifest = formats.read_manifest(folder)
    except (FileNotFoundError, DataError):
        return None
    shards = {shard.file for split in manifest.splits.values() for shard in split.shards}
    others = manifest.files or {
        formats.SUMMARY,
        *(f"{split}.documents.bin" for split in manifest.splits),
        *(f"tokenizer/{name}" for name in _TOKENIZER_FILES),
    }
    masks = {formats.loss_mask_path(folder, split).name for split in manifest.loss_masks}
    return {formats.MANIFEST, *shards, *masks, *others}


def _is_half_written(path: pathlib.Path) -> bool:
    return files.WRITING.fullmatch(path.name) is not None


def _check_own(folder: pathlib.Path) -> None:
    """Raises DataError if `folder` contains a file that preparations do not write, or is not a folder."""
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"{folder} is not a folder; move it away, then run the command again")
    if (folder / "plan").is_file() and (folder / "units").is_dir() and not is_unfinished(folder):
        raise DataError(f"{folder} was left unfinished by an earlier version; remove it, then run the command again")
    if others := sorted(_files(folder)[1]):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(
            f"{others[0]}{more}: not from launch.prepare, and would be lost; move it away or choose another --out"
        )


def _remove_files(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        path.unlink()


def _remove(folder: pathlib.Path) -> None:
    """Removes a dataset, its manifest last, so that after a kill the rest is still recognised as a dataset."""
    own, others = _files(folder)
    if others:  # these files appeared after the first check
        log.warning("%s is kept: it has files that are not from launch.prepare", folder)
        return
    manifest = folder / formats.MANIFEST
    _remove_files(path for path in own if path != manifest)
    for name in ("units", "tokenizer"):
        if (folder / name).is_dir():
            (folder / name).rmdir()
    manifest.unlink(missing_ok=True)
    folder.rmdir()
