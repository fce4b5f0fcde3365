"""Four hosts on one switch, each with its own address. As on GPU nodes, launch/gpu/run.sh starts a process on each host
with its node number; this needs no GPU."""

import contextlib
import os
import pathlib
import platform
import shutil
import subprocess
import time

import pytest

from tests import runs
from tests.system.faults import interrupted
from tests.system.faults.network_test import inside, ip
from trainer.reliability import restarts

pytestmark = pytest.mark.slow

HOSTS = 4
STEPS = 60
FIELDS = {"num_train_steps": STEPS, "mesh__data": HOSTS, "watchdog__min_s": 5.0, "watchdog__factor": 1.0}
LIMITS = ("--heartbeat_timeout_s=10", "--start_timeout_s=120")
WITHIN_S = 300  # enough for two runs of four processes on few cores


@contextlib.contextmanager
def switched():
    """(names, addresses) of network namespaces that are all linked to one switch."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    switch = f"meshlm{os.getpid()}"
    names = [f"{switch}h{i}" for i in range(HOSTS)]
    addresses = [f"10.78.0.{i + 1}" for i in range(HOSTS)]
    try:
        for name in (switch, *names):
            if ip("netns", "add", name, check=False):
                pytest.skip("network namespaces are not allowed here")
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            folder = pathlib.Path("/etc/netns", name)  # `ip netns exec` mounts these files over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {platform.node()}\n")
        yield names, addresses
    finally:
        for name in (switch, *names):
            ip("netns", "delete", name, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def start(run: pathlib.Path, data: pathlib.Path, names: list[str], addresses: list[str]) -> list[subprocess.Popen]:
    """Starts the documented command on every host."""
    gang, command = [], runs.command(run, data, *LIMITS, **interrupted.FIELDS | FIELDS)
    for i, name in enumerate(names):
        place = (f"--nodes={HOSTS}", f"--node={i}", f"--coordinator={addresses[0]}:1234", "--skip_check")
        gang.append(runs.start([*inside(name), "launch/gpu/run.sh", *place, "--", *command]))
    return gang


def ended(run: pathlib.Path) -> list[int]:
    """The number of attempts that have ended, for the trainer of each host."""
    names = ["lives.jsonl", *(f"lives.{i}.jsonl" for i in range(1, HOSTS))]
    return [len(restarts.read_attempts(run / name)) if (run / name).exists() else 0 for name in names]


def test_one_host_is_cut_off(tmp_path, data):
    """Fault 2: all trainers exit, their supervisors wait for the missing host, and all resume when the link is
    restored."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    with switched() as (names, addresses):
        with runs.ending(*start(whole, data, names, addresses)) as gang:
            out = [runs.finish(process, within_s=WITHIN_S) for process in gang]
        assert "4 cpu in 4 process(es)" in out[0] and ended(whole) == [1] * HOSTS
        with runs.ending(*start(run, data, names, addresses)) as gang:
            runs.wait_until(lambda: bool(interrupted.saved(run)), *gang)
            ip("-n", names[2], "link", "set", "eth0", "down")
            cut = time.monotonic()
            runs.wait_until(lambda: min(ended(run)) >= 1, *gang)
            print(f"link cut, all trainers left within {time.monotonic() - cut:.1f} s")
            assert len(interrupted.trained(run)) < STEPS, "the cut came too late to mean anything"
            ip("-n", names[2], "link", "set", "eth0", "up")
            out = [runs.finish(process, within_s=WITHIN_S) for process in gang]
    assert "Resuming after step " in out[0] and min(ended(run)) >= 2
    assert interrupted.trained(run) == interrupted.trained(whole)
