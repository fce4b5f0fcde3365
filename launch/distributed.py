"""Several processes: start-up, agreement, and stopping all of them at the same step."""

import faulthandler
import hashlib
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch import cli
from trainer.errors import ConfigError

log = logging.getLogger("meshlm")

# A process that was told to stop and is stuck elsewhere must still leave, before the machine is taken away.
STOP_DEADLINE_S = 300


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes, by the flags or by what the cluster says (TPU pod, Slurm, Open MPI, …); a lone one stays so.

    Raises:
      ConfigError: only some of the flags, or impossible values.
    """
    given = (coordinator_address, num_processes, process_id)
    if given == (None, None, None):
        try:
            jax.distributed.initialize()
        except ValueError:  # no cluster around
            return
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ConfigError("--coordinator_address, --num_processes and --process_id go together; give all three or none")
    if process_id >= num_processes:
        raise ConfigError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def shutdown() -> None:
    """Leaves together, where every process gets here: one that ended first would take the others down with 134."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def check_same(value: Any, what: str) -> None:
    """Raises ConfigError on every process when `value` is not the same on all: they would train different things."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest()[:4], np.uint32)
    all_digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1)
    others = [i for i, d in enumerate(all_digests) if d != all_digests[0]]
    if others:
        shutdown()
        raise ConfigError(f"process(es) {others} have another {what} than process 0; give all the same flags and files")


class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) ask for a save and exit code 42; a second Ctrl-C leaves with 130.

    With several processes JAX's own SIGTERM handler tells the others, and all agree on the step to stop after; the
    other signals are turned into a SIGTERM to this process.
    """

    def __init__(self) -> None:
        self._asked = False
        self._interrupts = 0
        self._several = jax.process_count() > 1
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGUSR1, self._handle)
        if not self._several:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(130)
        if not self._asked:
            os.write(2, b"\nStopping after this step; saving. Ctrl-C again leaves at once.\n")
            self._asked = True
            deadline = threading.Timer(STOP_DEADLINE_S, _give_up)
            deadline.daemon = True
            deadline.start()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process. To be called after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._asked


def _give_up() -> None:
    print(f"not stopped {STOP_DEADLINE_S} s after being asked to; leaving. Where it is:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os._exit(cli.STOPPED)
