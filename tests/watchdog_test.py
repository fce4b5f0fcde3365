"""A stuck process prints its stacks and exits with 42; one that was only stopped continues. Processes are real."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.runs import ROOT
from trainer.config import WatchdogConfig
from trainer.reliability import watchdog
from trainer.reliability.watchdog import CHECK_S, MEDIAN_STEPS, SAVING, WAITING, Pace, Watchdog

LATE_S = 2.0  # how long after the limit it may end, including start-up on a busy machine
PRELUDE = """
import ctypes, logging, pathlib, sys, threading, time
from trainer.reliability import watchdog
from trainer.config import WatchdogConfig
run = pathlib.Path(sys.argv[1])
log = logging.getLogger("meshlm")
log.addHandler(logging.StreamHandler())
log.addHandler(logging.FileHandler(run / "log.1.txt"))
def start(**limits):
    dog = watchdog.Watchdog(run, WatchdogConfig(**limits), 1)
    for n in (1, 2, 3):
        time.sleep(0.01)
        dog.step(n)
    print("ready", flush=True)
    return dog
"""


@contextlib.contextmanager
def script(run: pathlib.Path, code: str):
    """A process that runs `code`, after its start-up."""
    argv = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(run)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, cwd=ROOT, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def heartbeat(run: pathlib.Path, process: int = 1) -> dict:
    return json.loads((run / f"heartbeat.{process}.json").read_text())


STUCK = {
    "sleep": ("time.sleep(60)", "training"),
    "lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "training"),
    "c++": ("ctypes.CDLL(None).sleep(60)", "training"),
    "saving": ("dog.phase('saving'); time.sleep(60)", "saving"),
}


@pytest.mark.parametrize("how", STUCK)
def test_a_stall_prints_where_and_leaves_with_42(tmp_path, how):
    statement, phase = STUCK[how]
    limits = "min_s=0.5, slow_s=60" if phase == "training" else "min_s=60, slow_s=0.5"
    code = f"""
    def stuck_here(dog):
        {statement}
    stuck_here(start({limits}))
    """
    with script(tmp_path, code) as process:
        start = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 42
        assert time.monotonic() - start < 0.5 + LATE_S
    written = (tmp_path / "log.1.txt").read_text()
    for text in (err, written):
        assert text.count("error: stuck: ") == 1
        assert f"stuck: {phase} for " in text and "after step 3, and the limit is 0.5 s" in text
        assert "in stuck_here" in text and "in _watch" in text
    beat = heartbeat(tmp_path)
    assert beat["phase"] == f"stalled: {phase}" and beat["step"] == 3 and beat["seconds"] >= 0.5


def test_last_words_that_hang_are_cut_short(tmp_path):
    """The main thread is stuck writing to the log, so the error line never gets the log's lock."""
    code = """
    watchdog.DUMP_LIMIT_S = 0.3
    start(min_s=0.5)
    log.handlers[0].acquire()
    time.sleep(60)
    """
    with script(tmp_path, code) as process:
        process.communicate(timeout=30)
        assert process.returncode == 42


def test_a_stall_that_holds_the_gil_is_ended_by_the_timer(tmp_path):
    code = """
    def stuck_here():
        ctypes.PyDLL(None).sleep(60)
    start(slow_s=1)
    time.sleep(1.2)  # one look
    stuck_here()
    """
    with script(tmp_path, code) as process:
        start = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert time.monotonic() - start < 1.2 + 2 + LATE_S
    assert "Timeout" in err and "in stuck_here" in err


def test_a_pause_of_the_whole_process_is_no_stall(tmp_path):
    """The pause falls within a step, which lasts for more than one check after the pause."""
    code = """
    dog = start(min_s=4)
    sys.stdin.readline()
    dog.close()
    """
    with script(tmp_path, code) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.2)
        _, err = process.communicate("\n", timeout=30)
        assert (process.returncode, err) == (0, "")
    assert heartbeat(tmp_path)["phase"] == "ended"


@pytest.mark.parametrize("log", ["None", "run / 'log.1.txt'", "run / 'missing' / 'log.1.txt'"])
def test_sigquit_prints_stacks_and_the_process_goes_on(tmp_path, log):
    code = f"""
    def somewhere():
        print("ready", flush=True)
        sys.stdin.readline()
    watchdog.dump_on_quit({log})
    somewhere()
    """
    with script(tmp_path, code) as process:
        process.send_signal(signal.SIGQUIT)
        time.sleep(0.2)
        assert process.poll() is None
        _, err = process.communicate("\n", timeout=30)
        assert process.returncode == 0
    written = (tmp_path / "log.1.txt").read_text()
    in_file = log.count("/") == 1
    assert ("in somewhere" in err, "in somewhere" in written) == (not in_file, in_file)


# Heartbeats


def wait_for(what, seconds: float = 10):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_heartbeat_says_where_the_process_is(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_S", 2.5)
    dog = Watchdog(tmp_path, WatchdogConfig(), 3)
    path = tmp_path / "heartbeat.3.json"
    wait_for(path.exists)
    assert heartbeat(tmp_path, 3)["phase"] == "starting"
    dog.step(7)
    with dog.phase("evaluating"):
        wait_for(lambda: heartbeat(tmp_path, 3)["phase"] == "evaluating")
    wait_for(lambda: heartbeat(tmp_path, 3)["phase"] == "training")
    beat = heartbeat(tmp_path, 3)
    assert list(beat) == ["step", "phase", "seconds", "time", "host", "pid"]
    assert (beat["step"], beat["pid"]) == (7, os.getpid()) and 0 <= beat["seconds"] < 5
    assert beat["time"].endswith("+00:00")
    before = path.stat().st_mtime_ns
    time.sleep(1.2 * CHECK_S)
    assert path.stat().st_mtime_ns == before  # not every check writes a heartbeat
    wait_for(lambda: path.stat().st_mtime_ns > before)
    dog.close()
    assert heartbeat(tmp_path, 3)["phase"] == "ended"
    assert [p.name for p in tmp_path.iterdir()] == ["heartbeat.3.json"]
    assert not any(t.is_alive() for t in dog._threads)


@pytest.mark.parametrize("of", [1, 16, 500, 4096, 100_000])
def test_all_processes_together_write_a_hundred_heartbeats_a_second_at_most(tmp_path, of):
    """Each heartbeat creates a file and renames it, on the file system that the processes share."""
    dog = Watchdog(tmp_path, WatchdogConfig(), of - 1, of=of)
    wait_for((tmp_path / f"heartbeat.{of - 1}.json").exists)  # the first heartbeat is written at once
    dog.close()
    assert of / dog._every_s <= 100 and (dog._every_s == 5 or of > 500)


def test_who_reads_a_heartbeat_never_finds_half_of_one(tmp_path):
    dog = Watchdog(tmp_path, WatchdogConfig(), 1)
    wait_for((tmp_path / "heartbeat.1.json").exists)
    done = threading.Event()

    def write():
        while not done.is_set():
            dog._write_heartbeat(dog._mark)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(1000):
        assert heartbeat(tmp_path)["phase"] == "starting"
    done.set()
    writer.join()
    dog.close()


@pytest.mark.parametrize("what", ["missing", "a file", "full"])
def test_a_run_directory_that_cannot_be_written_to_stops_nothing(tmp_path, what, capfd):
    run = tmp_path / "run"
    if what == "a file":
        run.write_text("")
    elif what == "full":
        run.mkdir()
        for name in ("heartbeat.0.partial", "log.0.txt"):
            (run / name).symlink_to("/dev/full")
    codes, left = [], threading.Event()

    def leave(code):
        codes.append(code)
        left.set()

    dog = Watchdog(run, WatchdogConfig(min_s=0.5), 0, leave=leave)
    dog.step(1)
    time.sleep(0.01)
    dog.step(2)
    assert left.wait(10)
    dog.close()
    assert codes == [42]
    assert "test_a_run_directory" in capfd.readouterr().err
    assert not (run / "heartbeat.0.json").exists()


def test_no_limit_is_too_long_for_the_timer(tmp_path):
    dog = Watchdog(tmp_path, WatchdogConfig(slow_s=float("inf")), 0)
    time.sleep(1.5 * CHECK_S)
    assert all(t.is_alive() for t in dog._threads)
    dog.close()


# Limits, with a fake clock


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    return Pace(WatchdogConfig(min_s=10, factor=20, slow_s=1000), clock)


def steps(pace: Pace, clock: Clock, *seconds: float) -> None:
    for value in seconds:
        clock.now += value
        pace.step(pace._mark.step + 1)


def test_limit_of_a_step_is_a_multiple_of_the_median(pace, clock):
    assert pace.limit_s("starting") == pace.limit_s("training") == 1000
    pace.phase("compiling")
    steps(pace, clock, 300)
    assert pace._mark.phase == "training" and pace.limit_s("training") == 1000  # the only step was a compilation
    steps(pace, clock, 2)
    assert pace.limit_s("training") == 40
    steps(pace, clock, 0.1, 0.1, 500)
    assert pace.limit_s("training") == pytest.approx(20 * 1.05)
    steps(pace, clock, *[0.1] * MEDIAN_STEPS)
    assert pace.limit_s("training") == 10  # min_s; the first steps are forgotten
    assert pace.limit_s("evaluating") == 1000
    assert pace.limit_s("training", counts=False) == 1000  # peers may still be in the previous phase


@pytest.mark.parametrize("limits", [{}, {"slow_s": 1}, {"min_s": 1e5}, {"slow_s": float("inf")}], ids=str)
@pytest.mark.parametrize("save_s", [0, 300, 6 * 3600])
def test_nothing_that_is_allowed_elsewhere_ends_a_process(clock, limits, save_s):
    """slow_s ended a save that the limit of saves allows. A stuck process is found before the processes that wait."""
    pace = Pace(WatchdogConfig(**limits), clock)
    pace.save_limit_s = lambda: save_s
    steps(pace, clock, 1, 1)
    own = [pace.limit_s(phase) for phase in ("training", SAVING, "restoring", "evaluating")]
    assert pace.limit_s(SAVING) > save_s and pace.limit_s(WAITING) >= 2 * max(own)


def test_a_step_after_a_slow_phase_does_not_count(pace, clock):
    steps(pace, clock, 1, 1, 1)
    with pace.phase("evaluating"):
        clock.now += 50
        pace.tick()
        assert pace._mark.phase == "evaluating"
        with pace.phase("saving"):
            clock.now += 50
        assert pace._mark.phase == "evaluating"
    assert pace._mark[:3] == ("training", 3, clock.now)
    steps(pace, clock, 60, 3)
    assert list(pace._step_s) == [1, 1, 3]


def looks(pace: Pace, clock: Clock, *seconds: float) -> float:
    for value in seconds:
        clock.now += value
        stuck_s = pace.check()[1]
    return stuck_s


def test_time_stuck_begins_at_the_last_sign_of_life(pace, clock):
    assert looks(pace, clock, *[1.0] * 8) == 8
    clock.now += 0.75
    pace.step(1)
    assert looks(pace, clock, 0.25) == 0.25
    assert looks(pace, clock, *[1.0] * 9) == 9.25
    pace.phase("saving")
    assert looks(pace, clock, 1.0) == 1
    pace.tick()
    assert pace.check() == (("saving", 1, clock.now, False), 0)


def test_time_in_which_nobody_looked_does_not_count(pace, clock):
    steps(pace, clock, 1, 1)
    assert looks(pace, clock, 1.0, 1.0) == 2
    assert looks(pace, clock, 3600.0) == 2 + 2 * CHECK_S
    assert looks(pace, clock, 1.0) == 5
    pace.step(3)
    assert looks(pace, clock, 3600.0) == 2 * CHECK_S
    # A watchdog thread that is always late still finds a stall.
    assert looks(pace, clock, *[5.0] * 10) == 2 * CHECK_S * 11
