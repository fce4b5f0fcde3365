"""An in-memory version of the store through which processes agree. Each process is a thread; the traffic is counted."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer.errors import Stopped
from trainer.reliability.coordination import Processes
from trainer.reliability.rounds import KeyTaken


class MemoryStore:
    """Behaves like trainer.reliability.rounds.ServiceStore.

    Attributes:
      values: the value of each key that is set.
      calls, sent, most_keys: the number of calls so far; the bytes of keys and values that they sent or received; the
        largest number of keys that existed at one time.
      gone: makes every call raise Stopped, as when process 0 has ended.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.calls = self.sent = self.most_keys = 0
        self.gone = False
        self._lock = threading.Lock()
        self._waiting: dict[str, threading.Event] = collections.defaultdict(threading.Event)
        self._folders: dict[str, dict[str, str]] = collections.defaultdict(dict)

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._count(key, value)
            if key in self.values:
                raise KeyTaken(key)
            self.values[key] = value
            folder, _, name = key.rpartition("/")
            self._folders[folder][name] = value
            self.most_keys = max(self.most_keys, len(self.values))
            if key in self._waiting:
                self._waiting.pop(key).set()

    def get(self, key: str, timeout_s: float) -> str:
        end = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self.gone:
                    raise Stopped("process 0 is gone")
                if key in self.values:
                    self._count(key, self.values[key])
                    return self.values[key]
                event = self._waiting[key]
            if not event.wait(max(end - time.monotonic(), 0)) and time.monotonic() >= end:
                raise TimeoutError(key)

    def below(self, folder: str) -> dict[str, str]:
        with self._lock:
            found = dict(self._folders[folder])
            self._count(folder, *found, *found.values())
            return found

    def remove(self, key: str) -> None:
        with self._lock:
            self._count(key)
            for folder in [f for f in self._folders if f == key or f.startswith(f"{key}/")]:
                for name in self._folders.pop(folder):
                    del self.values[f"{folder}/{name}"]
            folder, _, name = key.rpartition("/")
            if self.values.pop(key, None) is not None:
                del self._folders[folder][name]

    def end(self) -> None:
        """Process 0 ends: every call that waits raises Stopped."""
        self.gone = True
        for event in list(self._waiting.values()):
            event.set()

    def _count(self, *texts: str) -> None:
        if self.gone:
            raise Stopped("process 0 is gone")
        self.calls += 1
        self.sent += sum(map(len, texts))


class Gang:
    """`size` processes of a run, in threads that `all` starts."""

    def __init__(self, size: int, timeout_s: float = 60.0):
        self.store = MemoryStore()
        long_s = max(timeout_s, 60.0)  # the processes must find each other on an overloaded machine, too
        made = run_all([lambda i=i: Processes(long_s, index=i, size=size, store=self.store) for i in range(size)])
        self.processes: list[Processes] = made
        for process in self.processes:
            process.timeout_s = timeout_s

    def all(self, function: Callable[[Processes], Any], only: Sequence[int] | None = None) -> list[Any]:
        """What `function` returns or raises on each process, called at the same time."""
        chosen = [p for p in self.processes if only is None or p.index in only]
        return run_all([lambda p=p: function(p) for p in chosen])

    def close(self) -> None:
        for result in self.all(Processes.close):
            assert result is None, result


def run_all(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def call(i: int) -> None:
        try:
            results[i] = functions[i]()
        except Exception as e:
            results[i] = e

    with small_stacks():
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    return results


@contextlib.contextmanager
def small_stacks():
    """Lets thousands of threads fit into memory."""
    before = threading.stack_size(256 * 1024)
    try:
        yield
    finally:
        threading.stack_size(before)
