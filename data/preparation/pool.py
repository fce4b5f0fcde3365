"""Worker processes that never outlive their parent."""

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

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
IN_FLIGHT = 4  # jobs per worker that are submitted in advance
CGROUPS = pathlib.Path("/sys/fs/cgroup")


def cores() -> int:
    """The number of cores that this process may use, by its affinity (taskset, Slurm) and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """The CPU quotas, in cores, of the cgroups that contain this process (cgroup version 2, or `cpu` of version 1)."""
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
                    quota, period = map(float, numbers)  # "max" or -1 if there is no limit
                    if quota > 0:
                        yield quota / period


class Pool:
    """Runs functions in `workers` processes, or in this process if `workers` is 1.

    Workers end when this process ends, even if it is killed, and at once if an exception leaves the `with` block.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            ours, self._lifeline = context.Pipe(duplex=False)  # workers read from it until it is closed
            with _interrupts_later():  # the executor starts a process that removes its semaphores at the end
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
        """Yields (job, function(*job)) for every job, in the order in which jobs finish.

        Raises:
          DataError: a worker was killed, usually because of too little memory. Errors of `function` are raised, too.
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
                "a worker process was killed, usually because of too little memory; run the same command again with "
                "fewer --workers: it resumes with the remaining work"
            ) from None


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Defers Ctrl-C and similar signals until after the block. Workers that are started in the block never receive
    these signals; they end with their parent."""
    # Workers inherit the blocked signals. Blocking defers nothing in this process: other threads get them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    heard: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in END_SIGNALS:
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
    """Sets up a new worker: it ends with its parent, and libraries use one thread, because each core has a worker."""
    malloc.tune_allocator()
    os.environ["RAYON_NUM_THREADS"] = "1"

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
