"""The processes of a run, agreeing through process 0 (trainer/reliability/rounds.py): no device takes part.

What they agree on: that all are about to train the same thing (`check_same`, `together`), what process 0 has chosen
(`choose`), after which step something happens that any of them asked for (`request`, `tick`), and with which error all
end when one does (`tell`, `hear`).
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
from trainer.reliability.rounds import PREFIX, Rounds, ServiceStore, Store, Taken, wait_for

log = logging.getLogger("meshlm")
T = TypeVar("T")
TIMEOUT_S = 300.0
PARTING_S, PARTING_LIMIT_S = 0.5, 10.0  # from a process's last word to its end; for all to say it
LONGEST_MESSAGE = 4000  # of an error that all are told
MOST_KINDS = 10  # of values that all are told
STOP, SAVE, END = "stop", "save", "end"


class Elsewhere(UserError):
    """An error of another process, which ends this one, too. `process` is its number where one alone had it."""

    def __init__(self, message: str, exit_code: int, process: int | None = None):
        super().__init__(message)
        self.exit_code, self.process = exit_code, process


class Processes:
    """Every method but `request`, `tell` and `told` is called by all processes, in the same order.

    Args:
      timeout_s: limit of an agreement until `watched_by`. One that comes to it tells all, so that none goes on alone.
      index, size: of this process; None: as JAX counts.
      store: where they meet.

    Attributes:
      index, size: of this process.
      hosts: the name of each process's host, on process 0; elsewhere empty.
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
        self._known: UserError | None = None  # an error that all have
        self._told: Elsewhere | None = None
        self._hears = threading.Event()
        self._ear: threading.Thread | None = None
        self._ticks = 0
        self._due: dict[int, set[str]] = {}
        self._paused = threading.Lock()  # held while a tick is being agreed on: the loop waits in tick()
        self._event, self._placing = 0, threading.Lock()  # which event the listener is at; held while one is placed
        self._listener: threading.Thread | None = None
        self._stopping = False
        self.hosts: list[str] = []
        self.hosts = self.gather("hosts", platform.node())

    def watched_by(self, waiting: Callable[[], AbstractContextManager[Any]]) -> None:
        """From here on agreements have no limit: a peer may be saving, or fetching a copy, for hours.

        One that is stuck is ended by its own watchdog, and when one is gone JAX's heartbeat ends all. Called by all.

        Args:
          waiting: is entered while this process waits for others.
        """
        self.timeout_s, self._waiting = None, waiting

    # Values

    def decide(self, name: str, value: Any, decision: Callable[[list[Any]], T]) -> T:
        """What `decision` makes of the values of all, on process 0, which alone calls it; its UserError ends all. JSON.

        Raises Stopped, on those that are there, when one does not come in time; `tell` tells the others.
        """

        raised: list[UserError] = []

        def answer(texts: Sequence[str | None]) -> str:
            if missing := [i for i, text in enumerate(texts) if text is None]:
                return json.dumps({"missing": self._did_not_come(name, missing)})
            try:
                return json.dumps({"decided": decision([json.loads(text) for text in texts if text is not None])})
            except UserError as e:
                raised.append(e)
                return json.dumps({"error": [e.exit_code, str(e)]})

        text = json.dumps(value)
        try:
            said = json.loads(self._hold(text, answer))
        except TimeoutError:  # all others are to hear of it
            raise Stopped(self._did_not_come(name, [0])) from None
        if "decided" in said:
            return said["decided"]
        if "missing" in said:
            stopped = Stopped(said["missing"])
            self._known = stopped if self.index else None  # process 0 tells those who did not come
            raise stopped
        code, message = said["error"]
        self._known = (
            raised[0] if raised else Stopped(message) if code == Stopped.exit_code else Elsewhere(message, code)
        )
        raise self._known

    def _hold(self, text: str, answer: Callable[[Sequence[str | None]], str]) -> str:
        if self.size == 1:
            return answer([text])
        with self._waiting():
            return self._agreements.hold(text, answer, self.timeout_s)

    def _did_not_come(self, name: str, missing: list[int]) -> str:
        shown = ", ".join(map(self._named, missing[:10])) + (f" and {len(missing) - 10} more" * (len(missing) > 10))
        return (
            f"process(es) {shown} did not come to {name!r} within {self.timeout_s:.0f} s; see their logs, and start "
            "all processes again, with a larger --start_timeout_s if they need longer"
        )

    def gather(self, name: str, value: str) -> list[str]:
        """The value of each process, on process 0; elsewhere nothing."""
        values: list[str] = []
        self.decide(name, value, values.extend)
        return values

    def exchange(self, name: str, value: str) -> list[str]:
        """The different values, each once, that of process 0 first, then by process; of many kinds the first ten.

        However many processes report a different problem each, what one of them hears stays short.
        """
        return self.decide(name, value, lambda values: list(dict.fromkeys(values))[:MOST_KINDS])

    def all_agree(self, name: str, yes: bool) -> bool:
        """Whether every process says yes."""
        return self.decide(name, yes, all)

    def check_same(self, what: str, fields: dict[str, Any]) -> None:
        """Raises an error on every process, naming hosts and fields, when `fields` are not the same on all.

        A hash is compared; the fields themselves are sent by process 0 and the first that differs from it, if one does.
        """
        text = json.dumps(fields, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]

        def differing(digests: list[str]) -> int | None:
            return next((i for i, theirs in enumerate(digests) if theirs != digests[0]), None)

        def refuse(texts: list[str]) -> None:
            i = next(i for i, theirs in enumerate(texts) if theirs and i)
            raise ConfigError(self._difference(what, i, json.loads(texts[0]), json.loads(texts[i])))

        other = self.decide(what, digest, differing)
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

    def together(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns; a UserError of one process ends all, with its exit code."""
        value, error = None, None
        try:
            value = function()
        except UserError as e:
            error = self._known = e

        def first(outcomes: list[list[Any] | None]) -> list[Any] | None:
            failed = ((i, outcome) for i, outcome in enumerate(outcomes) if outcome)
            return next(([f"on {self._named(i)}: {message}", code] for i, (message, code) in failed), None)

        failed = self.decide(what, [str(error), error.exit_code] if error else None, first)
        if error:
            raise error
        if failed:
            self._known = Elsewhere(*failed)
            raise self._known
        return value  # type: ignore[return-value]

    def choose(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns on process 0, which alone calls it; JSON. Its UserError ends all."""
        chosen: list[T] = []

        def on_process_0() -> None:
            if self.index == 0:
                chosen.append(function())

        self.together(what, on_process_0)
        return self.decide(f"{what}, chosen", None, lambda _: chosen[0])

    def _named(self, process: int) -> str:
        name = f"process {process}"
        return f"{self.hosts[process]} ({name})" if process < len(self.hosts) else name

    # Errors

    def hear(self, failed: Callable[[Elsewhere], None]) -> None:
        """Begins to hear of errors of others. `failed` is called once at most, on a thread of its own."""

        def wait() -> None:
            if text := wait_for(self._store, f"{PREFIX}/error"):
                process, message, code = json.loads(text)
                if process != self.index and not isinstance(self._known, Stopped):  # else it is leaving already
                    self._told = Elsewhere(message, code, process)
                    self._hears.set()
                    failed(self._told)

        def hear() -> None:
            with contextlib.suppress(Stopped):  # the service is gone; the listener, or JAX itself, ends the process
                wait()

        if self.size > 1:
            self._ear = threading.Thread(target=hear, name="errors of others", daemon=True)
            self._ear.start()

    def tell(self, error: BaseException) -> None:
        """Tells the others of an error that ends this process, so that all end with its code and message."""
        if self.size == 1 or error in (self._known, self._told):
            return
        code = error.exit_code if isinstance(error, UserError) else 1
        text = " ".join(str(error).split())[:LONGEST_MESSAGE]
        text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}; see its log"
        said = [self.index, f"on {platform.node()} (process {self.index}): {text}", code]
        with contextlib.suppress(Stopped, Taken):  # nobody hears it any more; another was first
            self._store.set(f"{PREFIX}/error", json.dumps(said))

    def told(self, within_s: float) -> Elsewhere | None:
        """The error of another process that ends this one; None where none is heard of in so many seconds."""
        self._hears.wait(within_s)
        return self._told

    # Events

    def listen(
        self, asked: Callable[[], None], too_early: Callable[[], None], deaf: Callable[[UserError], None]
    ) -> None:
        """Begins to hear of requests. The functions are called once at most, on threads of their own.

        Args:
          asked: as soon as this process hears that all should stop; they may never come to agree on when.
          too_early: when all have agreed, and none has ticked yet.
          deaf: when this process cannot hear of requests any more; must end it.
        """
        self._asked, self._too_early, self._deaf = asked, too_early, deaf
        self._requests = Rounds(self._store, "ticks", self.index, self.size)
        if self.size > 1:
            self._listener = threading.Thread(target=self._listen, name="requests", daemon=True)
            self._listener.start()

    def request(self, event: str) -> None:
        """Asks that tick() return `event` on all processes, at the same tick. From any thread of any process."""
        self._heard(event)
        if self.size == 1:
            with self._paused:
                started = self._agree(event, self._ticks)
            self._agreed(event, started)
            return
        # The first place that is still free, from where the listener is: it does not go on meanwhile, so that what is
        # before it, and removed, is not taken for free.
        with self._placing:
            for k in itertools.count(self._event):
                with contextlib.suppress(Taken):
                    return self._store.set(f"{PREFIX}/events/{k}", event)

    def tick(self) -> set[str]:
        """The events that all have agreed to take up now. Called after every step and every piece of an evaluation."""
        with self._paused:
            self._ticks += 1
            return self._due.pop(self._ticks, set())

    def close(self) -> None:
        """No more events and no errors of others; called by all once the loop has ended."""
        if self._listener is not None:
            if self.index == 0:
                self.request(END)
            with self._waiting():
                self._listener.join(self.timeout_s)
        if self._ear is not None:
            if self.index == 0:
                with contextlib.suppress(Taken):
                    self._store.set(f"{PREFIX}/error", "")
            with self._waiting():
                self._ear.join(self.timeout_s)

    def part(self, error: BaseException | None = None) -> None:
        """Before os._exit, on all that end for the same reason. Process 0, whose service the others need, goes last.

        With an `error` that says to start again, a process may be gone, so that none is waited for.
        jax.distributed.shutdown would take the service away from under a main thread that is busy, and wait for one
        that ends for another reason.
        """
        if self.size == 1:
            return
        gone = isinstance(error, Stopped | Elsewhere) and error.exit_code == Stopped.exit_code
        deadline = time.monotonic() + (0 if gone else PARTING_LIMIT_S)
        with contextlib.suppress(Stopped, TimeoutError, Taken):
            if self.index:
                return self._store.set(f"{PREFIX}/parted/{self.index}", "")
            for i in range(1, self.size):
                self._store.get(f"{PREFIX}/parted/{i}", max(deadline - time.monotonic(), 0.001))
        if self.index == 0:
            time.sleep(PARTING_S)

    def _listen(self) -> None:
        try:
            while (event := wait_for(self._store, f"{PREFIX}/events/{self._event}")) != END:
                self._take_up(event)
        except Stopped as e:
            self._deaf(e)
        except BaseException as e:
            self._deaf(Stopped(f"requests to stop and to save are not heard any more: {e!r}"))
            raise

    def _take_up(self, event: str) -> None:
        """As JAX's preemption service does it: all loops are held, and the tick after the furthest is taken.

        There is no limit: a loop that is held for too long is a step that takes too long, for which there is the
        watchdog. A limit of its own would be passed on some processes and not on others.
        """
        self._heard(event)
        with self._paused:
            furthest = self._requests.hold(str(self._ticks), lambda ticks: str(max(int(t) for t in ticks if t)))
            started = self._agree(event, int(furthest))
        self._agreed(event, started)
        if self.index == 0 and self._event:  # all who have come to this one are past the one before
            self._store.remove(f"{PREFIX}/events/{self._event - 1}")
        with self._placing:
            self._event += 1

    def _agree(self, event: str, furthest: int) -> bool:
        self._due.setdefault(furthest + 1, set()).add(event)
        return furthest > 0

    def _heard(self, event: str) -> None:
        if event == STOP and not self._stopping:
            self._stopping = True
            threading.Thread(target=self._asked, name="asked to stop", daemon=True).start()

    def _agreed(self, event: str, started: bool) -> None:
        if event == STOP and not started:
            threading.Thread(target=self._too_early, name="stopped too early", daemon=True).start()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
