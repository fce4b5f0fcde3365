"""What a read error proves: that a file is damaged, or only that it cannot be read here and now.

A file is damaged if its checksum, its digest or its length is wrong, or if the file is missing. An error of the
operating system (EIO, ESTALE, EMFILE, EACCES, …) proves nothing about the file, whatever type a library gives it.
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
PAUSES_S = (0.5, 2.0, 8.0)  # pauses before retries
MISSING = (errno.ENOENT, errno.ENOTDIR)
FORBIDDEN = (errno.EACCES, errno.EPERM)
NOT_A_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Errors of writing that a retry cannot cure.
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
# TensorStore's words for truncated, changed and missing files; and those with which it reports the operating system's
# error number.
WRONG = re.compile(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND)\b")
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# TensorStore's words for errors of an object store: the errors that last, and those that may pass.
STORE_LASTING = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|UNIMPLEMENTED)\b")
STORE_PASSING = re.compile(
    r"\b(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|RESOURCE_EXHAUSTED|INTERNAL|UNKNOWN)\b|no answer within"
)


class Damaged(CheckpointError):
    """What was read is not what was written."""


class Suspect(CheckpointError):
    """The reader failed, but the cause is not proved: it may be damage, or another version of a library."""


class Unreadable(CheckpointError):
    """The operating system refused to read. If that may pass, the exit code is 42: the same command may work later."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def cannot_read(error: OSError, path: os.PathLike[str]) -> Unreadable:
    lasts = error.errno in (*FORBIDDEN, *NOT_A_FILE)
    code = CheckpointError.exit_code if lasts else Stopped.exit_code
    return Unreadable(f"{error.filename or path} cannot be read: {error.strerror or error}; nothing was moved", code)


def diagnose(path: os.PathLike[str], error: BaseException) -> Damaged | Suspect | Unreadable:
    """What `error`, raised by a reader of the files below `path`, proves about them."""
    chain = list(_chain(error))
    for e in chain:
        code = _os_code(e)
        if code is not None and code not in MISSING:
            return cannot_read(OSError(code, os.strerror(code)), path)
    reason = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:300]
    try:  # Orbax reports a file as missing if it lacks the permission to read it
        _read_a_byte_of_each_file(path)
    except OSError as e:
        return cannot_read(e, path)
    wrong = (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)
    if any(isinstance(e, wrong) or WRONG.search(str(e)) for e in chain):
        return Damaged(f"checkpoint {path} is damaged: {reason}")
    return Suspect(f"checkpoint {path} cannot be read: {reason}")


def patiently(function: Callable[[], T], path: os.PathLike[str]) -> T:
    """What `function` returns. It is called again if it cannot read, and once more if it finds damage.

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
    """Whether a later retry may succeed, judged by the error's number or by the message of an object store's client."""
    code, text = _os_code(error), str(error)
    if code is not None:
        return code not in LASTING
    if STORE_LASTING.search(text):
        return False
    return isinstance(error, OSError) or STORE_PASSING.search(text) is not None


def again(function: Callable[[], T], errors: tuple[type[Exception], ...] = (OSError,)) -> T:
    """What `function` returns. It is called again if it raises one of `errors` and that may pass."""
    for pause_s in PAUSES_S:
        try:
            return function()
        except errors as e:
            if not passes(e):
                raise
            time.sleep(pause_s)
    return function()


def writing(function: Callable[[], T], path: os.PathLike[str], what: str = "cannot use") -> T:
    """What `function` returns. It writes files, or reads files other than those of checkpoints. It may be called again.

    Args:
      path: the file that the message names if the error has no file name.
      what: the beginning of the message; the name of the file follows.

    Raises:
      ConfigError: the error lasts.
      Unreadable: the error may pass.
    """
    try:
        return again(function)
    except OSError as e:
        file, reason = e.filename or path, e.strerror or e
        if passes(e):
            raise Unreadable(
                f"{what} {file} just now: {reason}; the same command resumes later", Stopped.exit_code
            ) from None
        raise ConfigError(f"{what} {file}: {reason}; fix that, or name another --workdir") from None


def is_there(path: pathlib.Path) -> bool:
    """Like exists(), which however is False in some versions of Python if permission is denied. Raises OSError."""
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
