"""A run has one owner, however it is taken over and however the last owner ended, on disks and in object stores."""

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import object_store
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests import runs
from trainer.errors import ConfigError, Stopped
from trainer.reliability import reading, run_lock
from trainer.reliability.run_lock import RunLock

BEAT_S, STALE_S = 0.05, 0.6
WAIT_S = 20  # the limit for what should happen at once
REFUSED = (
    r"^{} is being trained by {} pid {}; wait for it, choose another --workdir, or take it over with --steal_lock$"
)

# argv: location, host to pretend to be on ('' for ours), steal. A line on stdin takes the run, the next releases it.
CHILD = f"""
import dataclasses, logging, sys
from trainer.reliability import run_lock
from trainer.errors import ConfigError
location, host, steal = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
this_process = run_lock.this_process
run_lock.this_process = lambda: dataclasses.replace(this_process(), host=host or this_process().host)
print("ready", flush=True)
for line in sys.stdin:
    try:
        told = lambda message: print("lost:", message, flush=True)
        seconds = dict(heartbeat_s={BEAT_S}, stale_s={STALE_S})
        lock = run_lock.RunLock(line.strip() or location, steal=bool(steal), on_lost=told, **seconds)
    except ConfigError as e:
        print("refused:", e, flush=True)
        sys.stdin.readline()
        continue
    print("taken", flush=True)
    sys.stdin.readline()
    lock.release()
"""


class Child:
    """A process that takes a run on request."""

    def __init__(self, location: object, host: str = "", steal: bool = False) -> None:
        argv = [sys.executable, "-c", CHILD, str(location), host, "yes" if steal else ""]
        self.process = subprocess.Popen(
            argv, cwd=runs.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )
        self.says("ready")

    def tell(self, line: object = "") -> None:
        self.process.stdin.write(f"{line}\n")

    def says(self, *starts: str) -> str:
        """The next line of output that starts with one of `starts`."""
        for line in self.process.stdout:
            if line.startswith(starts):
                return line.strip()
        raise AssertionError(f"ended without saying {starts}")

    def takes(self) -> None:
        self.tell()
        self.says("taken")


@pytest.fixture
def children():
    """Makes Child processes, which end with the test."""
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs) -> Child:
            child = Child(*args, **kwargs)
            stack.callback(child.process.wait, WAIT_S)
            stack.callback(child.process.kill)
            return child

        yield make


@pytest.fixture
def take():
    """Makes locks of this process, which pretends to be on `host`, and releases them after the test."""
    with contextlib.ExitStack() as stack:

        def make(
            location, host="", beat=BEAT_S, stale=STALE_S, steal=False, lost=None, regain=False, **fields
        ) -> RunLock:
            with pretending(host, **fields):
                told = (lambda message: None) if lost is None else lost.append
                lock = RunLock(location, steal=steal, on_lost=told, regain=regain, heartbeat_s=beat, stale_s=stale)
            stack.callback(lock.release)
            return lock

        yield make


@contextlib.contextmanager
def pretending(host: str = "", **fields):
    """Makes this process look like one on another host, of another boot, ..."""
    real = run_lock.this_process
    fields |= {"host": host} if host else {}
    run_lock.this_process = lambda: dataclasses.replace(real(), **fields)
    try:
        yield
    finally:
        run_lock.this_process = real


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="meshlm")
    caplog.handler.setLevel(logging.INFO)
    logging.getLogger("meshlm").propagate = True
    return caplog


def record(run: pathlib.Path) -> dict:
    return json.loads((run / ".lock").read_bytes())


def leave_record(run: pathlib.Path, **fields) -> run_lock.Owner:
    """Leaves the record of an owner that did not release the run."""
    owner = dataclasses.replace(run_lock.this_process(), **fields)
    run.mkdir(exist_ok=True)
    (run / ".lock").write_text(json.dumps({**dataclasses.asdict(owner), "beat": 7, "time": "2026-01-01T00:00:00"}))
    return owner


def until(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "has not happened"
        time.sleep(0.01)


def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_an_owner_that_lives_is_refused_at_once_and_a_released_run_is_free(tmp_path, take):
    """Starts a second run in the same directory: it must name the owner, and leave no file behind."""
    run = tmp_path / "new" / "run"
    lock = take(run, stale=60)
    before = time.monotonic()
    with pytest.raises(ConfigError, match=REFUSED.format(re.escape(str(run)), lock.owner.host, os.getpid())) as e:
        take(run, stale=60)
    assert time.monotonic() - before < 5
    assert e.value.exit_code == 2
    lock.release()
    lock.release()
    assert list(run.iterdir()) == []
    take(run).release()
    assert not lock.lost


def test_the_record_says_who_and_beats(tmp_path, take):
    """Processes and users rely on this: the record names the owner and has a rising counter; there is no other file."""
    lock = take(tmp_path)
    first = record(tmp_path)
    assert {k: first[k] for k in ("id", "pid", "host")} == {
        "id": lock.owner.id,
        "pid": os.getpid(),
        "host": lock.owner.host,
    }
    assert datetime.datetime.fromisoformat(first["time"]).tzinfo is not None
    until(lambda: record(tmp_path)["beat"] >= 3)
    assert (tmp_path / ".lock").stat().st_size == run_lock.RECORD_BYTES
    lock.release()
    beats = lock._beat
    time.sleep(3 * BEAT_S)
    assert lock._beat == beats
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_of_this_machine_is_replaced_at_once(tmp_path, children, take, warnings):
    """After kill -9, even while the dead process is a zombie, the run must resume without a minute's wait."""
    child = children(tmp_path)
    child.takes()
    with pytest.raises(ConfigError, match=f"pid {child.process.pid};"):
        take(tmp_path)
    child.process.kill()
    until(lambda: pathlib.Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    lock = take(tmp_path, stale=60)
    assert f"taken over from {lock.owner.host} pid {child.process.pid}, which has ended" in warnings.text
    child.process.wait()
    lock.release()
    leave_record(tmp_path, pid=child.process.pid)
    take(tmp_path, stale=60)


def test_an_owner_that_cannot_be_any_more_is_replaced_at_once(tmp_path, take):
    """If the owner's pid now belongs to another process, there is nothing to wait for."""
    leave_record(tmp_path, start=1)
    before = time.monotonic()
    take(tmp_path, stale=60)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"host": "another"}, id="another host"),
        pytest.param({"machine": "another", "boot": "another"}, id="another machine of this name"),
        pytest.param({"boot": "another"}, id="restarted, or a clone of this machine"),
        pytest.param({"machine": "", "boot": "another"}, id="a container of this name"),
        pytest.param({"namespace": "pid:[1]"}, id="another container"),
        pytest.param({"boot": ""}, id="boot not known"),
    ],
)
def test_an_owner_that_cannot_be_seen_is_watched(fields, tmp_path, take, warnings):
    """A pid that is free here says nothing about another machine or container, where the owner may still run."""
    owner = leave_record(tmp_path, pid=ended_pid(), **fields)
    before = time.monotonic()
    take(tmp_path, stale=0.2)
    assert time.monotonic() - before >= 0.2
    waiting, taken = (r.getMessage() for r in warnings.records)
    assert waiting == f"waiting   for the lock of {tmp_path}, held by {owner.host} pid {owner.pid}; 0.2 s at most"
    assert taken.endswith(f"from {owner.host} pid {owner.pid}, which gave no sign of life for 0.2 s")


@pytest.mark.parametrize("fields", [{"boot": "another"}, {"boot": "another", "machine": ""}])
def test_a_clone_that_lives_keeps_its_run(fields, tmp_path, take):
    """Clones of one image have the same host name, but a run is not taken from a job that has a heartbeat."""
    lost = []
    first = take(tmp_path, beat=0.05, lost=lost, **fields)
    with pytest.raises(ConfigError, match="is being trained by"):
        take(tmp_path, stale=5)
    assert not lost and not first.lost


def test_a_copied_record_is_nobodys(tmp_path, take):
    """After cp -r of a run that is being trained, the copy can be trained, and the run is not harmed."""
    lost = []
    first = take(tmp_path / "live", beat=0.05, lost=lost)
    shutil.copytree(tmp_path / "live", tmp_path / "copy")
    before = time.monotonic()
    take(tmp_path / "copy", stale=0.3)
    assert time.monotonic() - before >= 0.3 and not first.lost
    (tmp_path / "live").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="is being trained by"):
        take(tmp_path / "moved", stale=5)


def test_an_error_that_passes_is_tried_again(tmp_path, take, monkeypatch):
    """A brief file system error at the start is retried; after a persistent one, the launcher may try again."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0))
    real, errors = run_lock._open, [OSError(errno.EIO, "x"), OSError(errno.ESTALE, "y")]
    monkeypatch.setattr(run_lock, "_open", lambda *a, **k: real(*a, **k) if not errors else _raise(errors.pop()))
    take(tmp_path).release()
    errors += [OSError(errno.EIO, "broken")] * 3
    with pytest.raises(Stopped, match="broken"):
        take(tmp_path)


def _raise(error):
    raise error


def test_an_owner_elsewhere_that_lives_is_refused(tmp_path, children, take):
    """On a shared file system, the heartbeat of an owner on another machine shows that it is alive."""
    child = children(tmp_path, "elsewhere")
    child.takes()
    with pytest.raises(ConfigError, match=REFUSED.format(".*", "elsewhere", child.process.pid)):
        take(tmp_path, stale=5)
    child.tell()


def test_a_stopped_owner_is_replaced_and_finds_out_when_it_goes_on(tmp_path, children, take):
    """The owner was stopped past the limit, say by a debugger. When it continues, it must not write any more."""
    child = children(tmp_path, "elsewhere")
    child.takes()
    child.process.send_signal(signal.SIGSTOP)
    lost = []
    lock = take(tmp_path, lost=lost)
    child.process.send_signal(signal.SIGCONT)
    assert f"taken over by {lock.owner.host} pid {os.getpid()};" in child.says("lost:")
    child.tell()  # the child releases a run that is not its own
    child.tell()
    child.says("refused:")
    assert record(tmp_path)["id"] == lock.owner.id
    assert not lost


def test_a_taker_that_does_not_look_counts_no_time(tmp_path, take, monkeypatch):
    """If the taker itself was stopped, or the file system hung for both, the owner must not count as dead."""
    leave_record(tmp_path, host="elsewhere")
    sleeps, offset = [], [0.0]
    monotonic, sleep = time.monotonic, time.sleep

    def sleep_long(seconds):
        sleeps.append(seconds)
        offset[0] += 1000  # as if this process were stopped here
        sleep(seconds / 10)

    monkeypatch.setattr(run_lock.time, "monotonic", lambda: monotonic() + offset[0])
    monkeypatch.setattr(run_lock.time, "sleep", sleep_long)
    take(tmp_path)
    assert len(sleeps) >= 10


def test_one_of_two_racers_wins(tmp_path, children):
    """One racer wins, whether the run is free or left by a dead or unknown owner; the error names the winner."""
    racers = [children(tmp_path), children(tmp_path)]
    for n in range(24):
        run = tmp_path / str(n)
        if n % 3 == 1:
            leave_record(run, start=1)
        if n == 2:
            leave_record(run, host="elsewhere")
        for racer in racers:
            racer.tell(run)
        said = [racer.says("taken", "refused:") for racer in racers]
        winner = said.index("taken")
        assert f"by {record(run)['host']} pid {racers[winner].process.pid};" in said[1 - winner], said
        for racer in racers:
            racer.tell()


def test_thieves_race_too(tmp_path, take, monkeypatch):
    """--steal_lock takes a run only from the owner it saw: if thieves could take it from each other, both would win."""
    lost, first = [], []
    take(tmp_path, lost=lost)
    write = RunLock._write

    def write_second(lock, content, generation):
        if not first and content and lock._beat == 0:
            first.append(None)
            first[0] = take(tmp_path, steal=True)
        return write(lock, content, generation)

    monkeypatch.setattr(RunLock, "_write", write_second)
    with pytest.raises(ConfigError, match="is being trained by"):
        take(tmp_path, steal=True)
    assert record(tmp_path)["id"] == first[0].owner.id
    until(lambda: lost)
    assert not first[0].lost


def test_steal(tmp_path, children, take, warnings):
    """--steal_lock takes the run at once, even from a live owner, which is informed once."""
    child = children(tmp_path)
    child.takes()
    before = time.monotonic()
    lock = take(tmp_path, steal=True, stale=60)
    assert time.monotonic() - before < 5
    assert f"taken over from {lock.owner.host} pid {child.process.pid}, by --steal_lock" in warnings.text
    assert child.says("lost:").startswith(f"lost: {tmp_path} was taken over by {lock.owner.host} pid {os.getpid()}")
    time.sleep(2 * BEAT_S)
    child.process.stdin.close()
    assert child.process.stdout.read() == ""
    take(tmp_path / "free", steal=True)


def test_a_record_that_was_removed_is_a_loss(tmp_path, take):
    """Another owner may have taken and released the run in the meantime; more writes would overwrite its work."""
    lost = []
    lock = take(tmp_path, lost=lost)
    (tmp_path / ".lock").unlink()
    until(lambda: lock.lost and lost)
    assert "is gone" in lost[0]
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_was_removed_is_regained_where_that_is_wanted(tmp_path, take, warnings):
    """Even the folder may be gone for a while; but a run that another owner has taken is lost."""
    lost, place = [], tmp_path / "place"
    lock = take(place, lost=lost, regain=True)
    shutil.rmtree(place)
    place.write_text("no folder any more")
    until(lambda: "cannot renew the lock" in warnings.text)
    place.unlink()
    until(lambda: "had vanished; taken again" in warnings.text)
    assert record(place)["id"] == lock.owner.id and not lost
    take(place, steal=True)
    until(lambda: lock.lost and lost)
    assert "was taken over by" in lost[0]


def test_release_within_on_lost(tmp_path):
    """A caller may naturally release the lock in on_lost; this must not deadlock."""
    locks, done = [], []
    locks.append(RunLock(tmp_path, on_lost=lambda m: (locks[0].release(), done.append(m)), heartbeat_s=BEAT_S))
    thief = RunLock(tmp_path, steal=True, on_lost=lambda m: None, heartbeat_s=BEAT_S)
    until(lambda: done)
    assert record(tmp_path)["id"] == thief.owner.id
    thief.release()


@pytest.mark.parametrize("hours", [-1, 1])
def test_shifted_clocks_change_nothing(hours, tmp_path, take, monkeypatch):
    """If clocks or file times differ by an hour, a live owner still keeps the run, and a dead one is replaced."""
    real = datetime.datetime
    lost = []
    owner = take(tmp_path, host="elsewhere", lost=lost)

    class Shifted(real):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + datetime.timedelta(hours=hours)

    def shift():
        monkeypatch.setattr(datetime, "datetime", Shifted)
        monkeypatch.setattr(time, "time", lambda: Shifted.now().timestamp())
        now = real.now().timestamp() + 3600 * hours
        with contextlib.suppress(FileNotFoundError):
            os.utime(tmp_path / ".lock", (now, now))

    shift()
    with pytest.raises(ConfigError, match="elsewhere"):
        take(tmp_path, stale=5)
    assert not owner.lost
    owner._stop.set()  # as if the owner had died
    owner._thread.join()
    before = time.monotonic()
    take(tmp_path)
    assert STALE_S <= time.monotonic() - before < 10 * STALE_S
    assert not lost


VALID = dataclasses.asdict(run_lock.this_process())
DAMAGED = st.one_of(
    st.binary(max_size=3000),
    st.builds(lambda n: json.dumps(VALID).encode()[:n], st.integers(0, 300)),
    st.builds(
        lambda field, value: json.dumps({**VALID, field: value}).encode(),
        st.sampled_from(sorted(VALID)),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
    ),
)


@settings(max_examples=40, deadline=None)
@given(DAMAGED)
@example(b"")
@example(b"[" * 2000)
@example(b"x" * 5_000_000)
@example(b"another-host process 17")  # an earlier version wrote such records
@example(json.dumps({**VALID, "pid": 10**300}).encode())
def test_a_damaged_record_is_an_unknown_owners(content):
    """Whatever the record holds, the run is refused or taken over, in bounded time, and never with a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, ".lock").write_bytes(content)
        try:
            lock = RunLock(folder, on_lost=lambda m: None, heartbeat_s=60, stale_s=0.01)
        except ConfigError as e:
            assert "\n" not in str(e)
            assert run_lock._parse(content)
            return
        assert record(pathlib.Path(folder))["id"] == lock.owner.id
        lock.release()
        assert os.listdir(folder) == []


@pytest.mark.parametrize("content", ["{", "[" * 2000, json.dumps({**VALID, "host": "two\nlines"})], ids=range(3))
def test_a_damaged_record_is_watched_as_well(content, tmp_path, take, warnings):
    """The owner's file system may tear writes, so the owner gets time to write another record."""
    (tmp_path / ".lock").write_text(content)
    before = time.monotonic()
    take(tmp_path, stale=0.2)
    assert time.monotonic() - before >= 0.2
    assert "taken over from an unknown process (its record is damaged), which gave no sign" in warnings.text


class Owners(RuleBasedStateMachine):
    """Owners on two machines that take, renew, stop renewing, steal and release the lock in any order.

    The last owner that took the run and has not released it holds it; all others learn this at the next heartbeat.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.locks: list[RunLock] = []
        self.told: list[str] = []
        self.holder: RunLock | None = None

    @rule(host=st.sampled_from(["here", "there"]), steal=st.booleans())
    def take(self, host, steal):
        same_machine = self.holder is not None and self.holder.owner.host == host
        with pretending(host):
            try:
                told = self.told.append
                lock = RunLock(self.folder, steal=steal, on_lost=told, heartbeat_s=3600, stale_s=0.01)
            except ConfigError:
                assert same_machine
                assert not steal
                return
        assert steal or not same_machine
        self.holder = lock
        self.locks.append(lock)

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def beat(self, data):
        lock = data.draw(st.sampled_from(self.locks))
        if not lock._released and not lock.lost:
            assert lock._renew() == (lock is self.holder)
            assert lock.lost == (lock is not self.holder)

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def release(self, data):
        lock = data.draw(st.sampled_from(self.locks))
        lock.release()
        if lock is self.holder:
            self.holder = None
            assert os.listdir(self.folder) == []

    @rule()
    def everybody_beats(self):
        live = [lock for lock in self.locks if not lock._released and not lock.lost]
        assert [lock for lock in live if lock._renew()] == ([self.holder] if self.holder else [])

    @invariant()
    def the_record_is_the_holders(self):
        found = pathlib.Path(self.folder, ".lock")
        assert found.exists() == (self.holder is not None)
        if self.holder is not None:
            assert json.loads(found.read_bytes())["id"] == self.holder.owner.id
        assert len(self.told) == sum(lock.lost for lock in self.locks)  # each owner is informed once

    def teardown(self):
        self.everybody_beats()
        for lock in self.locks:
            lock.release()
        shutil.rmtree(self.folder)


TestOwners = Owners.TestCase
TestOwners.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str):
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs a file system of its own, which takes root: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path, take):
    """The error comes before JAX is loaded, and names the flag to correct."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / ".lock").mkdir(parents=True)
    cases = {
        tmp_path / "file": os.strerror(errno.ENOTDIR),
        tmp_path / "file" / "run": os.strerror(errno.ENOTDIR),
        tmp_path / "taken": os.strerror(errno.EISDIR),
        "a\0b": "embedded null byte",
        "/proc/none/run": os.strerror(errno.ENOENT),
        "gs://": "names no bucket",
        "gs://Not_a_bucket!/run": "Invalid GCS bucket name",
    }
    for location, reason in cases.items():
        with pytest.raises(ConfigError, match=re.escape(f"cannot write to --workdir={location}: ")) as e:
            take(location)
        assert reason in str(e.value)
        assert "\n" not in str(e.value)


def test_a_read_only_file_system(tmp_path, take):
    """Not even root can write to a read-only file system."""
    reason = os.strerror(errno.EROFS)
    with mounted(tmp_path / "disk", "ro,size=64k"):
        for location in (tmp_path / "disk", tmp_path / "disk" / "run"):
            with pytest.raises(ConfigError, match=re.escape(f"cannot write to --workdir={location}: {reason}")):
                take(location)


def test_a_full_disk_costs_no_run(tmp_path, take, warnings):
    """A new record is written next to the old one. Until there is space, the run keeps the old one and warns once."""
    run = tmp_path / "disk"
    with mounted(run, "size=64k"):
        lost = []
        lock = take(run, lost=lost)
        with contextlib.suppress(OSError), (run / "large").open("wb", buffering=0) as f:
            while f.write(bytes(4096)):
                pass
        until(lambda: os.strerror(errno.ENOSPC) in warnings.text)
        time.sleep(4 * BEAT_S)
        kept = record(run)
        assert kept["id"] == lock.owner.id
        assert kept["beat"] < lock._beat - 2
        with pytest.raises(ConfigError):
            take(run)
        (run / "large").unlink()
        until(lambda: record(run)["beat"] > kept["beat"] and "renewed again" in warnings.text)
        assert [r.levelname for r in warnings.records] == ["WARNING", "INFO"]
        assert not lost
        lock.release()
        assert list(run.iterdir()) == []


def test_a_file_system_without_locks(tmp_path, take, warnings, monkeypatch):
    """The file systems of some clusters have no locks. A warning says so; heartbeats still detect two owners."""
    wait, opened = run_lock._wait, []
    open_store = run_lock._open

    class NoLocks:
        """A store that can only read."""

        def __init__(self, store) -> None:
            self.read = store.read

        def write(self, *args, **kwargs):
            return OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def open_one(at, locking="os"):
        opened.append(locking)
        store = open_store(at, locking)
        return NoLocks(store) if locking == "os" else store

    def wait_or_raise(future):
        if isinstance(future, OSError):
            raise future
        return wait(future)

    monkeypatch.setattr(run_lock, "_open", open_one)
    monkeypatch.setattr(run_lock, "_wait", wait_or_raise)
    lock = take(tmp_path)
    assert opened == ["os", "none"]
    assert f"{tmp_path} has no file locks (No locks available)" in warnings.text
    until(lambda: record(tmp_path)["beat"] >= 2)
    with pytest.raises(ConfigError, match="is being trained by"):
        take(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_what_a_process_that_was_killed_while_writing_left(tmp_path, take):
    """TensorStore overwrites the leftover but keeps its tail, which does no harm: a record has a fixed size."""
    for left in (b"", b"{" * 100, b"x" * 5000):
        (tmp_path / ".lock.__lock").write_bytes(left)
        lock = take(tmp_path)
        assert run_lock._parse((tmp_path / ".lock").read_bytes()[: run_lock.RECORD_BYTES]) == lock.owner
        until(lambda lock=lock: lock._beat >= 2)
        lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def store(monkeypatch):
    with object_store.running() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


schemes = pytest.mark.parametrize("scheme", ["gs", "s3"])


@schemes
@pytest.mark.parametrize("path", ["", "/runs/mine/"])
def test_a_run_in_an_object_store(scheme, path, store, take):
    """Taking, renewing and stealing the lock are writes with a condition that the store enforces."""
    location, key = f"{scheme}://a-bucket{path}", f"{path}/.lock".strip("/").replace("//", "/")
    lost = []
    lock = take(location, lost=lost)
    with pytest.raises(ConfigError, match=REFUSED.format(location, lock.owner.host, os.getpid())):
        take(location)
    until(lambda: json.loads(store.objects[key])["beat"] >= 2)
    thief = take(location, host="elsewhere", steal=True)
    until(lambda: lost)
    assert "taken over by elsewhere pid" in lost[0]
    lock.release()
    assert json.loads(store.objects[key])["id"] == thief.owner.id
    thief.release()
    assert not store.objects
    assert not thief.lost
    methods = {"gs": "POST", "s3": "PUT"}
    assert store.writes[0] == f"{methods[scheme]} {key} 0"
    assert all(len(write.split()) == 3 for write in store.writes if not write.startswith("DELETE"))


@schemes
def test_who_is_dead_in_an_object_store(scheme, store, take):
    """As on a disk, a dead owner is replaced at once, and a damaged record of any size is watched."""
    store.put(
        "run/.lock", json.dumps(dataclasses.asdict(dataclasses.replace(run_lock.this_process(), start=1))).encode()
    )
    take(f"{scheme}://a-bucket/run", stale=60).release()
    for damaged in (b"", b"{", b"x" * 100_000):
        store.put("run/.lock", damaged)
        before = time.monotonic()
        take(f"{scheme}://a-bucket/run", stale=0.2).release()
        assert time.monotonic() - before >= 0.2


@schemes
def test_a_store_that_denies(scheme, store, take, warnings):
    """A denied write is a warning while a run is in progress, and at its start an error that says where to look."""
    lost = []
    lock = take(f"{scheme}://a-bucket/run", lost=lost)
    store.denied = True
    until(lambda: "cannot renew the lock" in warnings.text)
    message = f"cannot write to --workdir={scheme}://a-bucket/other: PERMISSION_DENIED.*docs/data.md"
    with pytest.raises(ConfigError, match=message) as e:
        take(f"{scheme}://a-bucket/other")
    assert "\n" not in str(e.value)
    store.denied = False
    until(lambda: "renewed again" in warnings.text)
    assert not lost
    store.denied = True
    lock.release()
    assert "cannot release the lock" in warnings.text


@schemes
def test_an_answer_that_was_lost_is_no_theft(scheme, store, take):
    """The client retries a write that was done already, and the store refuses it because of our own record."""
    lost = []
    # At s3:// the answer to the first write is lost, at gs:// the answer to a heartbeat.
    store.lose_answers = int(scheme == "s3")
    lock = take(f"{scheme}://a-bucket/run", lost=lost)
    store.lose_answers = int(scheme == "gs")
    before = lock._beat
    until(lambda: store.lose_answers == 0 and lock._beat > before + 1)
    assert not lost
    lock.release()
    assert not store.objects
