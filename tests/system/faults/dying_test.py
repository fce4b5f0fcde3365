"""Processes that die or hang: the other processes report this within the limit, and the run resumes bit for bit."""

import json
import os
import shutil
import signal
import sys
import time

import pytest

from tests import runs
from tests.system.faults import interrupted
from trainer.reliability import restarts

pytestmark = pytest.mark.slow

# From the death of one process to the exit of the other: the heartbeat timeout of 10 s, plus time on a busy machine.
NOTICED_S = 30
GONE = {42, *interrupted.CRASHED}


def test_all_killed_during_a_save(tmp_path, data, reference):
    """Fault 1: the half-written step is removed, and the run resumes from the last committed step."""
    run = tmp_path / "run"
    with runs.ending(*interrupted.start_gang(run, data)) as gang:
        runs.wait_until(lambda: interrupted.saving(run), *gang)
        runs.kill(gang)
    assert interrupted.saving(run), "the kill came too late to mean anything"
    interrupted.goes_on(run, data, reference)
    assert not interrupted.saving(run)


def test_one_killed(tmp_path, data, reference):
    """Fault 2: the other process exits within the heartbeat timeout and says why, and the same commands resume the
    run."""
    run, before = tmp_path / "run", 0
    for victim in (1, 0):
        with runs.ending(*interrupted.start_gang(run, data)) as gang:
            runs.wait_until(lambda: len(interrupted.saved(run)) > before, *gang)  # noqa: B023
            runs.kill([gang[victim]])
            killed = time.monotonic()
            out = runs.finish(gang[1 - victim], GONE, within_s=NOTICED_S)
        print(f"process {victim} killed, the other left after {time.monotonic() - killed:.1f} s")
        assert "another process has ended" in out or "Terminating process" in out, out
        before = len(interrupted.saved(run))
    interrupted.goes_on(run, data, reference)


def test_one_killed_under_supervisors(tmp_path, data, reference):
    """Fault 2: the supervisors restart both processes, although these neither end nor start at the same time."""
    run, supervisor = tmp_path / "run", [sys.executable, "-m", "launch.supervise", "--backoff_s=1", "--"]
    fields = {"num_train_steps": 60, "before": {0: supervisor, 1: supervisor}}
    with runs.ending(*interrupted.start_gang(run, data, **fields)) as gang:
        runs.wait_until(lambda: bool(interrupted.saved(run)), *gang)
        os.kill(json.loads((run / "heartbeat.1.json").read_text())["pid"], signal.SIGKILL)
        out = [runs.finish(process, within_s=90) for process in gang]
    assert interrupted.trained(run) == interrupted.trained(reference)[:60]
    assert all(len(restarts.read_attempts(run / name)) <= 3 for name in ("lives.jsonl", "lives.1.jsonl")), out


def test_one_stands_still(tmp_path, data, reference):
    """Fault 8: the other process reports what it is stuck in, and exits; the stopped process exits when it
    continues."""
    run, before = tmp_path / "run", 0
    limits = {"watchdog__min_s": 2.0, "watchdog__factor": 1.0}
    for victim in (1, 0):
        with runs.ending(*interrupted.start_gang(run, data, **limits)) as gang:
            runs.wait_until(lambda: len(interrupted.saved(run)) > before, *gang)  # noqa: B023
            gang[victim].send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            out = runs.finish(gang[1 - victim], code=42, within_s=NOTICED_S)
            print(f"process {victim} stopped, the other left after {time.monotonic() - stopped:.1f} s")
            assert "stuck: " in out and 'loop.py", line' in out
            gang[victim].send_signal(signal.SIGCONT)
            runs.finish(gang[victim], GONE, within_s=NOTICED_S)
            print(f"and the stopped one by {time.monotonic() - stopped:.1f} s")
        before = len(interrupted.saved(run))
    interrupted.goes_on(run, data, reference)


def test_a_crash_loop_ends(tmp_path, data):
    """Fault 26: a trainer that never reaches a step is restarted three times; then the supervisor gives up."""
    if shutil.which("prlimit") is None:
        pytest.skip("needs prlimit (util-linux)")
    run = tmp_path / "run"
    supervisor = [sys.executable, "-m", "launch.supervise", "--backoff_s=0.1", "--", "prlimit", "--cpu=1:9"]
    with runs.ending(runs.start([*supervisor, *runs.command(run, data)])) as (process,):
        out = runs.finish(process, 128 + signal.SIGXCPU, within_s=60)
    assert [f"Attempt {i} ended: signal SIGXCPU" in out for i in range(1, 5)] == [True, True, True, False]
    assert "3 restarts in a row without a new checkpoint, exit codes 152, 152, 152; giving up" in out
