"""Files that are there whole or not at all, and locks that end with their owner."""

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
from collections.abc import Iterator
from typing import IO, Any

from data.errors import DataError

log = logging.getLogger("meshlm")

OWNER = re.compile(r".* process \d+")  # what a lock says
WRITING = re.compile(r"(.+)\.writing-[0-9a-f]{16}")  # what a process that was killed leaves of a file


class Held(Exception):
    """A lock is another's; the text says whose."""


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write that is at `path` when the block ends: whole, also after a power failure, or not at all.

    Until then its name is its own, so processes that write one path at once do not harm each other: the last one stays.
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
    with written(path) as f:
        f.write(content)


def read_json(path: pathlib.Path, advice: str) -> Any:
    """What a file of ours holds. Raises DataError, with what to do, when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged; {advice}") from None


def close_durably(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync(path: pathlib.Path) -> None:
    """The content of a file, or the names in a folder, survive a power failure."""
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
    """One process at a time works on `path`, which need not be there. A dead owner's lock is free by itself.

    The lock is the file `.NAME.meshlm-lock` beside `path`: what is renamed or replaced under it is never the lock
    itself.

    Args:
      wait: for the process that has it.

    Yields:
      whether no other process can have it: some file systems have no flock(2), which is said.

    Raises:
      Held: another process has it, and `wait` is false.
      DataError: something else has its name.
      OSError: the lock cannot be written.
    """
    place = lock_path(path)
    handle, real = _take(place, wait)
    with handle:
        try:
            yield real
        finally:
            if _is_at(handle, place):
                place.unlink()  # while it is held: who waits for it sees that it went, and makes a new one


def _take(place: pathlib.Path, wait: bool) -> tuple[IO[str], bool]:
    said = False
    while True:
        handle = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if said else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = handle.read().strip() or "another process"
            handle.close()
            if not wait:
                raise Held(owner) from None
            log.info("waiting for %s, which has %s", owner, place)
            said = True
            continue
        except OSError as e:
            log.warning("%s cannot be locked (%s); make sure that no other process writes there", place, e.strerror)
            return handle, False
        if _is_at(handle, place):  # else its owner removed it before letting go
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
    """Removes what processes that were killed left of `path`; none may be writing it (see `locked`)."""
    for other in path.parent.iterdir():
        if (found := WRITING.fullmatch(other.name)) and found[1] == path.name and other.is_file():
            other.unlink(missing_ok=True)
