"""Keeps standard input in a file during a preparation, which reads it more than once.

The file's name is a hash of its content, so that the same text is in the same file, also after a kill. A
preparation holds a shared lock on its file. When a preparation ends, it removes all files without a lock: its own, and
files of killed preparations.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import IO

from data.errors import DataError

PREFIX = ".meshlm-stdin-"
OURS = re.compile(re.escape(PREFIX) + r"(([0-9a-f]{32})\.[a-z.]+|[0-9a-z_]{8}\.partial)")


@contextlib.contextmanager
def spooled(stream: IO[bytes], folder: pathlib.Path, suffix: str) -> Iterator[pathlib.Path]:
    """Yields the path of a file in `folder` with the content of `stream`; the file is removed afterwards.

    Raises:
      DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX, suffix=".partial") as f:
            _lock(f)
            path = folder / f"{PREFIX}{_copy(stream, f)}.{suffix}"
            kept = _named(f, path)
    except OSError as e:
        raise DataError(f"cannot store standard input in {folder}: {e.strerror}") from None
    try:
        with kept:
            yield path
    finally:
        _remove_unused(folder)


def content_hash(path: pathlib.Path) -> str:
    """The content hash of a file written by `spooled`; '' for any other file."""
    ours = OURS.fullmatch(path.name)
    return ours[2] or "" if ours else ""


def _copy(stream: IO[bytes], f: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        f.write(block)
        digest.update(block)
    f.flush()
    return digest.hexdigest()[:32]


def _named(f: IO[bytes], path: pathlib.Path) -> IO[bytes]:
    """The file at `path`, locked: another preparation of the same text made it, or it is `f`, linked to this name."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.link(f.name, path)
        try:
            kept = path.open("rb")
        except FileNotFoundError:  # the last preparation that used it has just removed it
            continue
        _lock(kept)
        if not _is_at(kept, path):
            kept.close()
        elif _digest(kept) == content_hash(path):
            return kept
        else:  # truncated by a power failure
            kept.close()
            path.unlink(missing_ok=True)


def _digest(f: IO[bytes]) -> str:
    return hashlib.file_digest(f, "sha256").hexdigest()[:32]  # type: ignore[arg-type]


def _remove_unused(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if not OURS.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError), path.open("rb") as f:
            if _lock(f, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(f, path):
                path.unlink()


def _lock(f: IO[bytes], how: int = fcntl.LOCK_SH) -> bool:
    """Whether the lock was taken; some file systems do not have locks."""
    try:
        fcntl.flock(f, how)
    except OSError:
        return False
    return True


def _is_at(f: IO[bytes], path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(f.fileno()), path.lstat())
    except FileNotFoundError:
        return False
