"""The processes of a run, agreeing through JAX's coordination service: no device takes part, every wait has a limit.

What they agree on: that all are about to train the same thing (`check_same`, `together`), what process 0 has chosen
(`choose`), and after which step something happens that any of them asked for (`request`, `tick`).
"""

import contextlib
import itertools
import json
import logging
import platform
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from data.errors import UserError
from trainer.errors import ConfigError, Stopped

log = logging.getLogger("meshlm")
T = TypeVar("T")
TIMEOUT_S = 300.0
POLL_S = 60.0  # of a wait without a limit; only so that it is not one call for ever
PARTING_S, PARTING_LIMIT_S = 0.5, 10.0  # from a process's last word to its end; for all to say it
STOP, SAVE = "stop", "save"


class Elsewhere(UserError):
    """An error of another process, which ends this one, too."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """Every method but `request` is called by all processes, in the same order.

    Args:
      timeout_s: limit of an exchange; what is exchanged should take much less to make.

    Attributes:
      index, size: of this process, as JAX counts.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self.index, self.size, self.timeout_s = jax.process_index(), jax.process_count(), timeout_s
        self._count = itertools.count()
        self._ticks = 0
        self._due: dict[int, set[str]] = {}
        self._paused = threading.Lock()  # held while a tick is being agreed on: the loop waits in tick()
        self._listener: threading.Thread | None = None
        self._stopping = False
        self.hosts: list[str] = []
        self.hosts = self.exchange("hosts", platform.node())

    # Values

    def exchange(self, name: str, value: str) -> list[str]:
        """The value of each process. Raises Stopped, on those that are there, when one does not answer in time."""
        if self.size == 1:
            return [value]
        key = f"meshlm/{next(self._count)}/{name}"
        self._set(f"{key}/{self.index}", value)
        if self.index == 0:  # one collects, so that a large gang's traffic grows with its size and not its square
            deadline, found, missing = time.monotonic() + self.timeout_s, [], []
            for i in range(self.size):
                try:
                    found.append(self._get(f"{key}/{i}", max(deadline - time.monotonic(), 0.1)))
                except TimeoutError:
                    missing.append(i)
            self._set(f"{key}/all", json.dumps({"values": found, "missing": missing}))
        try:
            answer = json.loads(self._get(f"{key}/all", self.timeout_s + 30))
        except TimeoutError:
            answer = {"missing": [0]}
        if answer["missing"]:
            raise Stopped(
                f"process(es) {', '.join(map(self._named, answer['missing']))} did not come to {name!r} within "
                f"{self.timeout_s:.0f} s; see their logs, and start all processes again"
            )
        return answer["values"]

    def all_agree(self, name: str, yes: bool) -> bool:
        """Whether every process says yes."""
        return all(map(json.loads, self.exchange(name, json.dumps(yes))))

    def check_same(self, what: str, fields: dict[str, Any]) -> None:
        """Raises ConfigError on every process, naming hosts and fields, when `fields` are not the same on all."""
        everyone = [json.loads(text) for text in self.exchange(what, json.dumps(fields, sort_keys=True))]
        for i, theirs in enumerate(everyone):
            differing = [name for name in everyone[0] | theirs if everyone[0].get(name) != theirs.get(name)]
            if differing:
                shown = "; ".join(
                    f"{name}: {_shown(theirs.get(name))} there, {_shown(everyone[0].get(name))} on {self._named(0)}"
                    for name in differing[:5]
                )
                more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
                raise ConfigError(
                    f"{self._named(i)} has another {what}: {shown}{more}; give all the same flags, files and versions"
                )

    def together(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns; a UserError of one process ends all, with its exit code."""
        value, error = None, None
        try:
            value = function()
        except UserError as e:
            error = e
        outcomes = self.exchange(what, json.dumps([error.exit_code, str(error)] if error else None))
        if error:
            raise error
        for i, outcome in enumerate(outcomes):
            if failed := json.loads(outcome):
                raise Elsewhere(f"on {self._named(i)}: {failed[1]}", failed[0])
        return value  # type: ignore[return-value]

    def choose(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns on process 0, which alone calls it; JSON. Its UserError ends all."""
        chosen: list[T] = []

        def on_process_0() -> None:
            if self.index == 0:
                chosen.append(function())

        self.together(what, on_process_0)
        return json.loads(self.exchange(f"{what}, chosen", json.dumps(chosen))[0])[0]

    def _named(self, process: int) -> str:
        name = f"process {process}"
        return f"{self.hosts[process]} ({name})" if process < len(self.hosts) else name

    # Events

    def listen(self, asked: Callable[[], None], too_early: Callable[[], None]) -> None:
        """Begins to hear of requests. Both functions are called once at most, on threads of their own.

        Args:
          asked: as soon as this process hears that all should stop; they may never come to agree on when.
          too_early: when all have agreed, and none has ticked yet.
        """
        self._asked, self._too_early = asked, too_early
        if self.size > 1:
            self._listener = threading.Thread(target=self._listen, name="requests", daemon=True)
            self._listener.start()

    def request(self, event: str) -> None:
        """Asks that tick() return `event` on all processes, at the same tick. From any thread of any process."""
        self._heard(event)
        if self.size == 1:
            with self._paused:
                started = self._agree(event, [self._ticks])
            self._agreed(event, started)
            return
        for k in itertools.count():  # the first place in the list of events that is still free
            with contextlib.suppress(_Taken):
                return self._set(f"meshlm/events/{k}", event)

    def tick(self) -> set[str]:
        """The events that all have agreed to take up now. Called after every step and every piece of an evaluation."""
        with self._paused:
            self._ticks += 1
            return self._due.pop(self._ticks, set())

    def close(self) -> None:
        """No more events; called by all once the loop has ended."""
        if self._listener is not None:
            if self.index == 0:
                self.request("end")
            self._listener.join(self.timeout_s)

    def part(self) -> None:
        """Before os._exit, on all that end for the same reason. Process 0, whose service the others need, goes last.

        jax.distributed.shutdown would take the service away from under a main thread that is busy, and wait for one
        that ends for another reason.
        """
        if self.size == 1:
            return
        deadline = time.monotonic() + PARTING_LIMIT_S
        with contextlib.suppress(jax.errors.JaxRuntimeError, TimeoutError, _Taken):
            if self.index:
                self._set(f"meshlm/parted/{self.index}", "")
                return
            for i in range(1, self.size):
                self._get(f"meshlm/parted/{i}", max(deadline - time.monotonic(), 0.1))
            time.sleep(PARTING_S)

    def _listen(self) -> None:
        """As JAX's preemption service does it: all loops are held, and the tick after the furthest is taken."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and with it the run
            for k in itertools.count():
                while (event := self._poll(f"meshlm/events/{k}")) is None:
                    pass
                if event == "end":
                    return
                self._heard(event)
                with self._paused:
                    self._set(f"meshlm/ticks/{k}/{self.index}", str(self._ticks))
                    _client().wait_at_barrier(f"meshlm/ticks/{k}", int(1000 * self.timeout_s))
                    ticks = [int(value) for _, value in _client().key_value_dir_get(f"meshlm/ticks/{k}/")]
                    started = self._agree(event, ticks)
                self._agreed(event, started)

    def _agree(self, event: str, ticks: list[int]) -> bool:
        self._due.setdefault(max(ticks) + 1, set()).add(event)
        return max(ticks) > 0

    def _heard(self, event: str) -> None:
        if event == STOP and not self._stopping:
            self._stopping = True
            threading.Thread(target=self._asked, name="asked to stop", daemon=True).start()

    def _agreed(self, event: str, started: bool) -> None:
        if event == STOP and not started:
            threading.Thread(target=self._too_early, name="stopped too early", daemon=True).start()

    def _poll(self, key: str) -> str | None:
        try:
            return self._get(key, POLL_S)
        except TimeoutError:
            return None

    def _set(self, key: str, value: str) -> None:
        try:
            _client().key_value_set(key, value)
        except jax.errors.JaxRuntimeError as e:
            if "ALREADY_EXISTS" in str(e):
                raise _Taken(key) from None
            raise

    def _get(self, key: str, timeout_s: float) -> str:
        try:
            return _client().blocking_key_value_get(key, int(1000 * timeout_s))
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" in str(e):
                raise TimeoutError(key) from None
            raise


class _Taken(Exception):
    pass


def _client() -> Any:
    from jax._src import distributed  # the service has no public door

    return distributed.global_state.client


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
