"""Joining the processes of a run: found, waited for with a limit, counted; and what has to be the same on all."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from launch import cli
from trainer import run_directory
from trainer.config import Config, flatten
from trainer.errors import ConfigError, Stopped

PROGRESS_S = 10.0
PACKAGES = ("data", "launch", "model", "trainer")
START_S, HEARTBEAT_S = 300, 100


def initialize(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout_s: int = START_S,
    heartbeat_s: int = HEARTBEAT_S,
) -> int:
    """Joins the processes, by the flags or by what the cluster says (TPU pod, Slurm, Open MPI, …); a lone one stays so.

    Args:
      timeout_s: how long to wait for the coordinator and for the others.
      heartbeat_s: a process not heard of for so long is dead, and the others leave.

    Returns:
      How many processes this one was told of. JAX goes by what the coordinator was told, so it is to be compared.

    Raises:
      ConfigError: only some of the flags, or impossible values.
      Stopped: the coordinator cannot be reached.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(v is None for v in given) and given != (None, None, None):
        raise ConfigError("--coordinator_address, --num_processes and --process_id go together; give all three or none")
    if coordinator_address is not None:
        _host_and_port(coordinator_address)
    local_device_ids = None
    if coordinator_address is None:
        # JAX's own detection, taken apart so that the coordinator can be tried before JAX aborts over it.
        from jax._src.clusters import ClusterEnv

        coordinator_address, num_processes, process_id, local_device_ids = (
            ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_s)
        )
        if coordinator_address is None or (num_processes or 1) == 1:  # no cluster around
            return 1
    assert num_processes is not None and process_id is not None
    if process_id >= num_processes:
        raise ConfigError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself (launch/signals.py)
    started = time.monotonic()
    if process_id != 0:
        wait_for(coordinator_address, timeout_s)
    with _limit(f"all {num_processes} processes at {coordinator_address}", started, timeout_s):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                local_device_ids,
                cluster_detection_method="deactivate",  # or Slurm's variables would add the devices to our flags
                initialization_timeout=2 * timeout_s,  # ours ends in a message, JAX's in SIGABRT
                heartbeat_timeout_seconds=heartbeat_s,
                shutdown_timeout_seconds=timeout_s,
            )
        except (RuntimeError, ValueError) as e:
            reason = " ".join(str(e).split())[:200]
            raise Stopped(f"cannot join the processes at {coordinator_address}: {reason}; start all again") from None
        jax.devices()  # a backend waits for all processes, too
    return num_processes


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    try:
        if not host.strip("[]").encode("idna") or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise ValueError
    except ValueError:  # also a name that no host has
        raise ConfigError(f"--coordinator_address={address} is not HOST:PORT") from None
    return host.strip("[]"), int(port)


def wait_for(address: str, timeout_s: float) -> None:
    """Waits until a TCP connection to HOST:PORT succeeds, with a line now and then. Raises ConfigError, Stopped."""
    host, port = _host_and_port(address)
    start, shown = time.monotonic(), time.monotonic()
    while True:
        left = timeout_s - (time.monotonic() - start)
        try:
            socket.create_connection((host, port), timeout=min(5.0, max(left, 0.1))).close()
            return
        except OSError as e:
            reason = e.strerror or str(e)
        waited = time.monotonic() - start
        if waited > timeout_s:
            raise Stopped(
                f"no coordinator at {address} after {waited:.0f} s: {reason}; start process 0 there, open the port, or "
                "correct --coordinator_address"
            )
        if time.monotonic() - shown > _progress_s(timeout_s):
            shown = time.monotonic()
            cli.log.info("waiting for the coordinator at %s: %s, %.0f of %.0f s", address, reason, waited, timeout_s)
        time.sleep(0.5)


def _progress_s(timeout_s: float) -> float:
    return min(PROGRESS_S, timeout_s / 4)


@contextlib.contextmanager
def _limit(what: str, started: float, timeout_s: float) -> Iterator[None]:
    """Says that it waits, and ends the process at the limit: JAX would abort without a word about why."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_progress_s(timeout_s)):
            waited = time.monotonic() - started
            if waited > timeout_s:
                cli.log.error("error: not %s are here after %.0f s; start the missing ones", what, waited)
                os._exit(cli.STOPPED)
            cli.log.info("waiting for %s: %.0f of %.0f s", what, waited, timeout_s)

    threading.Thread(target=watch, name="start limit", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def shutdown() -> None:
    """Leaves together, where every process gets here: one that ended first would take the others down with 134."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def identity(config: Config) -> dict[str, Any]:
    """What must be the same on every process before anything is written: config, code, versions, devices."""
    return {
        **{f"config.{name}": value for name, value in flatten(config).items()},
        "code": code_version(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in run_directory.LIBRARIES},
        "devices of each process": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }


def code_version() -> str:
    """SHA-256 of our source files, cut to 16 digits."""
    root, digest = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).glob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
