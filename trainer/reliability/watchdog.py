"""Notices a run that is stuck, says where, and leaves with 42, so that its peers and its launcher notice too.

Nothing here imports JAX: what is watched may be JAX. The thread that watches touches no file before it has found a
stall, as a hung file system is one of the things it is for; heartbeats, RUN/heartbeat.<process>.json, have their own.
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

log = logging.getLogger("meshlm")

STOPPED = 42  # as in launch/cli.py: stopped, and resumable by the same command
STDERR = 2  # sys.stderr may be wrapped, or locked by the thread that is stuck
LOOK_S = 1.0
# Between heartbeats of a process; but all processes write so many a second at most, each a new file and a rename on a
# file system that they share.
HEARTBEAT_S, HEARTBEATS_A_SECOND = 5.0, 100
LAST_WORDS_S = 10.0  # to write where it is stuck; then it leaves without
LONGEST_TIMER_S = 7 * 86400.0  # faulthandler refuses far longer ones, such as inf
MEDIAN_STEPS = 100
SAVING, WAITING = "saving", "waiting for other processes"


class Mark(NamedTuple):
    """The last sign of life. Replaced as a whole, so that another thread never sees half of one."""

    phase: str
    step: int
    at: float  # seconds of the clock
    counts: bool  # whether the time from here to the next step() is that of a step


class Pace:
    """Where a run is, how long it may stay there, and how long it has. `clock` gives seconds.

    Attributes:
      save_limit_s: how long a save may take; trainer/reliability/checkpoint.py ends it then.
    """

    def __init__(self, config: WatchdogConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self.save_limit_s: Callable[[], float] = lambda: 0.0
        self._step_s: collections.deque[float] = collections.deque(maxlen=MEDIAN_STEPS)
        self._mark = self._seen = Mark("starting", 0, clock(), False)
        self._looked_at, self._stuck_s = clock(), 0.0

    def step(self, n: int) -> None:
        """Step n is finished; whatever the phase was, it is "training" from here."""
        now, mark = self._clock(), self._mark
        if mark.counts:
            self._step_s.append(now - mark.at)
        self._mark = Mark("training", n, now, True)

    def tick(self) -> None:
        """Something that is no step has come along: a batch of an evaluation, a file of a checkpoint."""
        self._mark = self._mark._replace(at=self._clock(), counts=False)

    def phase(self, name: str) -> contextlib.ExitStack:
        """From here on the run does `name`; "training" has the limit of a step, others config.slow_s.

        SAVING may take what a save may, beside that. WAITING has twice the longest limit of a peer: what is stuck there
        is found there first, and ends all.

        Used in a with statement, the phase before it comes back at the end.
        """
        back = contextlib.ExitStack()  # dropped where nobody enters it
        back.callback(self._enter, self._mark.phase)
        self._enter(name)
        return back

    def _enter(self, name: str) -> None:
        self._mark = Mark(name, self._mark.step, self._clock(), False)

    def limit_s(self, phase: str, counts: bool = True) -> float:
        """Of a whole step; of the first one after another phase it is the other's, in which a peer may still be."""
        step_s = self._step_s.copy()
        if phase == SAVING:
            return self._config.slow_s + self.save_limit_s()
        if phase == WAITING:
            return 2 * max(self.limit_s(SAVING), self.limit_s("training"))
        if phase != "training" or not counts or not step_s:
            return self._config.slow_s
        return max(self._config.min_s, self._config.factor * statistics.median(step_s))

    def look(self) -> tuple[Mark, float]:
        """The last sign of life, and the seconds since then. To be called every LOOK_S, by one thread.

        Time in which this thread did not run either (Ctrl-Z, a laptop that slept) counts as two looks at most. It is
        left out rather than taken for a sign of life: on a crowded machine, late now and then, a stall is still found.
        """
        mark, now = self._mark, self._clock()
        before = self._stuck_s if mark is self._seen else 0.0
        self._stuck_s = before + min(now - max(mark.at, self._looked_at), 2 * LOOK_S)
        self._seen, self._looked_at = mark, now
        return mark, self._stuck_s


class Watchdog(Pace):
    """Watches this process from its construction to close().

    Args:
      run: where heartbeat and log lie; need not exist, and what cannot be written there is left out.
      config: the limits.
      process, of: number of this process, for the names of its files, and of all.
      leave: called with 42 after a stall, by a thread; must end the process.

    A main thread that is stuck and holds the GIL stops the threads here as well. For that there is faulthandler's
    timer, which needs no GIL: it prints the stacks and leaves with 1 (it has no other code), not 42. It cannot tell a
    stuck process from one that was stopped and goes on, so it waits for 2 * config.slow_s whatever the phase.
    """

    def __init__(
        self,
        run: pathlib.Path,
        config: WatchdogConfig,
        process: int,
        leave: Callable[[int], None] = os._exit,
        of: int = 1,
    ):
        super().__init__(config)
        self._every_s = max(HEARTBEAT_S, of / HEARTBEATS_A_SECOND)
        self._first_s = self._every_s * (process % of) / of  # not all at once
        self._heartbeat, self._log = run / f"heartbeat.{process}.json", run / f"log.{process}.txt"
        self._leave, self._host = leave, socket.gethostname()
        self._closed, self._writing = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in (self._watch, self._beat)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends watching; the last heartbeat says "ended"."""
        self._closed.set()
        for thread in self._threads:
            thread.join(LAST_WORDS_S)  # a heartbeat may hang in its file system; that is no reason to stay
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            timer_s = min(2 * self._config.slow_s, LONGEST_TIMER_S)
            faulthandler.dump_traceback_later(timer_s, exit=True, file=STDERR)  # instead of the one set before
            mark, stuck_s = self.look()
            limit_s = self.limit_s(mark.phase, mark.counts)
            if stuck_s > limit_s:
                self._stalled(mark, stuck_s, limit_s)
                return

    def _stalled(self, mark: Mark, stuck_s: float, limit_s: float) -> None:
        # The last words may hang like the rest: on the file system, a full pipe, or the lock of a log handler.
        deadline = threading.Timer(LAST_WORDS_S, self._leave, [STOPPED])
        deadline.daemon = True
        try:
            deadline.start()
            self._mark = mark._replace(phase=f"stalled: {mark.phase}")
            log.error(
                "error: stuck: %s for %.1f s after step %d, and the limit is %.1f s; leaving with %d, to be started "
                "again. Where each thread is stands on stderr and in %s",
                *(mark.phase, stuck_s, mark.step, limit_s, STOPPED, self._log),
            )
            faulthandler.dump_traceback(STDERR)
            with contextlib.suppress(OSError), self._log.open("ab") as file:
                faulthandler.dump_traceback(file)
            for handler in log.handlers:
                handler.flush()
            self._write_heartbeat(self._mark)
            deadline.cancel()
        finally:
            self._leave(STOPPED)

    def _beat(self) -> None:
        phase, wrote, due = "", -float("inf"), 0.0
        first_s = self._first_s
        while not self._closed.is_set():
            mark, now = self._mark, time.monotonic()
            # Another phase is written at once, by thousands of processes soon: all come to it at one time.
            if now >= due or (mark.phase != phase and now - wrote >= self._every_s / 5):
                self._write_heartbeat(mark)
                phase, wrote, due = mark.phase, now, now + self._every_s + first_s
                first_s = 0.0
            self._closed.wait(LOOK_S)
        self._write_heartbeat(self._mark._replace(phase="ended"))

    def _write_heartbeat(self, mark: Mark) -> None:
        """Whole or not at all for who reads it, but not synced: after a power cut nobody asks for it."""
        values = {
            "step": mark.step,
            "phase": mark.phase,
            "seconds": round(time.monotonic() - mark.at, 1),  # in the phase, or since its last sign of life
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": self._host,
            "pid": os.getpid(),
        }
        partial = self._heartbeat.with_suffix(".partial")
        with self._writing, contextlib.suppress(OSError):
            partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
            os.replace(partial, self._heartbeat)


def dump_on_quit(log_path: pathlib.Path | None) -> None:
    """kill -QUIT, or Ctrl-\\, writes the stacks of all threads and the process goes on, even one that is stuck.

    They go to the end of `log_path`; without one, or where it cannot be opened, to stderr.
    """
    where = STDERR
    if log_path is not None:
        with contextlib.suppress(OSError):
            where = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)  # open for good
    faulthandler.register(signal.SIGQUIT, file=where, all_threads=True, chain=False)
