"""Copies of a bucket's objects in a folder on this machine.

    CACHE/files/gs/BUCKET/KEY            a copy of the object
    CACHE/state/gs/BUCKET/HASH.json      the record of a copy: key, generation, and the size and time of the copy
    CACHE/state/gs/BUCKET/HASH.lock      held by the process on this machine that fetches it
    CACHE/state/gs/BUCKET/HASH.partial   the part that has been fetched so far

A copy that does not match its record (truncated, changed) is fetched again. Only a copy that
matches its record is removed.
"""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import IO

from data.storage import names
from data.storage.files import close_durably


@dataclasses.dataclass(frozen=True)
class Record:
    key: str
    generation: str  # base64
    size: int
    modified_ns: int

    def describes(self, status: os.stat_result | None) -> bool:
        """Whether the file with this status is the recorded copy, unchanged."""
        return (
            status is not None
            and stat.S_ISREG(status.st_mode)
            and (status.st_size, status.st_mtime_ns) == (self.size, self.modified_ns)
        )


class Cache:
    """The copies of one bucket. Every method raises OSError if the folder cannot be read or written, or if a link leads
    out of the folder, and DataError for a key that cannot be a path below the folder."""

    def __init__(self, folder: pathlib.Path, scheme: str, bucket: str):
        self._folder = folder
        self._files = f"files/{scheme}/{bucket}"
        self._state = f"state/{scheme}/{bucket}"

    def path(self, key: str) -> pathlib.Path:
        return self._folder.joinpath(self._files, *names.safe_parts(key))

    def refresh(self, key: str, is_current: Callable[[bytes], bool], download: Callable[[IO[bytes]], bytes]) -> None:
        """Updates the copy to the object's current content, atomically, even if the power fails.

        Args:
          is_current: returns whether the object still has a given generation.
          download: writes the object into a file, and returns its generation.
        """
        with (
            self._locked(key) as (state, name),
            names.open_parent(self._folder, f"{self._files}/{key}") as (folder, last),
        ):
            record = _read(state, name)
            copied = record is not None and record.key == key and record.describes(_status(folder, last))
            if record is not None and copied and is_current(base64.b64decode(record.generation)):
                return
            with _partial(state, f"{name}.partial") as f:
                generation = download(f)
                close_durably(f)
                _clear(folder, last)
                os.replace(f"{name}.partial", last, src_dir_fd=state, dst_dir_fd=folder)
            os.fsync(folder)
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
            record = Record(key, base64.b64encode(generation).decode(), status.st_size, status.st_mtime_ns)
            with _partial(state, f"{name}.json.partial") as f:
                f.write(json.dumps(dataclasses.asdict(record)).encode())
                close_durably(f)
                os.replace(f"{name}.json.partial", f"{name}.json", src_dir_fd=state, dst_dir_fd=state)

    def keys(self) -> set[str]:
        """The keys of all copies that have not been removed."""
        with names.open_parent(self._folder, f"{self._state}/-") as (state, _):
            found = [_read(state, name[:-5]) for name in os.listdir(state) if name.endswith(".json")]
        return {record.key for record in found if record is not None}

    def remove(self, key: str) -> None:
        """Removes the record of a copy, and the copy if it matches the record."""
        with (
            self._locked(key) as (state, name),
            names.open_parent(self._folder, f"{self._files}/{key}") as (folder, last),
        ):
            record = _read(state, name)
            if record is None or record.key != key:
                return
            if record.describes(_status(folder, last)):
                os.unlink(last, dir_fd=folder)
            os.unlink(f"{name}.json", dir_fd=state)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[tuple[int, str]]:
        """Locks a key for this process; yields the folder of records, and the name of the key's files there."""
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        with names.open_parent(self._folder, f"{self._state}/{name}") as (state, _):
            lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=state)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield state, name
            finally:
                os.close(lock)


def _read(state: int, name: str) -> Record | None:
    """A record; None if it is missing, damaged or of another version."""
    try:
        with os.fdopen(os.open(f"{name}.json", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=state), "rb") as f:
            record = Record(**json.loads(f.read()))
            base64.b64decode(record.generation)
            names.safe_parts(record.key)
            return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError, names.DataError):
        return None


@contextlib.contextmanager
def _partial(state: int, name: str) -> Iterator[IO[bytes]]:
    """Yields a new file. After a failure the file is removed, because the disk may be full."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=state)
    opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=state)
    try:
        with os.fdopen(opened, "wb") as f:
            yield f
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=state)
        raise


def _status(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _clear(folder: int, name: str) -> None:
    """Removes a folder of that name if it has no files: the store used to have objects below that name."""
    if (status := _status(folder, name)) is not None and stat.S_ISDIR(status.st_mode):
        for _, below, _, at in os.fwalk(name, topdown=False, dir_fd=folder):
            for other in below:
                os.rmdir(other, dir_fd=at)
        os.rmdir(name, dir_fd=folder)
