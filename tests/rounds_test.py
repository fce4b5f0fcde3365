"""Agreements and their cost. Processes are threads, and a store counts calls; coordination_test.py has real ones."""

import contextlib
import random
import threading
import time

import pytest

from data.errors import DataError
from tests.memory_store import Gang
from trainer.errors import CheckpointError, ConfigError, Stopped
from trainer.reliability import coordination, rounds
from trainer.reliability.coordination import SAVE, STOP, Processes, RemoteError


def listen(gang: Gang, **called) -> None:
    def nothing(*_) -> None:
        pass

    functions = {name: called.get(name, nothing) for name in ("on_stop", "on_early_stop", "on_disconnect")}
    gang.all(lambda p: p.listen_for_requests(**functions))


def ticks_until(process: Processes, event: str, within_s: float = 20) -> int:
    """The tick at which `process` takes `event` up."""
    end, before = time.monotonic() + within_s, 0
    while time.monotonic() < end:
        before += 1
        if event in process.tick():
            return process._ticks
        time.sleep(random.random() / 1000)
    raise AssertionError(f"{event} does not come")


# Values


@pytest.mark.parametrize("size", [1, 2, 7])
def test_each_agreement(size):
    gang = Gang(size)
    assert gang.all(lambda p: p.distinct_values("values", str(p.index % 3))) == [["0", "1", "2"][:size]] * size
    gathered = gang.all(lambda p: p.gather("indices", str(p.index)))
    assert gathered == [[str(i) for i in range(size)]] + [[]] * (size - 1)
    assert gang.all(lambda p: p.all_agree("ready", True)) == [True] * size
    assert gang.all(lambda p: p.all_agree("ready", p.index < size - 1)) == [False] * size
    assert (
        gang.all(lambda p: p.broadcast_from_0("step", lambda: {"step": 7, "of": p.index}))
        == [{"step": 7, "of": 0}] * size
    )
    assert gang.all(lambda p: p.run_on_all("file", lambda: p.index)) == list(range(size))
    assert gang.all(lambda p: p.run_on_process_0("lock", lambda: p.index)) == [0] + [None] * (size - 1)
    assert gang.all(lambda p: p.check_same("setting", {"a": 1, "b": [2]})) == [None] * size


def test_what_differs_is_named_on_all():
    gang = Gang(5)
    fields = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}, {"a": 9, "b": 2}, {}]
    errors = gang.all(lambda p: p.check_same("setting", fields[p.index]))
    host = gang.processes[0].hosts[0]
    expected = f"{host} (process 2) has another setting: b: 3 there, 2 on {host} (process 0); give all"
    for error in errors:
        assert error.exit_code == 2 and str(error).startswith(expected), error


def test_an_error_of_one_is_one_of_all():
    gang = Gang(3)

    def open_it(p: Processes) -> int:
        if p.index == 1:
            raise DataError("a shard is cut")
        return p.index

    first, second, third = gang.all(lambda p: p.run_on_all("data", lambda: open_it(p)))
    assert isinstance(second, DataError) and str(second) == "a shard is cut"
    for error in (first, third):
        assert isinstance(error, RemoteError) and error.exit_code == 3 and "(process 1): a shard is cut" in str(error)

    def none(_: list) -> None:
        raise CheckpointError("there is none")

    errors = gang.all(lambda p: p.decide("newest", None, none))
    assert [(e.exit_code, str(e)) for e in errors] == [(3, "there is none")] * 3


def test_those_who_do_not_come_are_named_within_the_limit():
    gang = Gang(40, timeout_s=0.5)
    started = time.monotonic()
    errors = gang.all(lambda p: p.all_agree("start", True), only=[0, 2, 39])
    for error in errors:
        assert error.exit_code == 42 and "(process 1), " in str(error) and "(process 3)" in str(error)
        assert "and 27 more did not reach 'start' within 0 s" in str(error).replace("within 1 s", "within 0 s")
    assert time.monotonic() - started < 10
    late = gang.all(lambda p: p.all_agree("start", True), only=[1])
    assert isinstance(late[0], Stopped)


def test_a_process_0_that_does_not_come(monkeypatch):
    monkeypatch.setattr(rounds, "ANSWER_GRACE_S", 0.1)
    (error,) = Gang(2, timeout_s=0.1).all(lambda p: p.all_agree("start", True), only=[1])
    assert error.exit_code == 42 and "process 0 did not reach 'start'" in str(error)


@pytest.mark.parametrize("late", [0, 1, 3])
def test_an_agreement_that_ends_ends_for_all(monkeypatch, late):
    """Process 0 used to continue by itself with the answers it had, and late processes never heard of the error."""
    monkeypatch.setattr(rounds, "ANSWER_GRACE_S", 0.1)
    gang, heard = Gang(4, timeout_s=0.2), []
    gang.all(lambda p: p.listen_for_errors(lambda error: heard.append((p.index, error))))

    def agree(p: Processes) -> None:
        try:
            p.all_agree("start", True)
        except Stopped as e:
            p.report_error(e)
            raise

    ended = gang.all(agree, only=[i for i in range(4) if i != late])
    assert all(isinstance(e, Stopped) and f"process {late}" in str(e) for e in ended), ended
    told = gang.processes[late].remote_error(5.0)
    assert told is not None and told.exit_code == 42 and "did not reach 'start'" in str(told)
    assert late in [index for index, _ in heard]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_once_watchdogs_watch_nobody_is_too_late(monkeypatch, late):
    """Another process may save, or fetch a copy, for hours; a process that waits for it is not the stuck one."""
    monkeypatch.setattr(rounds, "ANSWER_GRACE_S", 0.0)
    monkeypatch.setattr(rounds, "WARN_AFTER_S", 0.1)
    gang, waiting = Gang(3, timeout_s=0.1), [threading.Event() for _ in range(3)]

    @contextlib.contextmanager
    def seen(index: int):
        waiting[index].set()
        yield
        waiting[index].clear()

    gang.all(lambda p: p.watched_by(lambda: seen(p.index)))

    def agree(p: Processes) -> bool:
        if p.index == late:
            time.sleep(0.5)
            assert [event.is_set() for event in waiting] == [i != late for i in range(3)]
        return p.all_agree("saved", True)

    assert gang.all(agree) == [True] * 3 and not any(event.is_set() for event in waiting)
    gang.close()


# Errors


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_that_ends_one_is_told_to_all(failing):
    gang, heard = Gang(3), []
    gang.all(lambda p: p.listen_for_errors(lambda error: heard.append((p.index, error))))
    gang.processes[failing].report_error(DataError("token 300 is outside of the vocabulary"))
    gang.processes[1].report_error(RuntimeError("too late, all hear of only one"))
    for p in gang.processes:
        told = p.remote_error(5.0 if p.index != failing else 0.0)
        if p.index == failing:
            assert told is None
        else:
            assert told.exit_code == 3 and told.process == failing
            assert f"(process {failing}): token 300 is outside" in str(told)
    wait_until(lambda: len(heard) == 2)
    assert {index for index, _ in heard} == {0, 1, 2} - {failing}


def test_process_0_waits_for_nobody_who_may_be_gone(monkeypatch):
    monkeypatch.setattr(coordination, "EXIT_BARRIER_S", 1.0)
    monkeypatch.setattr(coordination, "EXIT_DELAY_S", 0.0)
    first = Gang(3).processes[0]
    for error, waits in ((Stopped("a peer is gone"), False), (RemoteError("so says a peer", 42), False),
                         (DataError("a shard is cut"), True), (None, True)):  # fmt: skip
        started = time.monotonic()
        first.exit_barrier(error)
        assert (time.monotonic() - started >= 1.0) == waits


def test_a_crash_is_told_with_its_type_and_what_all_know_is_not():
    gang = Gang(2)
    gang.all(lambda p: p.listen_for_errors(lambda _: None))
    errors = gang.all(lambda p: p.check_same("setting", {"a": p.index}))
    for p, error in zip(gang.processes, errors, strict=True):
        p.report_error(error)
    assert gang.processes[0].remote_error(0.05) is None and gang.processes[1].remote_error(0.05) is None
    gang.processes[1].report_error(KeyError("name"))
    told = gang.processes[0].remote_error(5.0)
    assert told is not None and told.exit_code == 1 and "KeyError: 'name'; see its log" in str(told)


def wait_until(true, within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# Events


def test_events_are_taken_up_at_one_tick_by_all_whoever_asks():
    gang = Gang(4)
    listen(gang)
    for k in range(20):
        for p in random.Random(k).sample(gang.processes, 2):  # two processes request it at the same time
            threading.Thread(target=p.request, args=(SAVE,)).start()
        ticks = gang.all(lambda p: ticks_until(p, SAVE))
        assert len(set(ticks)) == 1, ticks
    gang.close()


def test_a_process_that_stands_still_longer_than_any_limit_makes_nobody_deaf(caplog, monkeypatch):
    """After one agreement that took too long, processes used to ignore all requests: timed saves and SIGTERM."""
    monkeypatch.setattr(rounds, "WARN_AFTER_S", 0.2)
    gang = Gang(3, timeout_s=0.1)
    deaf: list[object] = []
    listen(gang, on_disconnect=deaf.append)
    with gang.processes[1]._tick_lock:  # as if the whole process were stopped
        gang.processes[0].request(SAVE)
        time.sleep(0.8)
    assert len(set(gang.all(lambda p: ticks_until(p, SAVE)))) == 1
    assert "process 1 has not answered for" in caplog.text
    for event in (SAVE, STOP):
        gang.processes[2].request(event)
        assert len(set(gang.all(lambda p, event=event: ticks_until(p, event)))) == 1
    assert not deaf
    gang.close()


def test_who_cannot_hear_any_more_says_so():
    gang, deaf = Gang(2), []
    listen(gang, on_disconnect=deaf.append)
    gang.store.end()
    wait_until(lambda: len(deaf) == 2)
    assert [error.exit_code for error in deaf] == [42, 42]


def test_the_last_of_many_requests_costs_what_the_first_did_and_none_leaves_a_key():
    """benchmarks.coordination makes ten thousand requests, through JAX's service."""
    gang = Gang(2)
    listen(gang)
    calls = []
    for _ in range(500):
        before = gang.store.calls
        gang.processes[1].request(SAVE)
        for p in gang.processes:
            ticks_until(p, SAVE)
        calls.append(gang.store.calls - before)
    assert sum(calls[-100:]) <= 1.1 * sum(calls[:100])
    assert gang.store.most_keys < 20
    gang.close()


# What it costs


@pytest.mark.parametrize(
    "what", ["check_same", "all_agree", "distinct_values", "all differ", "run_on_all", "broadcast_from_0", "event"]
)
def test_bytes_and_keys_grow_no_faster_than_the_processes(what):
    costs = [costs_of(what, size) for size in (8, 64)]
    (_, sent, keys), (more_calls, more_sent, more_keys) = costs
    others = 63 / 7
    # A process makes about three calls, and more if it waits long, but never as many as there are processes.
    assert more_calls < 10 * 64 and more_keys < 1.2 * others * keys, costs
    assert more_sent < 1.5 * others * sent, costs  # arrived values are read after 1, 2, 4, … waits


def costs_of(what: str, size: int) -> tuple[int, int, int]:
    """Calls and bytes of the second of two agreements, and the largest number of keys during both."""
    gang = Gang(size)
    listen(gang)
    fields = {f"config.field{i}": "x" * 30 for i in range(100)}
    functions = {
        "check_same": lambda p: p.check_same("setting", fields),
        "all_agree": lambda p: p.all_agree("saved", True),
        "distinct_values": lambda p: p.distinct_values("read step 10", "damaged" if p.index == 3 else ""),
        "all differ": lambda p: p.distinct_values("restored step 10", f"host {p.index:02}: a file is cut"),
        "run_on_all": lambda p: p.run_on_all("data", lambda: None),
        "broadcast_from_0": lambda p: p.broadcast_from_0("newest checkpoint", lambda: 10),
        "event": lambda p: (p.index == 0 and p.request(SAVE)) or ticks_until(p, SAVE),
    }
    gang.all(functions[what])
    store = gang.store
    calls, sent = store.calls, store.sent
    results = gang.all(functions[what])
    assert not any(isinstance(result, Exception) for result in results), results
    cost = (store.calls - calls, store.sent - sent, store.most_keys)
    gang.close()
    return cost


def test_a_difference_costs_the_details_of_two():
    gang = Gang(32)
    fields = {f"config.field{i}": "x" * 30 for i in range(100)}
    before = gang.store.sent
    errors = gang.all(lambda p: p.check_same("setting", fields | {"last": p.index // 20}))
    assert all(isinstance(error, ConfigError | RemoteError) for error in errors)
    # Process 0 has its own details without the store; the other process's are sent once and read at most twice.
    assert gang.store.sent - before < 4 * len(str(fields)) + 32 * 2 * 400


def test_a_wait_without_a_limit_is_few_calls(monkeypatch):
    """A call that timed out stays in JAX's service until the key is set, so there must be few calls."""

    class Empty:
        calls = 0

        def get(self, key: str, timeout_s: float) -> str:
            self.calls += 1
            if self.calls * timeout_s > 86_400:  # the process comes after a day
                return "here"
            now[0] += timeout_s
            raise TimeoutError(key)

    now, store = [0.0], Empty()
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    assert rounds.Rounds(store, "x", 0, 2)._wait("folder", "1", None) == "here" and store.calls < 15
    assert rounds.wait_for(Empty(), "key") == "here"
