"""Workers end with their parent, and the end of a worker is an error that says how to continue."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from data.errors import DataError
from data.preparation import pool
from data.preparation.pool import Pool

ROOT = pathlib.Path(__file__).parent.parent


def square(n: int) -> tuple[int, int]:
    return n * n, os.getpid()


def kill_yourself_at(n: int) -> None:
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def refuse(n: int) -> None:
    raise DataError(f"no {n}")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once(workers):
    with Pool(workers) as processes:
        done = dict(processes.run(square, ((n,) for n in range(40))))
    assert {job: result[0] for job, result in done.items()} == {(n,): n * n for n in range(40)}
    assert (os.getpid() in {pid for _, pid in done.values()}) == (workers == 1)


def test_a_killed_worker_is_an_error_that_says_how_to_go_on():
    with Pool(2) as processes, pytest.raises(DataError, match="fewer --workers"):
        list(processes.run(kill_yourself_at, ((n,) for n in range(20))))


def test_what_a_worker_raises_is_raised_here():
    with Pool(2) as processes, pytest.raises(DataError, match="no 0"):
        list(processes.run(refuse, [(0,)]))


SLEEPERS = """
import os, time
from data.preparation.pool import Pool
from tests.pool_test import report_and_sleep
if __name__ == "__main__":
    with Pool(2) as processes:
        list(processes.run(report_and_sleep, [(0,), (1,)]))
"""


def report_and_sleep(n: int) -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(60)


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    argv = [sys.executable, tmp_path / "sleepers.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(alive, pids))
        parent.kill()
        parent.stdout.close()
    wait_for_the_end(pids)


def wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


INTERRUPTED = """
import sys
from data.preparation.pool import Pool
from tests.pool_test import report_and_sleep
if __name__ == "__main__":
    try:
        with Pool(3) as processes:
            print("begun", flush=True)
            list(processes.run(report_and_sleep, [(n,) for n in range(9)]))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3, 0.7, 1.5])
def test_ctrl_c_ends_workers_at_once_and_without_a_word(after_s, tmp_path):
    """The process group gets SIGINT, as from a terminal, even while workers start. Each worker would sleep a minute."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "interrupted.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(after_s)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "")
    wait_for_the_end(workers)


def test_ctrl_c_waits_while_a_worker_starts():
    """This holds even if another thread gets the signal: blocking it affects only the thread that blocks it."""
    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
    begun = False
    with pytest.raises(KeyboardInterrupt):
        with pool._interrupts_later():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            begun = True
        time.sleep(10)
    assert begun and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_ends_the_other_workers_at_once():
    began = time.monotonic()
    with pytest.raises(DataError, match="no 7"), Pool(2) as processes:
        list(processes.run(refuse_or_sleep, [(0,), (7,)]))
    assert time.monotonic() - began < 30


def refuse_or_sleep(n: int) -> None:
    if n:
        refuse(n)
    time.sleep(60)


def test_cores_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "CGROUPS", tmp_path)
    allowed = len(os.sched_getaffinity(0))
    assert pool.cores() == allowed
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert pool.cores() == allowed
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert pool.cores() == 1
    (tmp_path / "cpu.max").write_text("not a number")
    assert pool.cores() == allowed
    command = [sys.executable, "-c", "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
               "from data.preparation.pool import cores; print(cores())"]  # fmt: skip
    assert subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) == b"1\n"
