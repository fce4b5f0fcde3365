"""What an error of reading proves: that a file is damaged, or only that it cannot be read here and now.

Damaged is what was read and is wrong: a checksum, a digest, a length, a file that is not there. An error of the
operating system (EIO, ESTALE, EMFILE, EACCES, …) says nothing about the file, whatever a library makes of it.
"""

import errno
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from trainer.errors import CheckpointError, ConfigError, Stopped

T = TypeVar("T")
PAUSES_S = (0.5, 2.0, 8.0)  # before reading is tried again
MISSING = (errno.ENOENT, errno.ENOTDIR)
FORBIDDEN = (errno.EACCES, errno.EPERM)
NOT_A_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Trying again does not help with these when something is written.
LASTING = (
    *MISSING,
    *FORBIDDEN,
    *NOT_A_FILE,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EINVAL,
)
WRONG = re.compile(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND)\b")  # tensorstore's words for cut, changed and missing files
OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # and for an error of the operating system
# And for those of an object store, of which others may pass; INVALID_ARGUMENT it does not say.
STORE_LASTING = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|UNIMPLEMENTED)\b")
STORE_PASSING = re.compile(
    r"\b(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|RESOURCE_EXHAUSTED|INTERNAL|UNKNOWN)\b|no answer within"
)


class Damaged(CheckpointError):
    """What was read is provably not what was written."""


class Suspect(CheckpointError):
    """The reader fails for a reason that proves nothing: damage, or another version of a library."""


class Unreadable(CheckpointError):
    """The operating system refuses. Unless it denies access, or there is no file, the same command may work (42)."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def cannot_read(error: OSError, path: os.PathLike[str]) -> Unreadable:
    lasts = error.errno in (*FORBIDDEN, *NOT_A_FILE)
    code = CheckpointError.exit_code if lasts else Stopped.exit_code
    return Unreadable(f"{error.filename or path} cannot be read: {error.strerror or error}; nothing was moved", code)


def judged(path: os.PathLike[str], error: BaseException) -> Damaged | Suspect | Unreadable:
    """What `error`, raised while the files below `path` were read, proves about them."""
    chain = list(_chain(error))
    for e in chain:
        code = _os_code(e)
        if code is not None and code not in MISSING:
            return cannot_read(OSError(code, os.strerror(code)), path)
    reason = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:300]
    try:  # Orbax takes a file that it may not look at for one that is not there
        _read_a_byte_of_each_file(path)
    except OSError as e:
        return cannot_read(e, path)
    wrong = (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)
    if any(isinstance(e, wrong) or WRONG.search(str(e)) for e in chain):
        return Damaged(f"checkpoint {path} is damaged: {reason}")
    return Suspect(f"checkpoint {path} cannot be read: {reason}")


def patiently(function: Callable[[], T], path: os.PathLike[str]) -> T:
    """What `function` returns. It is called again when it cannot read, and once when it finds something wrong.

    Raises Damaged, Suspect, Unreadable.
    """
    problem: CheckpointError
    for i, pause_s in enumerate((*PAUSES_S, None)):
        try:
            return function()
        except OSError as e:
            problem = cannot_read(e, path)
        except Unreadable as e:
            problem = e
        except (Damaged, Suspect) as e:
            if i:
                raise
            problem = e
        if pause_s is not None:
            time.sleep(pause_s)
    raise problem


def passes(error: BaseException) -> bool:
    """Whether the same may succeed later: by the error's number, or by the words of an object store's client."""
    code, text = _os_code(error), str(error)
    if code is not None:
        return code not in LASTING
    if STORE_LASTING.search(text):
        return False
    return isinstance(error, OSError) or STORE_PASSING.search(text) is not None


def again(function: Callable[[], T], errors: tuple[type[Exception], ...] = (OSError,)) -> T:
    """What `function`, which may be called again, returns. It is when one of `errors` is raised that may pass."""
    for pause_s in PAUSES_S:
        try:
            return function()
        except errors as e:
            if not passes(e):
                raise
            time.sleep(pause_s)
    return function()


def writing(function: Callable[[], T], path: os.PathLike[str], what: str = "cannot use") -> T:
    """What `function`, which may be called again, returns. It writes files, or reads some that are no checkpoint's.

    Args:
      path: where an error does not name its file.
      what: begins the message; the file follows.

    Raises:
      ConfigError: that cannot be done there.
      Unreadable: not here and now.
    """
    try:
        return again(function)
    except OSError as e:
        file, reason = e.filename or path, e.strerror or e
        if passes(e):
            raise Unreadable(f"{what} {file} just now: {reason}; the same command goes on", Stopped.exit_code) from None
        raise ConfigError(f"{what} {file}: {reason}; mend that, or name another --workdir") from None


def is_there(path: pathlib.Path) -> bool:
    """As exists(), which says False of what it may not look at in some versions of Python. Raises OSError."""
    try:
        path.stat()
    except OSError as e:
        if e.errno in MISSING:
            return False
        raise
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _os_code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _read_a_byte_of_each_file(folder: os.PathLike[str]) -> None:
    def fail(error: OSError) -> None:
        raise error

    for at, _, names in os.walk(folder, onerror=fail):
        for name in names:
            with open(os.path.join(at, name), "rb") as file:
                file.read(1)
