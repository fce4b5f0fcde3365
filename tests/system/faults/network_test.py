"""Processes that do not find each other, disagree on their number, have different clocks, or lose their link."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time

import pytest

from tests import runs
from tests.system.faults import interrupted

pytestmark = pytest.mark.slow

LIMIT = "--start_timeout_s=5"
WITHIN_S = 25  # the limit plus the time that Python and JAX need to start on a busy machine
GONE = {42, *interrupted.CRASHED}
# Sets the clock of Python code an hour ahead. Other code keeps the real clock, and this must not matter either.
LATER = """
import datetime, time
now, now_ns = time.time, time.time_ns
time.time = lambda: now() + 3600
time.time_ns = lambda: now_ns() + 3600 * 10**9
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Later
"""


def alone(run, data, address: str, process: int = 1, **more) -> subprocess.Popen:
    """Starts one of two processes; the other is not started."""
    flags = (f"--coordinator_address={address}", "--num_processes=2", f"--process_id={process}", LIMIT)
    return runs.start([*more.pop("before", []), *runs.command(run, data, *flags, **interrupted.FIELDS)], **more)


@contextlib.contextmanager
def linked():
    """(names, addresses) of two network namespaces with a link between them."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"meshlm{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    hosts = [f"/etc/netns/{name}" for name in names]  # `ip netns exec` mounts these files over /etc
    try:
        for name in names:
            if ip("netns", "add", name, check=False):
                pytest.skip("network namespaces are not allowed here")
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address, folder in zip(names, addresses, hosts, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
            os.makedirs(folder)
            with open(f"{folder}/hosts", "w") as file:
                file.write(f"127.0.0.1 localhost\n{address} {platform.node()}\n")
        yield names, addresses
    finally:
        for name, folder in zip(names, hosts, strict=True):
            ip("netns", "delete", name, check=False)
            shutil.rmtree(folder, ignore_errors=True)


def ip(*words: str, check: bool = True) -> int:
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode


def inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


# Before the processes have found each other


@pytest.mark.parametrize("host, reason", [("localhost", "Connection refused"), ("missing.invalid", "not known")])
def test_no_coordinator(tmp_path, data, host, reason):
    """Fault 23: nothing listens at the address, or there is no such host: within the limit, one line names the
    address."""
    address = f"{host}:{runs.free_port()}"
    out = runs.finish(alone(tmp_path / "run", data, address), code=42, within_s=WITHIN_S)
    assert f"error: no coordinator at {address} after 5 s: " in out.splitlines()[-1] and reason in out
    assert f"waiting for the coordinator at {address}: " in out
    assert "Traceback" not in out and not (tmp_path / "run").exists()


def test_a_network_that_swallows_packets(tmp_path, data):
    """Fault 23: a process does not wait longer than the limit if a firewall drops its packets."""
    with linked() as (names, _):
        ip("-n", names[0], "neighbour", "add", "10.77.0.9", "lladdr", "02:00:00:00:00:09", "dev", names[0])
        process = alone(tmp_path / "run", data, "10.77.0.9:1234", before=inside(names[0]))
        out = runs.finish(process, code=42, within_s=WITHIN_S)
    assert "error: no coordinator at 10.77.0.9:1234 after " in out.splitlines()[-1] and "timed out" in out


def test_a_worker_that_does_not_come(tmp_path, data):
    """Fault 23: process 0 reports that a process is missing; JAX would abort silently (134)."""
    address = f"localhost:{runs.free_port()}"
    out = runs.finish(alone(tmp_path / "run", data, address, process=0), code=42, within_s=WITHIN_S)
    assert "error: waited " in out.splitlines()[-1] and f"for all 2 processes at {address}; start the missing" in out


@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_while_waiting_for_the_others(tmp_path, data, process):
    """Faults 23 and 6: there is nothing to save; the main thread may be in C++ for minutes."""
    flags = (f"--coordinator_address=localhost:{runs.free_port()}", "--num_processes=2", f"--process_id={process}")
    argv = runs.command(tmp_path / "run", data, *flags, "--start_timeout_s=8", **interrupted.FIELDS)
    with runs.ending(runs.start(argv)) as (waiting,):
        assert waiting.stdout is not None and "waiting for " in waiting.stdout.readline()
        waiting.terminate()
        assert "nothing to save" in runs.finish(waiting, code=42, within_s=3)


@pytest.mark.parametrize(
    "counts, code, message",
    [((2, 3), 2, r"\(process 1\) has another number of processes: --num_processes: 3 there, 2 on"),
     ((3, 2), 42, r"error: (waited|not all|process 0 at .* is gone: |no coordinator)")],
)  # fmt: skip
def test_another_number_of_processes(tmp_path, data, counts, code, message):
    """Fault 23: JAX would use the coordinator's number; both processes exit, and each says what is wrong or missing."""
    address = f"--coordinator_address=localhost:{runs.free_port()}"
    gang = []
    for i, count in enumerate(counts):
        flags = (address, f"--num_processes={count}", f"--process_id={i}", LIMIT, "--heartbeat_timeout_s=10")
        gang.append(runs.start(runs.command(tmp_path / "run", data, *flags, **interrupted.FIELDS)))
    out = runs.finish_gang(gang, code)
    assert all(re.search(message, text) for text in out) and ("error: waited" in out[0]) == (code == 42)
    assert not (tmp_path / "run").exists()


def test_strangers_on_the_port_of_a_run(tmp_path, data):
    """Fault 23: a second run, and a process whose number has already joined, exit with one line; the run is not
    disturbed.

    JAX would end the first run: "unexpectedly tried to connect with a different incarnation".
    """
    address = f"localhost:{runs.free_port()}"
    with runs.ending(*interrupted.start_gang(tmp_path / "run", data, address=address)) as gang:
        runs.wait_for_rows(tmp_path / "run", *gang, count=5)
        strangers = [alone(tmp_path / "other", data, address, process=i) for i in (0, 1)]
        strangers.append(alone(tmp_path / "run", data, address, process=1))
        with runs.ending(*strangers):
            first, *others = [runs.finish(process, code=2, within_s=2 * WITHIN_S) for process in strangers]
        assert "error: port " in first.splitlines()[-1] and "another run or program has it" in first
        assert all("is in use: the program that listens there does not wait" in out.splitlines()[-1] for out in others)
        assert not any("Traceback" in out for out in (first, *others)) and not (tmp_path / "other").exists()
        runs.wait_for_rows(tmp_path / "run", *gang, count=len(runs.rows(tmp_path / "run")) + 5)


def test_a_proxy_that_does_not_know_the_way(tmp_path, data):
    """Fault 23: gRPC would try to reach the coordinator through the proxy, and wait forever."""
    proxy = {name: "http://proxy.invalid:3128" for name in ("http_proxy", "https_proxy", "grpc_proxy")}
    fields = {"num_train_steps": 2, "environments": {0: proxy, 1: proxy}}
    out = runs.finish_gang(interrupted.start_gang(tmp_path / "run", data, **fields))
    assert "Everything is in" in out[0] and "JAX detected proxy" not in out[0]


# After the processes have found each other


def test_clocks_an_hour_apart(tmp_path, data, reference):
    """Fault 25: one process decides when to save, so all processes have the same timed saves."""
    run, later = tmp_path / "run", tmp_path / "later"
    later.mkdir()
    (later / "sitecustomize.py").write_text(LATER)
    by_time = {"checkpoint__every_steps": 0, "checkpoint__every_minutes": 0.005, "checkpoint__max_share": 1.0}
    fields = {"num_train_steps": interrupted.STEPS, "checkpoint__keep_last": 1000, **by_time}
    out = runs.finish_gang(interrupted.start_gang(run, data, environments={1: {"PYTHONPATH": str(later)}}, **fields))
    assert len(interrupted.saved(run)) > 2, "no saves by time"
    assert not any("FAILED" in text for text in out)
    assert interrupted.trained(run) == interrupted.trained(reference)


def test_the_link_between_two_hosts_is_cut(tmp_path, data, reference):
    """Fault 2, on hosts with their own addresses: each process considers the other dead and exits; then both resume."""
    run = tmp_path / "run"
    limits = {"watchdog__min_s": 3.0, "watchdog__factor": 1.0}
    with linked() as (names, addresses):
        host = {"address": f"{addresses[0]}:1234", "before": {0: inside(names[0]), 1: inside(names[1])}}
        with runs.ending(*interrupted.start_gang(run, data, **host, **limits)) as gang:
            runs.wait_until(lambda: bool(interrupted.saved(run)), *gang)
            ip("-n", names[0], "link", "set", names[0], "down")
            cut = time.monotonic()
            for process in gang:
                runs.finish(process, GONE, within_s=30)
        print(f"link cut, both left after {time.monotonic() - cut:.1f} s")
        ip("-n", names[0], "link", "set", names[0], "up")
        interrupted.goes_on(run, data, reference, **host)
