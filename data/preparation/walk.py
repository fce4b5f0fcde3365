"""Finds the files of a folder or a glob, with the same traversal for both. Files that are left out are counted."""

import errno
import os
import pathlib
import stat
from collections.abc import Callable
from typing import NamedTuple

from data.errors import DataError
from data.preparation import output
from data.preparation.input_errors import InputErrors
from data.storage import names
from data.token_files import formats

ALL = "**"  # the pattern of every file that is not hidden
PARQUET_METADATA = ("_metadata", "_common_metadata")  # files without rows in a folder of Parquet files
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Found(NamedTuple):
    name: str  # relative to the folder, with '/' between its parts
    path: str
    size: int  # bytes


Skip = Callable[[str, str], bool]


def walk(
    root: pathlib.Path, pattern: str, left_out: InputErrors, skip: Skip = lambda folder, name: False
) -> list[Found]:
    """The files below `root` that `pattern` (see names.matches) selects, sorted by name.

    Links are followed. Every real file is taken once. Every real folder is entered once, or again if another step of
    the pattern comes next, so loops of links end. Paths without links are visited first, then links in sorted order.

    Args:
      left_out: counts entries that the pattern selects but that are not files to read.
      skip: whether to ignore an entry without counting it, by the path of its folder and its name.

    Raises:
      DataError: a folder or file cannot be read.
    """
    return _Walk(pattern, left_out, skip).run(os.fspath(root))


class _Walk:
    def __init__(self, pattern: str, left_out: InputErrors, skip: Skip):
        self.pattern = pattern
        self.left_out = left_out
        self.skip = skip
        self.found: list[Found] = []
        self.taken: set[tuple[int, int]] = set()
        self.entered: dict[tuple[int, int], list[frozenset[int]]] = {}  # the next steps of the pattern, by visit
        self.links: list[tuple[str, str]] = []  # (name, path), to be visited in the next round

    def run(self, root: str) -> list[Found]:
        self._real([("", root, _status(root))])
        while self.links:
            links = sorted(self.links)
            self.links = []
            for name, path in links:
                try:
                    status = os.stat(path)
                except OSError as e:
                    if e.errno not in NOWHERE:
                        raise _unreadable(path, e) from None
                    self.left_out.record("link that leads nowhere, left out", path)
                    continue
                self._real([(name, path, status)])
        return sorted(self.found)

    def _real(self, pending: list[tuple[str, str, os.stat_result]]) -> None:
        """Takes files and folders, and everything below them that is not behind a link."""
        files = []
        while pending:
            name, path, status = pending.pop()
            if stat.S_ISDIR(status.st_mode):
                pending += self._folder(name, path, status)
            elif not names.matches(name, self.pattern):
                continue
            elif not stat.S_ISREG(status.st_mode):
                self.left_out.record("neither file nor folder, left out", path)
            elif os.path.basename(name) in PARQUET_METADATA:
                self.left_out.record("metadata of Parquet files, left out", path)
            elif not status.st_size:
                self.left_out.record("empty file, left out", path)
            else:
                files.append((name, path, status))
        for name, path, status in sorted(files, key=lambda file: file[0]):
            if (identity := (status.st_dev, status.st_ino)) in self.taken:
                self._again(path)
            else:
                self.taken.add(identity)
                self.found.append(Found(name, path, status.st_size))

    def _folder(self, name: str, path: str, status: os.stat_result) -> list[tuple[str, str, os.stat_result]]:
        """The entries of a folder that are not links, in descending order of their names."""
        steps = names.next_steps(name, self.pattern)
        if not steps:
            if names.matches(name, self.pattern):
                self.left_out.record("folder, not entered by a pattern that does not end in **", path)
            return []
        entered = self.entered.setdefault((status.st_dev, status.st_ino), [])
        if any(steps <= others for others in entered):
            self._again(path)
            return []
        entered.append(steps)
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
        except OSError as e:
            raise _unreadable(path, e) from None
        if is_own(path, [entry.name for entry in entries]):
            self.left_out.record("dataset, left out", path)
            return []
        inside = []
        for entry in entries:
            below = f"{name}/{entry.name}" if name else entry.name
            if self.skip(path, entry.name):
                continue
            if not self._may_be(below):
                if entry.name.startswith(".") and self._may_be(f"{name}/_{entry.name[1:]}".lstrip("/")):
                    self.left_out.record("hidden file or folder, left out", entry.path)
            elif entry.is_symlink():
                self.links.append((below, entry.path))
            else:
                inside.append((below, entry.path, _status(entry.path)))
        return inside

    def _may_be(self, name: str) -> bool:
        """Whether the pattern may select this name, or a name below it."""
        return bool(names.matched_steps(name, self.pattern))

    def _again(self, path: str) -> None:
        self.left_out.record("the same file or folder by another name, left out", path)


def is_own(folder: str, inside: list[str]) -> bool:
    """Whether a folder with these entries is a dataset, or an unfinished one."""
    path = pathlib.Path(folder)
    dataset = formats.MANIFEST in inside and formats.is_dataset(path)
    return dataset or (output.MARK in inside and output.is_unfinished(path))


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as e:
        raise _unreadable(path, e) from None


def _unreadable(path: str, e: OSError) -> DataError:
    return DataError(f"cannot read {path}: {e.strerror}; make it readable, or leave it out by a glob or another source")
