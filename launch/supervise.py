"""Keep a training command running: restart it after a crash or a preemption, from its newest checkpoint.

  python -m launch.supervise [--flags] -- python -m launch.train --config=configs/tiny.py --workdir=runs/tiny

It restarts after exit code 42 (stopped, resumable), 1, 128 and above, and death by a signal, but not after 0, 2, 3, 4,
130 and others. After three restarts in a row without a new checkpoint it gives up. SIGTERM, SIGINT, SIGUSR1 and SIGHUP
are passed on to the command each time they arrive; after one of them it does not restart. (SIGQUIT, at which the
trainer logs its stacks, is only passed on.) The exit code is the command's, 128 + n for a death by signal n; 42 if a
signal arrives between two attempts.

Each attempt is a row of RUN/lives.jsonl. With several processes, each has its own supervisor. COMMAND has to be the
trainer itself, or something that becomes it (exec): signals go to one process only.
"""

import ctypes
import logging
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from absl import flags

from launch import cli, runtime
from launch.signals import STOPS
from trainer.errors import ConfigError
from trainer.reliability import restarts

log = logging.getLogger("meshlm")

WORKDIR = cli.define_run_path("workdir", None, "Run directory, if the command has no --workdir.")
PROCESS = flags.DEFINE_integer(
    "process",
    None,
    "Which of several processes this is, from 0, if the command and its environment do not say.",
    lower_bound=0,
)
MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts_without_progress", 3, "Restarts in a row without a new checkpoint.", lower_bound=1
)
BACKOFF_S = flags.DEFINE_float(
    "backoff_s", 1.0, "Wait before a restart; doubled after each one without progress.", lower_bound=0
)
MAX_BACKOFF_S = flags.DEFINE_float("max_backoff_s", 60.0, "Longest delay.", lower_bound=0)

FORWARDED = (*STOPS, signal.SIGQUIT)  # Ctrl-\: the trainer logs the stacks of its threads, and continues
PR_SET_PDEATHSIG = 1  # Linux: the signal a process gets when its parent dies


def main(*command: str) -> int:
    if not command:
        raise ConfigError("name a command: python -m launch.supervise -- python -m launch.train --workdir=RUN ...")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not a command, or not on the PATH")
    workdir = WORKDIR.value or cli.expanded(_flag(command, "workdir") or "")
    if not workdir:
        raise ConfigError("the command has no --workdir; give it one, or name the run with --workdir before the --")
    return supervise(command, pathlib.Path(workdir), _process(command) if PROCESS.value is None else PROCESS.value)


def supervise(command: Sequence[str], run: pathlib.Path, process: int) -> int:
    """Runs attempts until one ends the run or too many make no progress; returns the exit code."""
    signals, restart_log = SignalQueue(), restarts.RestartLog(run, process)
    earlier = len(restart_log.attempts)
    best = restarts.newest_step(run)
    first_wait = wait = min(BACKOFF_S.value, MAX_BACKOFF_S.value)
    restarts_without_progress = -1  # the first attempt is not a restart
    while True:
        restart_log.begin()
        returncode, stop_requested = _run_once(command, signals)
        attempt = restart_log.end(returncode)
        code = attempt.code
        if stop_requested or not _may_restart(code):
            break
        restarts_without_progress += 1
        if attempt.last_step > best:
            best = attempt.last_step
            restarts_without_progress = 0
            wait = first_wait
        if restarts_without_progress == MAX_RESTARTS.value:
            codes = ", ".join(str(attempt.code) for attempt in restart_log.attempts[-restarts_without_progress:])
            log.error(
                "error: %d restarts in a row without a new checkpoint, exit codes %s; giving up; see %s and %s",
                *(restarts_without_progress, codes, run / f"log.{process}.txt", restart_log.path),
            )
            break
        if sys.stdout.isatty():
            print()  # the trainer may have left a progress line there
        log.info(
            "Attempt %d ended: %s; checkpoint at step %d, %d steps lost. Restarting in %g s.",
            *(attempt.life, attempt.cause, attempt.last_step, attempt.lost_steps, wait),
        )
        if _stopped_while_waiting(wait, signals):
            log.info("Stopped between two attempts; the same command resumes from step %d.", attempt.last_step)
            code = cli.STOPPED
            break
        wait = min(2 * wait, MAX_BACKOFF_S.value)
    if attempt.last_step or len(restart_log.attempts) > earlier + 1:  # an immediate configuration error needs no table
        for line in restarts.table(restart_log.attempts, since=earlier):
            log.info("%s", line)
    return code


def _may_restart(code: int) -> bool:
    """Whether the code is 42; 1, an uncaught exception; or 128 and above, but not 130 (a second Ctrl-C)."""
    return code in (1, cli.STOPPED) or (code >= 128 and code != 130)


class SignalQueue:
    """Signals as a queue to read from: they interrupt nothing, so none arrives at a bad moment."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)

    def read(self, seconds: float | None = None) -> list[int]:
        """Waits for signals, at most for `seconds`; returns their numbers in order."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        return list(os.read(self._read, 4096)) if ready else []


def _run_once(command: Sequence[str], signals: SignalQueue) -> tuple[int, bool]:
    """Runs the command once and passes signals on; returns its return code, and whether a signal asked it to stop."""
    try:
        # A terminal's Ctrl-C does not reach another session directly, so the child gets it only once, from here.
        # close_fds=False: a lock of the caller (launch/tpu/worker.sh) is held while the trainer runs.
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent(), close_fds=False)
    except OSError as e:
        raise ConfigError(f"{command[0]} cannot be started: {e.strerror}") from None
    stop_requested = False
    while child.poll() is None:
        for number in signals.read():
            if number in FORWARDED:
                stop_requested |= number in STOPS
                child.send_signal(number)
    return child.returncode, stop_requested


def end_with_parent() -> Callable[[], None]:
    """Returns what the child calls before exec: if the supervisor is killed, the kernel sends it SIGTERM."""
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def call() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call
            os.kill(os.getpid(), signal.SIGTERM)

    return call


def _stopped_while_waiting(seconds: float, signals: SignalQueue) -> bool:
    end = time.monotonic() + seconds
    while True:
        left = max(end - time.monotonic(), 0.0)
        if set(signals.read(left)) & set(STOPS):
            return True
        if not left:
            return False


def _flag(command: Sequence[str], name: str) -> str | None:
    """The value of --name=VALUE or --name VALUE in a command; the last one, as the command itself uses it."""
    value = None
    for i, word in enumerate(command):
        given, equals, text = word.partition("=")
        if given in (f"--{name}", f"-{name}"):
            value = text if equals else "".join(command[i + 1 : i + 2])
    return value


def _process(command: Sequence[str]) -> int:
    """The index of the process that the command starts, as far as it is known before the start."""
    for text in (_flag(command, "process_id"), *map(os.environ.get, runtime.RANKS)):
        if text and text.isdecimal():
            return int(text)
    return 0


if __name__ == "__main__":
    cli.run(main, arguments=sys.maxsize)
