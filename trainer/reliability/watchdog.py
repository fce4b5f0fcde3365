"""Detects a run that is stuck, logs its stacks, and exits with 42, so that its peers and its launcher notice, too.

This module does not import JAX, because JAX may be what is stuck. The watching thread uses no file before it has found
a stall, because a hung file system is one of the causes. Another thread writes RUN/heartbeat.<process>.json.
"""

import collections
import contextlib
import datetime
import faulthandler
import json
import logging
import os
import pathlib
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from trainer.config import WatchdogConfig
from trainer.errors import Stopped

log = logging.getLogger("meshlm")

STDERR = 2  # sys.stderr may be wrapped, or locked by the thread that is stuck
CHECK_S = 1.0  # seconds between two checks
HEARTBEAT_S = 5.0  # seconds between two heartbeats of a process
HEARTBEATS_A_SECOND = 100  # the most of all processes: each is a new file and a rename on a shared file system
DUMP_LIMIT_S = 10.0  # the time for writing the stacks; after it, the process exits without them
LONGEST_TIMER_S = 7 * 86400.0  # faulthandler refuses far longer timers, such as inf
MEDIAN_STEPS = 100  # steps whose median time sets the limit of a step
SAVING, WAITING = "saving", "waiting for other processes"


class Mark(NamedTuple):
    """The last progress of the main thread. It is replaced as a whole, so that other threads never see half of it."""

    phase: str
    step: int
    at: float  # time of the clock, in seconds
    counts: bool  # whether the time from here to the next step() is the time of a step


class Pace:
    """The phase of a run, its time limit, and the time without progress. `clock` returns seconds.

    Attributes:
      save_limit_s: returns how long a save may take; trainer/reliability/checkpoint.py ends it then.
    """

    def __init__(self, config: WatchdogConfig, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        self.save_limit_s: Callable[[], float] = lambda: 0.0
        self._step_s: collections.deque[float] = collections.deque(maxlen=MEDIAN_STEPS)
        self._mark = Mark("starting", 0, clock(), False)
        # What the last check saw: the mark, the time, and for how long there was no progress.
        self._checked_mark = self._mark
        self._checked_at = clock()
        self._stuck_s = 0.0

    def step(self, n: int) -> None:
        """Notes that step n is finished; from here, the phase is "training"."""
        now, mark = self._clock(), self._mark
        if mark.counts:
            self._step_s.append(now - mark.at)
        self._mark = Mark("training", n, now, True)

    def tick(self) -> None:
        """Notes progress other than a train step: a batch of an evaluation, or a file of a checkpoint."""
        self._mark = self._mark._replace(at=self._clock(), counts=False)

    def phase(self, name: str) -> contextlib.ExitStack:
        """Starts phase `name`. In a with statement, the previous phase is restored at the end.

        Time limits: "training" has that of a step, other phases have config.slow_s. SAVING adds the limit of a save.
        WAITING has twice the longest limit of a peer, so that a stuck peer notices first, and ends all processes.
        """
        back = contextlib.ExitStack()  # has no effect unless it is entered
        back.callback(self._enter, self._mark.phase)
        self._enter(name)
        return back

    def _enter(self, name: str) -> None:
        self._mark = Mark(name, self._mark.step, self._clock(), False)

    def limit_s(self, phase: str, counts: bool = True) -> float:
        """Time limit for `phase`; `counts` as in Mark.

        The first step after another phase gets config.slow_s, because a peer may still be in that phase.
        """
        step_s = self._step_s.copy()
        if phase == SAVING:
            return self._config.slow_s + self.save_limit_s()
        if phase == WAITING:
            return 2 * max(self.limit_s(SAVING), self.limit_s("training"))
        if phase != "training" or not counts or not step_s:
            return self._config.slow_s
        return max(self._config.min_s, self._config.factor * statistics.median(step_s))

    def check(self) -> tuple[Mark, float]:
        """The last mark, and for how many seconds there was no progress. One thread calls it every CHECK_S.

        If this thread did not run either (Ctrl-Z, a laptop that slept), that time counts as two checks at most. It does
        not count as progress, so that a stall is still found on a busy machine, on which checks are late.
        """
        mark, now = self._mark, self._clock()
        before = self._stuck_s if mark is self._checked_mark else 0.0
        self._stuck_s = before + min(now - max(mark.at, self._checked_at), 2 * CHECK_S)
        self._checked_mark = mark
        self._checked_at = now
        return mark, self._stuck_s


class Watchdog(Pace):
    """Watches this process from its construction to close().

    A main thread that is stuck while it holds the GIL stops the watching threads as well. For that case there is
    faulthandler's timer, which does not need the GIL: it prints the stacks and exits with 1 (it has no other code),
    not 42. It cannot distinguish a stuck process from one that was suspended and continued, so it waits
    2 * config.slow_s in any phase.

    Args:
      run_dir: folder of the heartbeat and the log. It need not exist; what cannot be written there is left out.
      config: the limits.
      process: number of this process, for the names of its files.
      of: number of processes.
      leave: called with 42 after a stall, by a thread; must end the process.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        config: WatchdogConfig,
        process: int,
        *,
        leave: Callable[[int], None] = os._exit,
        of: int = 1,
    ):
        super().__init__(config)
        self._every_s = max(HEARTBEAT_S, of / HEARTBEATS_A_SECOND)
        self._first_s = self._every_s * (process % of) / of  # so that processes do not all write at the same time
        self._heartbeat = run_dir / f"heartbeat.{process}.json"
        self._log = run_dir / f"log.{process}.txt"
        self._leave = leave
        self._host = socket.gethostname()
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in (self._watch, self._beat)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends watching; the last heartbeat says "ended"."""
        self._closed.set()
        for thread in self._threads:
            thread.join(DUMP_LIMIT_S)  # writing a heartbeat may hang in the file system
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_S):
            timer_s = min(2 * self._config.slow_s, LONGEST_TIMER_S)
            faulthandler.dump_traceback_later(timer_s, exit=True, file=STDERR)  # replaces the previous timer
            mark, stuck_s = self.check()
            limit_s = self.limit_s(mark.phase, mark.counts)
            if stuck_s > limit_s:
                self._stalled(mark, stuck_s, limit_s)
                return

    def _stalled(self, mark: Mark, stuck_s: float, limit_s: float) -> None:
        # Writing the report may hang, too: on the file system, a full pipe, or the lock of a log handler.
        deadline = threading.Timer(DUMP_LIMIT_S, self._leave, [Stopped.exit_code])
        deadline.daemon = True
        try:
            deadline.start()
            self._mark = mark._replace(phase=f"stalled: {mark.phase}")
            log.error(
                "error: stuck: %s for %.1f s after step %d, and the limit is %.1f s; exiting with %d, to be started "
                "again. The stacks of all threads are on stderr and in %s",
                *(mark.phase, stuck_s, mark.step, limit_s, Stopped.exit_code, self._log),
            )
            faulthandler.dump_traceback(STDERR)
            with contextlib.suppress(OSError), self._log.open("ab") as file:
                faulthandler.dump_traceback(file)
            for handler in log.handlers:
                handler.flush()
            self._write_heartbeat(self._mark)
            deadline.cancel()
        finally:
            self._leave(Stopped.exit_code)

    def _beat(self) -> None:
        phase, wrote, due = "", -float("inf"), 0.0
        first_s = self._first_s
        while not self._closed.is_set():
            mark, now = self._mark, time.monotonic()
            # A new phase is written sooner, but not at once, because thousands of processes enter it at the same time.
            if now >= due or (mark.phase != phase and now - wrote >= self._every_s / 5):
                self._write_heartbeat(mark)
                phase, wrote, due = mark.phase, now, now + self._every_s + first_s
                first_s = 0.0
            self._closed.wait(CHECK_S)
        self._write_heartbeat(self._mark._replace(phase="ended"))

    def _write_heartbeat(self, mark: Mark) -> None:
        """Replaces the file atomically. It is not synced, because it is not needed after a power failure."""
        values = {
            "step": mark.step,
            "phase": mark.phase,
            "seconds": round(time.monotonic() - mark.at, 1),  # since the phase began or last progressed
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": self._host,
            "pid": os.getpid(),
        }
        partial = self._heartbeat.with_suffix(".partial")
        with self._writing, contextlib.suppress(OSError):
            partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
            os.replace(partial, self._heartbeat)


def dump_on_quit(log_path: pathlib.Path | None) -> None:
    """kill -QUIT, or Ctrl-\\, writes the stacks of all threads, even if the process is stuck; it then continues.

    The stacks are appended to `log_path`, or written to stderr if that is None or cannot be opened.
    """
    where = STDERR
    if log_path is not None:
        with contextlib.suppress(OSError):
            where = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)  # never closed
    faulthandler.register(signal.SIGQUIT, file=where, all_threads=True, chain=False)
