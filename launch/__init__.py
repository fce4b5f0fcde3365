"""What a person starts: the only place with flags, signals and exit codes."""

import os
import sys
from types import TracebackType

INTERRUPTED = 130
INTERRUPTED_LINE = "interrupted; start the same command again: it goes on if it can"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command still imports ends in one line, too; after that it is cli.run that does it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    os.write(2, f"\n{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


sys.excepthook = _excepthook
