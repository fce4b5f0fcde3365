"""Workers end with their parent, and their end is an error that says how to go on."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data.errors import DataError
from data.pool import Pool

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
    with Pool(workers) as pool:
        done = dict(pool.run(square, ((n,) for n in range(40))))
    assert {job: result[0] for job, result in done.items()} == {(n,): n * n for n in range(40)}
    assert (os.getpid() in {pid for _, pid in done.values()}) == (workers == 1)


def test_a_killed_worker_is_an_error_that_says_how_to_go_on():
    with Pool(2) as pool, pytest.raises(DataError, match="fewer --workers"):
        list(pool.run(kill_yourself_at, ((n,) for n in range(20))))


def test_what_a_worker_raises_is_raised_here():
    with Pool(2) as pool, pytest.raises(DataError, match="no 0"):
        list(pool.run(refuse, [(0,)]))


SLEEPERS = """
import os, time
from data.pool import Pool
from tests.pool_test import report_and_sleep
if __name__ == "__main__":
    with Pool(2) as pool:
        list(pool.run(report_and_sleep, [(0,), (1,)]))
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
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
