"""Signals at bad moments, in real processes: a stop exits with 42, a second interrupt with 130, and the run resumes
bit for bit."""

import signal
import time

import pytest

from tests import runs
from tests.system.faults import interrupted

pytestmark = pytest.mark.slow

SOON_S = 15  # from a signal to the exit, which takes a second or two on an idle machine
STUCK = ("--start_timeout_s=100", "--heartbeat_timeout_s=100")  # these limits do not end the process during a test


def test_sigterm_during_a_save(tmp_path, data, reference):
    """Fault 6: the save in progress is finished, then the current step is saved, too."""
    run = tmp_path / "run"
    with runs.ending(interrupted.start_one(run, data)) as (process,):
        runs.wait_until(lambda: interrupted.saving(run), process)
        process.send_signal(signal.SIGTERM)
        runs.finish(process, code=42, within_s=SOON_S)
    assert interrupted.saved(run)[-1] == runs.rows(run)[-1]["step"]
    interrupted.goes_on(run, data, reference, size=1)


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_during_an_evaluation(tmp_path, data, reference, size):
    """Fault 6: a long evaluation is interrupted, and runs after the restart."""
    run = tmp_path / "run"
    fields = {"eval__every_steps": 10, "eval__num_windows": 0}
    start = interrupted.start_gang if size == 2 else lambda *a, **k: [interrupted.start_one(*a, **k)]
    with runs.ending(*start(run, data, **fields)) as gang:
        runs.wait_for_rows(run, *gang, count=10)
        gang[-1].send_signal(signal.SIGTERM)
        for process in gang:
            runs.finish(process, code=42, within_s=SOON_S)
    assert interrupted.saved(run) == [10]
    assert not any("val/loss" in row for row in runs.rows(run)), "it came too late to mean anything"
    interrupted.goes_on(run, data, reference, size=1, **fields)
    assert [row["step"] for row in runs.rows(run) if "val/loss" in row] == [10, 15]


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_during_compilation(tmp_path, data, reference, size):
    """Fault 6: nothing is trained yet, so the process exits at once, although the main thread is in the compiler."""
    run = tmp_path / "run"
    start = interrupted.start_gang if size == 2 else lambda *a, **k: [interrupted.start_one(*a, **k)]
    cold = f"--compilation_cache={tmp_path / 'cache'}"
    with runs.ending(*start(run, data, cold, model__scan_layers=False)) as gang:
        runs.wait_until(lambda: all(interrupted.compiles(run, i) for i in range(size)), *gang)
        sent = time.monotonic()
        gang[-1].send_signal(signal.SIGTERM)
        out = [runs.finish(process, code=42, within_s=SOON_S) for process in gang]
    print("SIGTERM to exit:", time.monotonic() - sent)
    assert "Stopped before the first step was done" in out[0]
    assert not runs.rows(run)
    runs.train(run, data, devices=2, **interrupted.FIELDS | {"num_train_steps": 5})
    assert interrupted.trained(run) == interrupted.trained(reference)[:5]


def test_a_process_that_cannot_stop_leaves_by_the_deadline(tmp_path, data, reference):
    """Fault 6: a peer hangs, and so does the collective of the process; the machine may be preempted at any moment."""
    run = tmp_path / "run"
    with runs.ending(*interrupted.start_gang(run, data, *STUCK, watchdog__stop_s=2)) as gang:
        runs.wait_until(lambda: bool(interrupted.saved(run)), *gang)
        gang[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # until the other process is in the collective
        gang[0].send_signal(signal.SIGTERM)
        out = runs.finish(gang[0], code=42, within_s=SOON_S)
    assert "not stopped 2 s after the request" in out and "Thread 0x" in out
    interrupted.goes_on(run, data, reference, size=1)


def test_a_second_interrupt_where_the_first_cannot_work(tmp_path, data, reference):
    """Fault 7: the process exits with 130 at once, although the main thread waits for a peer in C++; the last save is
    intact."""
    run = tmp_path / "run"
    with runs.ending(*interrupted.start_gang(run, data, *STUCK)) as gang:
        runs.wait_until(lambda: bool(interrupted.saved(run)), *gang)
        gang[1].send_signal(signal.SIGSTOP)
        gang[0].send_signal(signal.SIGINT)
        time.sleep(1)
        assert gang[0].poll() is None
        gang[0].send_signal(signal.SIGINT)
        assert "Ctrl-C again exits at once" in runs.finish(gang[0], code=130, within_s=2)
    interrupted.goes_on(run, data, reference, size=1)


def test_a_second_interrupt_during_a_save(tmp_path, data, reference):
    """Fault 7: a half-written step is not a checkpoint; the run resumes from the step before."""
    run = tmp_path / "run"
    with runs.ending(interrupted.start_one(run, data)) as (process,):
        runs.wait_until(lambda: interrupted.saving(run), process)
        while process.poll() is None:  # repeated, because pending signals count as one
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        runs.finish(process, code=130, within_s=2)
    interrupted.goes_on(run, data, reference, size=1)


def test_a_second_interrupt_during_compilation(tmp_path, data):
    """Fault 7: the first interrupt would end the process at once if its peer were not stopped; the second does not wait
    for the peer."""
    run = tmp_path / "run"
    cold = f"--compilation_cache={tmp_path / 'cache'}"
    with runs.ending(*interrupted.start_gang(run, data, *STUCK, cold, model__scan_layers=False)) as gang:
        runs.wait_until(lambda: interrupted.compiles(run), *gang)
        gang[1].send_signal(signal.SIGSTOP)
        gang[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
        gang[0].send_signal(signal.SIGINT)
        runs.finish(gang[0], code=130, within_s=2)
