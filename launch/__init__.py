"""What a person starts: the only place with flags, signals and exit codes."""

import os
import sys


def _put_the_current_folder_last() -> None:
    """`python -m` looks there first, where a model.py or a random.py would be taken for ours or for Python's."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != root:
        here = sys.path[0]  # also where a part of PYTHONPATH is empty
        sys.path[:] = [root, *(path for path in sys.path if path not in (here, "")), here]


_put_the_current_folder_last()

import contextlib  # noqa: E402
from types import TracebackType  # noqa: E402
from typing import NoReturn  # noqa: E402

INTERRUPTED = 130
ENDED = 128  # and the number of the signal, as in a shell
INTERRUPTED_LINE = "interrupted; start the same command again: it goes on if it can"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command still imports ends in one line, too; after that it is cli.run that does it."""
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C while Python removes an object: it would print a traceback, and go on as if nobody had asked."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"\n{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


sys.excepthook = _excepthook
sys.unraisablehook = _unraisablehook
