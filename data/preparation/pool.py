"""Worker processes that never outlive their parent; or none, for little work."""

import collections
import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from data.errors import DataError
from data.storage import malloc

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
IN_FLIGHT = 4  # jobs a worker that are handed over ahead of time
CGROUPS = pathlib.Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores that this process may use: its affinity (taskset, Slurm), or its cgroup's share (containers)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores of each cgroup around this process that has a quota (cgroups of version 2, and `cpu` of version 1)."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = CGROUPS / "cpu" if controllers else CGROUPS
            inner = pathlib.PurePath(name.lstrip("/"))
            for folder in (root / inner, *(root / outer for outer in inner.parents), root):
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        numbers = [(folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period")]
                    else:
                        numbers = (folder / "cpu.max").read_text().split()
                    quota, period = map(float, numbers)  # without a limit "max", or -1
                    if quota > 0:
                        yield quota / period


class Pool:
    """Runs functions in `workers` processes, or in this one when that is 1.

    Workers end when this process does, however it ends, and at once when the `with` block is left by an exception.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            ours, self._lifeline = context.Pipe(duplex=False)  # workers read it, and see when it is closed
            with _interrupts_later():  # it starts the process that removes its semaphores in the end
                self._executor = concurrent.futures.ProcessPoolExecutor(
                    workers, context, initializer=_start, initargs=(ours,)
                )

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._executor is None:
            return
        if kind is not None:
            self._lifeline.close()
        self._executor.shutdown(cancel_futures=True)
        self._lifeline.close()

    def run(self, function: Callable, jobs: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        """(job, function(*job)) of every job, as they finish.

        Raises:
          DataError: a worker was killed, most often for want of memory; and whatever `function` raises.
        """
        if self._executor is None:
            yield from ((job, function(*job)) for job in jobs)
            return
        running: dict[concurrent.futures.Future, tuple] = {}
        waiting = collections.deque(jobs)
        try:
            while waiting or running:
                while waiting and len(running) < IN_FLIGHT * self.workers:
                    job = waiting.popleft()
                    with _interrupts_later():
                        running[self._executor.submit(function, *job)] = job
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except concurrent.futures.BrokenExecutor:
            raise DataError(
                "a worker process was killed, most often for want of memory; start the same command again with fewer "
                "--workers: it goes on with what is left"
            ) from None


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C and the like reach this process after the block, and never a worker that is started in it, which ends with
    its parent."""
    # Workers inherit what is blocked. That does not hold it back from this process: its other threads hear it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    heard: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDS:
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        if heard:
            handlers[heard[0]](heard[0], None)


def _start(lifeline: Connection) -> None:
    """In a new worker: threads are the other workers', and the end of its parent is its own."""
    malloc.tune_allocator()
    os.environ["RAYON_NUM_THREADS"] = "1"

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
