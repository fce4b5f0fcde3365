"""Writes files that are either complete or absent, and holds locks that end with their owner."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from data.errors import DataError

log = logging.getLogger("meshlm")

OWNER = re.compile(r".* process \d+")  # the content of a lock file
WRITING = re.compile(r"(.+)\.writing-[0-9a-f]{16}")  # the temporary name of a file; it remains if the process is killed


class LockHeld(Exception):
    """Another process holds the lock; the text of the exception names the process."""


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Yields a file to write. It gets the name `path` when the block ends, so `path` is never incomplete, even after a
    power failure.

    Until then the file has a unique name, so processes that write one path at the same time do not interfere; the last
    process to finish wins.
    """
    partial = path.with_name(f"{path.name}.writing-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as f:
            yield f
            close_durably(f)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_durably(path: pathlib.Path, content: bytes) -> None:
    with atomic_write(path) as f:
        f.write(content)


def read_json(path: pathlib.Path, advice: str) -> Any:
    """The content of a JSON file. Raises DataError, with `advice`, if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged; {advice}") from None


def close_durably(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync(path: pathlib.Path) -> None:
    """Writes the content of a file, or the names in a folder, to disk, so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)


def lock_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.meshlm-lock")


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = False) -> Iterator[bool]:
    """Lets one process at a time work on `path`, which need not exist. The lock is released when its process ends.

    The lock is the file `.NAME.meshlm-lock` beside `path`, so `path` can be renamed or replaced while it is locked.

    Args:
      wait: whether to wait for the process that holds the lock.

    Yields:
      whether the lock is exclusive; if the file system does not have flock(2), it is not, and a warning is logged.

    Raises:
      LockHeld: another process holds the lock, and `wait` is false.
      DataError: another file has the name of the lock.
      OSError: the lock cannot be written.
    """
    place = lock_path(path)
    handle, real = _take(place, wait)
    with handle:
        try:
            yield real
        finally:
            if _is_at(handle, place):
                place.unlink()  # before the lock is released: a waiting process notices, and makes a new file


def _take(place: pathlib.Path, wait: bool) -> tuple[IO[str], bool]:
    waiting = False
    while True:
        handle = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = handle.read().strip() or "another process"
            handle.close()
            if not wait:
                raise LockHeld(owner) from None
            log.info("waiting for %s, which holds %s", owner, place)
            waiting = True
            continue
        except OSError as e:
            log.warning("%s cannot be locked (%s); make sure that no other process writes there", place, e.strerror)
            return handle, False
        if _is_at(handle, place):  # otherwise the owner removed the file before releasing the lock
            break
        handle.close()
    if (content := handle.read()) and not OWNER.fullmatch(content):
        handle.close()
        raise DataError(f"{place} is in the way: it is not a lock of this program; move it away")
    handle.seek(0)
    handle.truncate(0)
    handle.write(f"{platform.node()} process {os.getpid()}")
    handle.flush()
    return handle, True


def _is_at(handle: IO[str], place: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), place.lstat())
    except FileNotFoundError:
        return False


def remove_half_written(path: pathlib.Path) -> None:
    """Removes unfinished files of `path` that killed processes left. Call it only while `path` is locked (`locked`)."""
    for other in path.parent.iterdir():
        if (found := WRITING.fullmatch(other.name)) and found[1] == path.name and other.is_file():
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(target: pathlib.Path, doing: str) -> Iterator[pathlib.Path]:
    """A folder beside `target` that becomes `target` at the end of the block; an exception deletes it.

    Args:
      doing: the end of its name until then. A killed process leaves the folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=f".{doing}", dir=target.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # as mkdir makes it; that of mkdtemp is private
        temporary.rename(target)
    except BaseException as e:
        if isinstance(e, OSError) and e.filename is None:  # such as a full disk in the middle of a file
            e.filename = str(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
