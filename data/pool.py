"""Worker processes that never outlive their parent; or none, for little work."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data import allocator
from data.errors import DataError

IN_FLIGHT = 4  # jobs a worker that are handed over ahead of time


class Pool:
    """Runs functions in `workers` processes, or in this one when that is 1."""

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = (
            None
            if workers == 1
            else concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
            )
        )

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

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
                    running[self._executor.submit(function, *job)] = job
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except concurrent.futures.BrokenExecutor:
            raise DataError(
                "a worker process was killed, most often for want of memory; start the same command again with fewer "
                "--workers: it goes on with what is left"
            ) from None


def _start(parent: int) -> None:
    """In a new worker: Ctrl-C is the parent's business, threads are the other workers', and its death is noticed."""
    allocator.tune_allocator()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
