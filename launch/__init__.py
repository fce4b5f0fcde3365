"""The commands: the only package with flags, signals and exit codes."""

import os
import sys


def _put_the_current_folder_last() -> None:
    """`python -m` puts that folder first, so a model.py or random.py there would shadow our module or Python's."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != root:
        here = sys.path[0]  # an empty part of PYTHONPATH means the same folder
        sys.path[:] = [root, *(path for path in sys.path if path not in (here, "")), here]


_put_the_current_folder_last()

import contextlib  # noqa: E402
from types import TracebackType  # noqa: E402
from typing import NoReturn  # noqa: E402

INTERRUPTED = 130
ENDED = 128  # plus the number of the signal, as in a shell
INTERRUPTED_LINE = "interrupted; the same command resumes the work if it can be resumed"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends in one line after Ctrl-C while a command is still importing; later cli.run handles Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """Handles Ctrl-C while Python deletes an object: Python would print a traceback and ignore the Ctrl-C."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(2, f"\n{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


sys.excepthook = _excepthook
sys.unraisablehook = _unraisablehook
