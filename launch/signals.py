"""A signal requests a save and exit code 42; a second Ctrl-C exits at once with 130.

A thread reads signal numbers from a pipe that Python's C handler writes to. This works while the main thread is in the
compiler, a collective or a save, when a handler written in Python would have to wait.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from launch import cli

# USR1 is a usual warning from Slurm (sbatch --signal=USR1@120). A closed terminal sends HUP, unless nohup ignores it.
STOPS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOPS += (signal.SIGHUP,)


class StopSignals:
    """Starts to listen. Until `connect` there is nothing to save, and a signal ends the process at once with 42."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._requested = False
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
        """Ignores signals from now on: at exit Python restores the default handlers, with which a signal kills."""
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
                if self._requested:
                    continue
                self._requested = True
                with self._changing:
                    if self._stop is None:
                        _print(b"\nStopped before the first step; there was nothing to save.\n")
                        os._exit(cli.STOPPED)
                _print(b"\nStopping after this step; saving. Ctrl-C again exits at once.\n")
                # A separate thread, so that this one sees a second Ctrl-C while the processes agree on a step.
                threading.Thread(target=self._stop, name="stop", daemon=True).start()


def _print(line: bytes) -> None:
    """Waits for half a second at most: a paused terminal (Ctrl-S) or a full pipe must not prevent a stop."""

    def write() -> None:
        with contextlib.suppress(OSError):  # a closed stderr must not prevent a stop either
            os.write(2, line)

    writer = threading.Thread(target=write, name="console", daemon=True)
    writer.start()
    writer.join(0.5)
