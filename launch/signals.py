"""Signals ask for a save and exit code 42; a second Ctrl-C leaves at once with 130.

A thread reads which signal came from a pipe that Python's C handler writes to: that works while the main thread is in
the compiler, in a collective or in a save, where a handler written in Python would have to wait.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from launch import cli

# USR1 is Slurm's warning (sbatch --signal=USR1@120). HUP comes from a terminal that is closed, unless nohup is at work.
STOPS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOPS += (signal.SIGHUP,)


class Signals:
    """Begins to listen. Until `connect`, there is nothing to save, and a signal leaves at once with 42."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._asked = False
        self._changing = threading.Lock()
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def connect(self, stop: Callable[[], None]) -> None:
        """From now on the first signal calls `stop`, on a thread."""
        with self._changing:
            self._stop = stop

    def close(self) -> None:
        """There is nothing left to stop. At its end Python takes its handlers back: a signal would be the exit code."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        interrupts = 0
        while True:
            for number in os.read(self._pipe, 64):
                if number not in STOPS:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    os._exit(130)
                if self._asked:
                    continue
                self._asked = True
                with self._changing:
                    if self._stop is None:
                        _say(b"\nStopped before the first step; there was nothing to save.\n")
                        os._exit(cli.STOPPED)
                _say(b"\nStopping after this step; saving. Ctrl-C again leaves at once.\n")
                # Apart, so that a second Ctrl-C is heard while processes agree.
                threading.Thread(target=self._stop, name="stop", daemon=True).start()


def _say(line: bytes) -> None:
    """Waits half a second only: a terminal that stands still (Ctrl-S), or a full pipe, keeps nobody from stopping."""

    def write() -> None:
        with contextlib.suppress(OSError):  # it is closed; that is no reason not to stop either
            os.write(2, line)

    writer = threading.Thread(target=write, name="console", daemon=True)
    writer.start()
    writer.join(0.5)
