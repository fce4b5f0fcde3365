"""The progress line. On a terminal it is rewritten in place; elsewhere a new line is printed every SECONDS."""

import contextlib
import logging
import sys
import time

SECONDS = 10  # between lines if the console is not a terminal
TERMINAL_SECONDS = 0.2

log = logging.getLogger("meshlm")


class StatusLine:
    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._last = -float("inf")
        self._shown = False

    def show(self, line: str, *, now: bool = False) -> None:
        """Shows `line` if enough time has passed since the last line, or if `now` is true."""
        time_now = time.monotonic()
        if not now and time_now - self._last < (TERMINAL_SECONDS if self.terminal else SECONDS):
            return
        self._last = time_now
        if self.terminal:
            _write(f"\r\x1b[K{line}")
            self._shown = True
        else:
            log.info("%s", line)

    def clear(self) -> None:
        """Ends the line that is rewritten in place, so that the next message starts on a new one."""
        if self._shown:
            _write("\n")
            self._shown = False


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed; the run continues
        print(text, end="", flush=True)


def duration(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
