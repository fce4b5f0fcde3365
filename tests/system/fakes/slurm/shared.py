"""Shared by the fakes of Slurm's commands: a folder ($FAKE_SLURM) with a log of calls and the state of one job.

The fakes behave as Slurm 22.05 was observed to; slurm_test.py runs the same tests with the fakes and with Slurm.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys

FOLDER = pathlib.Path(os.environ["FAKE_SLURM"])
JOB_ID = 4095 + 4096  # gives the coordinator the highest port
KILL_WAIT_S = 15.0  # the time from a SIGTERM to the SIGKILL


def log() -> None:
    """Adds this call to calls.jsonl."""
    row = json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(row + "\n")


def say(name: str, value: object = "") -> None:
    """Stores a text. A reader sees the text before or this one, never an empty file."""
    new = FOLDER / f".{name}.{os.getpid()}"
    new.write_text(str(value))
    new.replace(FOLDER / name)


def said(name: str) -> str | None:
    """The stored text of `name`; None if there is none."""
    path = FOLDER / name
    return path.read_text() if path.exists() else None


def forget(name: str) -> None:
    (FOLDER / name).unlink(missing_ok=True)


def send(number: int, *pids: str, group: bool = False) -> None:
    for pid in map(int, pids):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(pid, number)


def tasks() -> list[str]:
    return (said("tasks") or "").split()


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Splits a command line: the leading options --NAME=VALUE and --NAME, and the remaining words."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, value = words[0][2:].partition("=")
        found[name] = value
        words = words[1:]
    return found, words


def end_job() -> None:
    """Sends SIGTERM as slurmd does: to the process group of the script, and to the tasks."""
    if batch := said("batch"):
        send(signal.SIGTERM, batch, group=True)
    send(signal.SIGTERM, *tasks())
