"""Files that are there whole or not at all, and locks that end with their owner."""

import fcntl
import os
import pathlib
import platform
from typing import IO


class Held(Exception):
    """A lock is another's; the text says whose."""


def write_durably(path: pathlib.Path, content: bytes) -> None:
    """The file is there whole, also after a power failure, or not at all."""
    partial = path.with_name(path.name + ".writing")
    with partial.open("wb") as f:
        f.write(content)
        close_durably(f)
    partial.replace(path)


def close_durably(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def lock(path: pathlib.Path) -> tuple[IO[str], OSError | None]:
    """Takes a lock until the returned file is closed; a dead owner's is free by itself.

    Returns:
      the file, which names its owner, and why it is no lock, where the file system has none (flock(2)).

    Raises:
      Held: another process has it.
      OSError: the file cannot be written.
    """
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise Held(handle.read().strip() or "another process") from None
    except OSError as e:
        return handle, e
    handle.truncate(0)
    handle.write(f"{platform.node()} process {os.getpid()}")
    handle.flush()
    return handle, None
