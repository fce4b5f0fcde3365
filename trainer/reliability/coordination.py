"""How the processes of a run agree, through process 0 (trainer/reliability/rounds.py), without using devices.

They agree on whether all are about to train the same thing (`check_same`, `run_on_all`), on what process 0 has found
(`broadcast_from_0`), on the step after which a request of any process is taken up (`request`, `tick`), and on the error
with which all exit when one process fails (`report_error`, `listen_for_errors`).
"""

import contextlib
import hashlib
import itertools
import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax

from data.errors import UserError
from trainer.errors import ConfigError, Stopped
from trainer.reliability.rounds import PREFIX, KeyTaken, Rounds, ServiceStore, Store, wait_for

log = logging.getLogger("meshlm")
T = TypeVar("T")
TIMEOUT_S = 300.0
EXIT_BARRIER_S = 10.0  # how long process 0 waits for the others in exit_barrier()
EXIT_DELAY_S = 0.5  # how long process 0 then stays, so that the others can exit before it
LONGEST_MESSAGE = 4000  # characters of an error that is sent to all
MOST_VALUES = 10  # the most values that distinct_values() sends to all
STOP, SAVE, END = "stop", "save", "end"


class RemoteError(UserError):
    """An error of another process, which ends this one, too. `process` is its number if only one process raised it."""

    def __init__(self, message: str, exit_code: int, process: int | None = None):
        super().__init__(message)
        self.exit_code = exit_code
        self.process = process


class Processes:
    """All processes call every method except `request`, `report_error` and `remote_error`, in the same order.

    Args:
      timeout_s: time limit of an agreement until `watched_by` is called. A process that reaches the limit reports this
        to all, so that no process trains without the others.
      index, size: number of this process, and of processes; None: as JAX counts.
      store: the store that all processes share; None: that of JAX's coordination service.

    Attributes:
      index, size: number of this process, and of processes.
      hosts: the name of each process's host, on process 0; empty on others.
    """

    def __init__(
        self,
        timeout_s: float = TIMEOUT_S,
        *,
        index: int | None = None,
        size: int | None = None,
        store: Store | None = None,
    ):
        self.index = jax.process_index() if index is None else index
        self.size = jax.process_count() if size is None else size
        self.timeout_s: float | None = timeout_s
        self._waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._store = store or ServiceStore()
        self._agreements = Rounds(self._store, "agreements", self.index, self.size)
        # Errors
        self._known_error: UserError | None = None  # an error that all processes have received
        self._remote_error: RemoteError | None = None
        self._has_remote_error = threading.Event()
        self._error_listener: threading.Thread | None = None
        # Events
        self._on_stop: Callable[[], None] = lambda: None
        self._on_early_stop: Callable[[], None] = lambda: None
        self._on_disconnect: Callable[[UserError], None] = lambda error: None
        self._tick_rounds = Rounds(self._store, "ticks", self.index, self.size)
        self._ticks = 0
        self._due: dict[int, set[str]] = {}  # events, by the tick at which they are taken up
        self._tick_lock = threading.Lock()  # held while all agree on a tick, so that the loop waits in tick()
        self._event = 0  # number of the event that the listener waits for
        self._event_lock = threading.Lock()  # held while a request is placed, so that the listener waits
        self._listener: threading.Thread | None = None
        self._stopping = False
        self.hosts: list[str] = []
        self.hosts = self.gather("hosts", platform.node())

    def watched_by(self, waiting: Callable[[], AbstractContextManager[Any]]) -> None:
        """From now on agreements have no time limit, because a peer may save, or fetch a copy, for hours.

        Instead, the watchdog of a process ends it if it is stuck, and JAX's heartbeat ends all if a process has died.

        Args:
          waiting: makes a context that is entered while this process waits for others.
        """
        self.timeout_s = None
        self._waiting = waiting

    # Values

    def decide(self, name: str, value: Any, decision: Callable[[list[Any]], T]) -> T:
        """What `decision`, called on process 0 only, returns for the values of all. Values and result are sent as JSON.

        Raises:
          UserError: `decision` raised it; all processes exit with its code.
          Stopped: a process did not take part in time. The others raise this, and `report_error` informs that process.
        """
        raised: list[UserError] = []

        def answer(texts: Sequence[str | None]) -> str:
            if missing := [i for i, text in enumerate(texts) if text is None]:
                return json.dumps({"missing": self._missing(name, missing)})
            try:
                return json.dumps({"decided": decision([json.loads(text) for text in texts if text is not None])})
            except UserError as e:
                raised.append(e)
                return json.dumps({"error": [e.exit_code, str(e)]})

        text = json.dumps(value)
        try:
            found = json.loads(self._hold(text, answer))
        except TimeoutError:  # the others do not know this error yet
            raise Stopped(self._missing(name, [0])) from None
        if "decided" in found:
            return found["decided"]
        if "missing" in found:
            stopped = Stopped(found["missing"])
            self._known_error = stopped if self.index else None  # process 0 reports it to the missing ones
            raise stopped
        code, message = found["error"]
        self._known_error = (
            raised[0] if raised else Stopped(message) if code == Stopped.exit_code else RemoteError(message, code)
        )
        raise self._known_error

    def _hold(self, text: str, answer: Callable[[Sequence[str | None]], str]) -> str:
        if self.size == 1:
            return answer([text])
        with self._waiting():
            return self._agreements.hold(text, answer, self.timeout_s)

    def _missing(self, name: str, missing: list[int]) -> str:
        shown = ", ".join(map(self._named, missing[:10])) + (f" and {len(missing) - 10} more" * (len(missing) > 10))
        return (
            f"process(es) {shown} did not reach {name!r} within {self.timeout_s:.0f} s; see their logs, and start "
            "all processes again, with a larger --start_timeout_s if they need longer"
        )

    def gather(self, name: str, value: str) -> list[str]:
        """The value of each process, on process 0; [] on others."""
        values: list[str] = []
        self.decide(name, value, values.extend)
        return values

    def distinct_values(self, name: str, value: str) -> list[str]:
        """The distinct values of all processes, in the order of processes, MOST_VALUES at most.

        The answer stays short even if many processes each report a different problem.
        """
        return self.decide(name, value, lambda values: list(dict.fromkeys(values))[:MOST_VALUES])

    def all_agree(self, name: str, yes: bool) -> bool:
        """Whether `yes` is True on every process."""
        return self.decide(name, yes, all)

    def check_same(self, what: str, fields: dict[str, Any]) -> None:
        """Raises ConfigError on every process, naming hosts and fields, if `fields` are not the same on all.

        Processes send hashes. If one differs, process 0 and the first process that differs then send the fields.
        """
        text = json.dumps(fields, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]

        def first_different(digests: list[str]) -> int | None:
            return next((i for i, theirs in enumerate(digests) if theirs != digests[0]), None)

        def refuse(texts: list[str]) -> None:
            i = next(i for i, theirs in enumerate(texts) if theirs and i)
            raise ConfigError(self._difference(what, i, json.loads(texts[0]), json.loads(texts[i])))

        other = self.decide(what, digest, first_different)
        if other is not None:
            self.decide(f"{what}, in full", text if self.index in (0, other) else "", refuse)

    def _difference(self, what: str, i: int, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        shown = "; ".join(
            f"{name}: {_shown(theirs.get(name))} there, {_shown(ours.get(name))} on {self._named(0)}"
            for name in names[:5]
        )
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"{self._named(i)} has another {what}: {shown}{more}; give all the same flags, files and versions"

    def run_on_all(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns on this process. If any process raises a UserError, all end with its exit code."""
        value, error = None, None
        try:
            value = function()
        except UserError as e:
            error = self._known_error = e

        def first(outcomes: list[list[Any] | None]) -> list[Any] | None:
            failed = ((i, outcome) for i, outcome in enumerate(outcomes) if outcome)
            return next(([f"on {self._named(i)}: {message}", code] for i, (message, code) in failed), None)

        failed = self.decide(what, [str(error), error.exit_code] if error else None, first)
        if error:
            raise error
        if failed:
            self._known_error = RemoteError(*failed)
            raise self._known_error
        return value  # type: ignore[return-value]

    def run_on_process_0(self, what: str, function: Callable[[], T]) -> T | None:
        """What `function` returns on process 0; None on others, which wait for process 0. Its UserError ends all."""
        return self.run_on_all(what, lambda: function() if self.index == 0 else None)

    def broadcast_from_0(self, what: str, function: Callable[[], T]) -> T:
        """What `function`, called on process 0 only, returns, sent to all as JSON. Its UserError ends all."""
        value = self.run_on_process_0(what, function)
        return self.decide(f"{what}, chosen", None, lambda _: value)  # type: ignore[return-value]

    def _named(self, process: int) -> str:
        name = f"process {process}"
        return f"{self.hosts[process]} ({name})" if process < len(self.hosts) else name

    # Errors

    def listen_for_errors(self, on_error: Callable[[RemoteError], None]) -> None:
        """Starts to listen for errors of other processes. `on_error` is called once at most, on its own thread."""

        def wait() -> None:
            if text := wait_for(self._store, f"{PREFIX}/error"):
                process, message, code = json.loads(text)
                if process != self.index and not isinstance(self._known_error, Stopped):  # else it is exiting already
                    self._remote_error = RemoteError(message, code, process)
                    self._has_remote_error.set()
                    on_error(self._remote_error)

        def listen() -> None:
            with contextlib.suppress(Stopped):  # the service is gone: on_disconnect, or JAX, ends the process
                wait()

        if self.size > 1:
            self._error_listener = threading.Thread(target=listen, name="errors of others", daemon=True)
            self._error_listener.start()

    def report_error(self, error: BaseException) -> None:
        """Sends an error that ends this process to the others, so that all exit with its code and message."""
        if self.size == 1 or error in (self._known_error, self._remote_error):
            return
        code = error.exit_code if isinstance(error, UserError) else 1
        text = " ".join(str(error).split())[:LONGEST_MESSAGE]
        text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}; see its log"
        report = [self.index, f"on {platform.node()} (process {self.index}): {text}", code]
        with contextlib.suppress(Stopped, KeyTaken):  # no process listens, or another one was first
            self._store.set(f"{PREFIX}/error", json.dumps(report))

    def remote_error(self, within_s: float) -> RemoteError | None:
        """The error of another process that ends this one; None if none arrives within `within_s` seconds."""
        self._has_remote_error.wait(within_s)
        return self._remote_error

    # Events

    def listen_for_requests(
        self,
        on_stop: Callable[[], None],
        on_early_stop: Callable[[], None],
        on_disconnect: Callable[[UserError], None],
    ) -> None:
        """Starts to listen for requests. The functions are called once at most, on threads of their own.

        Args:
          on_stop: called as soon as this process hears a request to stop. The processes may never agree on a step.
          on_early_stop: called when all have agreed to stop, but no process has called tick() yet.
          on_disconnect: called when this process can no longer hear requests. It must end the process.
        """
        self._on_stop = on_stop
        self._on_early_stop = on_early_stop
        self._on_disconnect = on_disconnect
        if self.size > 1:
            self._listener = threading.Thread(target=self._listen, name="requests", daemon=True)
            self._listener.start()

    def request(self, event: str) -> None:
        """Asks that tick() return `event` on all processes, at the same tick. Any thread of any process may call it."""
        self._note(event)
        if self.size == 1:
            with self._tick_lock:
                started = self._schedule(event, self._ticks)
            self._scheduled(event, started)
            return
        # Takes the first free number from the listener's number on. The listener must not advance meanwhile: it would
        # remove events that are done, and their numbers would seem free.
        with self._event_lock:
            for k in itertools.count(self._event):
                with contextlib.suppress(KeyTaken):
                    return self._store.set(f"{PREFIX}/events/{k}", event)

    def tick(self) -> set[str]:
        """The events that all take up at this tick. Called after every step, and after every batch of an evaluation."""
        with self._tick_lock:
            self._ticks += 1
            return self._due.pop(self._ticks, set())

    def close(self) -> None:
        """Stops listening for requests and errors of others. All processes call this when the loop has ended."""
        if self._listener is not None:
            if self.index == 0:
                self.request(END)
            with self._waiting():
                self._listener.join(self.timeout_s)
        if self._error_listener is not None:
            if self.index == 0:
                with contextlib.suppress(KeyTaken):
                    self._store.set(f"{PREFIX}/error", "")
            with self._waiting():
                self._error_listener.join(self.timeout_s)

    def exit_barrier(self, error: BaseException | None = None) -> None:
        """Barrier before os._exit, for processes that exit for the same reason.

        Process 0 hosts the coordination service, so it exits last. If `error` means that all should be started again,
        a process may have died, and process 0 does not wait for the others. (jax.distributed.shutdown would end the
        service while another main thread is busy, and would wait for a process that exits for another reason.)
        """
        if self.size == 1:
            return
        gone = isinstance(error, Stopped | RemoteError) and error.exit_code == Stopped.exit_code
        deadline = time.monotonic() + (0 if gone else EXIT_BARRIER_S)
        with contextlib.suppress(Stopped, TimeoutError, KeyTaken):
            if self.index:
                return self._store.set(f"{PREFIX}/exits/{self.index}", "")
            for i in range(1, self.size):
                self._store.get(f"{PREFIX}/exits/{i}", max(deadline - time.monotonic(), 0.001))
        if self.index == 0:
            time.sleep(EXIT_DELAY_S)

    def _listen(self) -> None:
        try:
            while (event := wait_for(self._store, f"{PREFIX}/events/{self._event}")) != END:
                self._agree_on_tick(event)
        except Stopped as e:
            self._on_disconnect(e)
        except BaseException as e:
            self._on_disconnect(Stopped(f"requests to stop and to save are not heard any more: {e!r}"))
            raise

    def _agree_on_tick(self, event: str) -> None:
        """As in JAX's preemption service, all loops are held, and the event is due one tick after the furthest of them.

        This has no time limit, which would expire on some processes but not on others. If a loop is held for too long,
        its step takes too long, and the watchdog ends the process.
        """
        self._note(event)
        with self._tick_lock:
            furthest = self._tick_rounds.hold(str(self._ticks), lambda ticks: str(max(int(t) for t in ticks if t)))
            started = self._schedule(event, int(furthest))
        self._scheduled(event, started)
        if self.index == 0 and self._event:  # all that agreed on this event are past the one before
            self._store.remove(f"{PREFIX}/events/{self._event - 1}")
        with self._event_lock:
            self._event += 1

    def _schedule(self, event: str, furthest: int) -> bool:
        """Makes the event due at the tick after `furthest`; returns whether any process has called tick() already."""
        self._due.setdefault(furthest + 1, set()).add(event)
        return furthest > 0

    def _note(self, event: str) -> None:
        if event == STOP and not self._stopping:
            self._stopping = True
            threading.Thread(target=self._on_stop, name="asked to stop", daemon=True).start()

    def _scheduled(self, event: str, started: bool) -> None:
        if event == STOP and not started:
            threading.Thread(target=self._on_early_stop, name="stopped too early", daemon=True).start()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
