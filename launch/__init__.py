"""The commands: the only package with flags, signals and exit codes."""

import os
import sys


def _put_the_current_folder_last() -> None:
    """`python -m` searches it first, and would take a model.py or random.py there for ours or Python's."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != root:
        here = sys.path[0]  # also in an empty part of PYTHONPATH
        sys.path[:] = [root, *(path for path in sys.path if path not in (here, "")), here]


_put_the_current_folder_last()

import contextlib  # noqa: E402
from types import TracebackType  # noqa: E402
from typing import NoReturn  # noqa: E402

INTERRUPTED = 130
ENDED = 128  # plus the number of the signal, as in a shell
INTERRUPTED_LINE = "interrupted; the same command resumes the work if it can be resumed"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command is still importing also ends in one line; later cli.run does that."""
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C while Python deletes an object: it would print a traceback and ignore the request."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(2, f"\n{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


sys.excepthook = _excepthook
sys.unraisablehook = _unraisablehook
