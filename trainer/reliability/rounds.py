"""Rounds of agreement: a value of each process goes to process 0, whose answer goes to all.

A round costs one key and two messages for each process, whatever the values are, and its keys are removed in the next
round. The values are in the key-value store of JAX's coordination service, which process 0 hosts; devices are not used.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trainer.errors import Stopped

log = logging.getLogger("meshlm")
PREFIX = "meshlm"
# Limit of each call while a process waits without a limit. A call that timed out stays in JAX's service and takes
# about 15 kB until its key is set; with this limit there are few such calls.
FOREVER_S = 1e6
WARN_AFTER_S = 60.0  # process 0 then logs the process it waits for, and logs it again after twice as long
ANSWER_GRACE_S = 30.0  # how much longer processes wait for the answer than process 0 for the values


class KeyTaken(Exception):
    """Store.set raises this if the key was set before."""


class Store(Protocol):
    """Keys and values that all processes share. Each call may raise Stopped, if the store is gone."""

    def set(self, key: str, value: str) -> None: ...  # raises KeyTaken

    def get(self, key: str, timeout_s: float) -> str: ...  # waits until the key is set; raises TimeoutError

    def below(self, folder: str) -> dict[str, str]: ...  # the keys folder/NAME that are set now, by NAME

    def remove(self, key: str) -> None: ...  # the key, and all keys below it


class ServiceStore:
    """The key-value store of JAX's coordination service."""

    def set(self, key: str, value: str) -> None:
        self._call("key_value_set", key, value)

    def get(self, key: str, timeout_s: float) -> str:
        return self._call("blocking_key_value_get", key, int(1000 * timeout_s))

    def below(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: value for key, value in self._call("key_value_dir_get", f"{folder}/")}

    def remove(self, key: str) -> None:
        self._call("key_value_delete", key)

    def _call(self, method: str, key: str, *arguments: Any) -> Any:
        import jax
        from jax._src import distributed  # there is no public API for the service

        try:
            return getattr(distributed.global_state.client, method)(key, *arguments)
        except jax.errors.JaxRuntimeError as e:
            reason = " ".join(str(e).split())[:200]
        if "ALREADY_EXISTS" in reason:
            raise KeyTaken(key)
        if "DEADLINE_EXCEEDED" in reason:
            raise TimeoutError(key)
        raise Stopped(f"process 0, through which all agree, cannot be reached: {reason}; see its log, start all again")


def wait_for(store: Store, key: str) -> str:
    """The value of a key, however long it takes; the watchdogs limit the wait (trainer/reliability/watchdog.py)."""
    while True:
        try:
            return store.get(key, FOREVER_S)
        except TimeoutError:
            continue


class Rounds:
    """The rounds with one name. All processes hold them in the same order, each process on one thread at a time."""

    def __init__(self, store: Store, name: str, index: int, size: int):
        self._store = store
        self._name = name
        self._index = index
        self._size = size
        self._count = itertools.count()

    def hold(self, value: str, answer: Callable[[Sequence[str | None]], str], limit_s: float | None = None) -> str:
        """What `answer`, called on process 0 only, returns for the values of all processes.

        A value is None if it did not arrive within `limit_s`; without a limit, this waits for all values.

        Raises TimeoutError if process 0 does not answer within the limit.
        """
        n = next(self._count)
        here = f"{PREFIX}/{self._name}/{n}"
        if self._index:
            self._store.set(f"{here}/values/{self._index}", value)
            if limit_s is None:
                return wait_for(self._store, f"{here}/answer")
            return self._store.get(f"{here}/answer", limit_s + ANSWER_GRACE_S)
        values = [value, *self._others(f"{here}/values", limit_s)]
        text = answer(values)
        self._store.set(f"{here}/answer", text)
        if n and None not in values:  # so all have read the answer of the previous round
            self._store.remove(f"{PREFIX}/{self._name}/{n - 1}")
        return text

    def _others(self, folder: str, limit_s: float | None) -> list[str | None]:
        """The values of processes 1 to N - 1.

        This waits for one key after another. After 1, 2, 4, … waits it lists all keys that are set by then, so the cost
        is N log N at worst.
        """
        end = None if limit_s is None else time.monotonic() + limit_s
        found: dict[str, str | None] = {}
        waits = 0
        for i in map(str, range(1, self._size)):
            if i in found:
                continue
            found[i] = self._wait(folder, i, end)
            waits += 1
            if not waits & (waits - 1):
                found |= self._store.below(folder)
        return [found[str(i)] for i in range(1, self._size)]

    def _wait(self, folder: str, name: str, end: float | None) -> str | None:
        start = time.monotonic()
        wait_s = WARN_AFTER_S
        while True:
            left_s = wait_s if end is None else end - time.monotonic()
            try:
                return self._store.get(f"{folder}/{name}", max(left_s, 0.001))
            except TimeoutError:
                if end is not None and time.monotonic() >= end:
                    return None
            if end is None:
                log.warning("process %s has not answered for %.0f s; waiting for it", name, time.monotonic() - start)
                wait_s *= 2
