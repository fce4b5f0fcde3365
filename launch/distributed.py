"""Joins the processes of a run, with time limits, and lists what must be the same on all of them."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from launch import cli, environment, rendezvous
from trainer.config import Config
from trainer.errors import ConfigError, Stopped
from trainer.fields import flatten
from trainer.reliability import run_directory

PROGRESS_S = 10.0
PACKAGES = ("data", "launch", "model", "trainer")
START_S, HEARTBEAT_S = 300, 100


def initialize(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    run: str = "",
    timeout_s: int = START_S,
    heartbeat_s: int = HEARTBEAT_S,
) -> int:
    """Joins the processes, if there are several, by the flags or by the cluster's environment (TPU pod, Slurm, …).

    Args:
      run: the value of --workdir, which all processes must share.
      timeout_s: how long to wait for the coordinator and for the others.
      heartbeat_s: a process without a heartbeat for this long counts as dead, and the others exit.

    Returns:
      The number of processes in this process's settings. JAX uses the coordinator's number, so compare the two.

    Raises:
      ConfigError: only some of the flags are given, or a value is impossible; another run or program uses the port; the
        environment mentions several processes, but not how to join them.
      Stopped: the coordinator cannot be reached.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(v is None for v in given) and given != (None, None, None):
        raise ConfigError("--coordinator_address, --num_processes and --process_id go together; give all three or none")
    if coordinator_address is not None:
        _host_and_port(coordinator_address)
    local_device_ids = None
    if coordinator_address is None:
        # Calls JAX's own detection separately, to try the coordinator before JAX does, which would abort on failure.
        from jax._src.clusters import ClusterEnv

        coordinator_address, num_processes, process_id, local_device_ids = (
            ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_s)
        )
        if coordinator_address is None or (num_processes or 1) == 1:  # not on a cluster
            _check_single()
            environment.find_devices()
            return 1
    assert num_processes is not None and process_id is not None
    if process_id >= num_processes:
        raise ConfigError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM (launch/signals.py)
    _meet(coordinator_address, num_processes, process_id, run, timeout_s)
    joining = f"the devices of all {num_processes} processes, which met at {coordinator_address}"
    with _limit(joining, timeout_s, lambda: "see the logs of all processes, and start them again"):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                local_device_ids,
                cluster_detection_method="deactivate",  # otherwise Slurm's variables would choose the devices
                initialization_timeout=2 * timeout_s,  # our limit ends with a message, JAX's with SIGABRT
                heartbeat_timeout_seconds=heartbeat_s,
                shutdown_timeout_seconds=timeout_s,
            )
        except (RuntimeError, ValueError) as e:
            reason = " ".join(str(e).split())[:200]
            raise Stopped(
                f"cannot join the processes at {coordinator_address}: {reason}; start all of them again"
            ) from None
        environment.find_devices()  # a backend also waits for all processes
    return num_processes


def _meet(address: str, size: int, process: int, run: str, timeout_s: float) -> None:
    """Returns, on all processes, when all have connected to process 0 and its port is free for JAX."""
    host, port = _host_and_port(address)
    _bypass_proxies(host)
    if process:
        waiting = _WaitMessage(f"the coordinator at {address}", timeout_s)
        rendezvous.join((host, port), rendezvous.Peer.myself(process, run), timeout_s, waiting)
        return
    waiting = _WaitMessage(f"port {port} of this host", timeout_s)
    meeting = rendezvous.Rendezvous(address, port, size, run, timeout_s=timeout_s, progress=waiting)

    def who() -> str:
        shown = ", ".join(map(str, meeting.missing[:10]))
        return f"start the missing ones: {shown}" if shown else ""

    with contextlib.closing(meeting), _limit(f"all {size} processes at {address}", timeout_s, who):
        for refused in meeting.wait():
            cli.log.warning("refused: %s", refused)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    try:
        if not host.strip("[]").encode("idna") or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise ValueError
    except ValueError:  # also for an impossible host name
        raise ConfigError(f"--coordinator_address={address} is not HOST:PORT") from None
    return host.strip("[]"), int(port)


# Variables with the number of processes that launchers set. JAX cannot find the other processes from them.
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE", "JAX_NUM_PROCESSES")


def _check_single() -> None:
    """Raises ConfigError if the environment mentions several processes: this one would train by itself."""
    # A step of a job (srun) may have fewer tasks than the job.
    slurm = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    flags = "--coordinator_address=HOST:PORT --num_processes=N --process_id=I to each"
    for name in (slurm, *COUNTS):
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
            how = "start it with srun, or by launch/slurm/train.sbatch" if name == slurm else f"pass {flags}"
            raise ConfigError(
                f"{name}={os.environ[name]} says that this is one of several processes, but not how they find each "
                f"other; {how}; or unset {name} to train with only this process"
            )
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address} does not say which process this is; pass {flags}")


def _bypass_proxies(host: str) -> None:
    """Excludes the coordinator from the environment's proxies, which gRPC would use and which cannot reach it."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        jax.config.update("jax_check_proxy_envs", False)  # JAX warns about what is solved here
        usual = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        before = {name: os.environ.get(name) or usual for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy")}
        os.environ |= {name: ",".join(filter(None, (value, host))) for name, value in before.items()}


class _WaitMessage:
    """Logs from time to time what this process waits for, and for what reason."""

    def __init__(self, what: str, timeout_s: float):
        self._what = what
        self._timeout_s = timeout_s
        self._started = self._shown = time.monotonic()

    def __call__(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._shown > _progress_s(self._timeout_s):
            self._shown = now
            waited = now - self._started
            cli.log.info("waiting for %s: %s, %.0f of %.0f s", self._what, reason, waited, self._timeout_s)


def _progress_s(timeout_s: float) -> float:
    return min(PROGRESS_S, timeout_s / 4)


@contextlib.contextmanager
def _limit(what: str, timeout_s: float, advice: Callable[[], str]) -> Iterator[None]:
    """Logs that this process waits, and ends it at the limit with a message; JAX would abort without a message.

    Args:
      advice: what the user should do at the limit; '' if the wait is over.
    """
    done, started = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(_progress_s(timeout_s)):
            waited = time.monotonic() - started
            if waited > timeout_s:
                if text := advice():
                    cli.log.error("error: waited %.0f s for %s; %s", waited, what, text)
                    os._exit(cli.STOPPED)
                return
            cli.log.info("waiting for %s: %.0f of %.0f s", what, waited, timeout_s)

    threading.Thread(target=watch, name="start limit", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def shutdown() -> None:
    """Ends JAX's service on all processes together: if one ended first, the others would abort with 134."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def identity(config: Config) -> dict[str, Any]:
    """What must be the same on all processes before anything is written: config, code, versions, devices, variables."""
    return {
        **{f"config.{name}": value for name, value in flatten(config).items()},
        "code": code_version(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in run_directory.LIBRARIES},
        "devices of each process": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        **environment.compared(environment.numbers()),
    }


def code_version() -> str:
    """The first 16 digits of the SHA-256 of our source files."""
    root, digest = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
