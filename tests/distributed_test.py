"""What a process learns about the others from its environment, and how it reaches them. network_test has real
processes."""

import os
import subprocess
import sys
import time

import jax
import pytest

from launch import distributed, runtime
from tests import runs
from trainer.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "JAX_COORD")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in (*distributed.COUNTS, *runtime.RANKS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2 says"),  # Open MPI 5
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "start it with srun"),
        ({"PMI_SIZE": "16", "PMI_RANK": "3"}, "PMI_SIZE=16 says that this is one of several"),
        ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}, "--num_processes=N --process_id=I"),  # torchrun
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "JAX_COORDINATOR_ADDRESS=localhost:1234 does not say"),
    ],
)
def test_one_of_several_does_not_train_alone(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as e:
        distributed.initialize(None, None, None)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_JOB_ID": "7"},  # ssh into a node
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1
        {"WORLD_SIZE": "", "PMI_SIZE": "none"},
    ],
)
def test_a_lone_process_stays_one(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize(None, None, None) == 1


TOLD = """
import sys, types
from launch import distributed, train
from trainer.reliability import coordination
from trainer.errors import ConfigError, Stopped

class Two:
    def __init__(self, *_):
        self.said = []
        made.append(self)
    def listen_for_errors(self, _): ...
    def check_same(self, *_):
        raise error
    def report_error(self, error):
        self.said.append(error)
    def exit_barrier(self, error):
        self.said.append("parts")

for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "START_TIMEOUT", "HEARTBEAT_TIMEOUT"):
    setattr(train, name, types.SimpleNamespace(value=None))
train.WORKDIR = types.SimpleNamespace(value=sys.argv[1])
for module, name in (
    (train.signals, "StopSignals"), (train.malloc, "tune_allocator"), (train.watchdog, "dump_on_quit"),
    (train.runtime, "use_gpu_memory"), (train.runtime, "seems_alone"), (train.environment, "load_jax"),
    (distributed, "initialize"),
):
    setattr(module, name, lambda *_, **__: None)
coordination.Processes = Two
for error in (Stopped("a peer is gone"), ConfigError("no such folder"), KeyError("x")):
    made = []
    try:
        train.main()
    except type(error) as e:
        assert e is error
        assert made[0].said == [error, "parts"], made[0].said
    else:
        raise AssertionError(error)
"""


def test_whatever_ends_one_is_told_to_all(tmp_path):
    """The other processes did not hear of errors whose code asks for a restart, and waited for the heartbeat
    timeout."""
    done = subprocess.run([sys.executable, "-c", TOLD, tmp_path], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("advice", ["start the missing ones: 1", ""])
def test_nobody_is_said_to_be_missing_when_all_have_come(monkeypatch, caplog, advice):
    """When the limit expires, the processes may just be about to be admitted; the next phase has its own limit."""
    left: list[int] = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    with distributed._limit("all 2 processes at host0:1", 0.2, lambda: advice):
        time.sleep(0.5)
    assert set(left) == ({42} if advice else set())
    assert ("error: waited 0 s for all 2 processes at host0:1; start the missing" in caplog.text) == bool(left)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"http_proxy": "http://p:1"}, "host0"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a.b"}, "a.b,host0"),
        ({"grpc_proxy": "http://p:1", "no_proxy": "a.b,.c"}, "a.b,.c,host0"),
        ({"http_proxy": "http://p:1", "no_grpc_proxy": "d", "no_proxy": "a"}, "d,host0"),
        ({}, None),
    ],
)
def test_the_coordinator_is_not_sought_through_a_proxy(monkeypatch, variables, expected):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")  # monkeypatch then undoes what the code sets
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        distributed._bypass_proxies("host0")
    finally:
        jax.config.update("jax_check_proxy_envs", True)
    found = dict(os.environ)
    assert found.get("no_grpc_proxy") == expected
    if expected:
        assert found["no_proxy"].endswith("host0") and found["NO_PROXY"].endswith("host0")
