"""Shared by the tests of faults: a run that does not end by itself, and the uninterrupted run that it must equal.

One process with two devices and two processes with one device each have the same losses, bit for bit.
"""

import pathlib
import subprocess

from tests import runs

STEPS = 200
WHOLE_STEPS = 60  # of the uninterrupted run on one device
CRASHED = range(128, 160)  # death by a signal; JAX aborts (134) when a peer is gone
# Steps take a few milliseconds, so that a fault strikes well before the last step that is compared.
FIELDS = {
    "num_train_steps": 100_000,
    "optimizer__decay_steps": STEPS,
    "data__seq_len": 64,
    "model__dropout": 0.1,
    "mesh__data": 2,
    "eval__every_steps": 0,
}


def start_one(run: pathlib.Path, data: pathlib.Path, *flags: str, **fields) -> subprocess.Popen:
    return runs.start(runs.command(run, data, *flags, **{**FIELDS, **fields}), devices=2)


def start_gang(run: pathlib.Path, data: pathlib.Path, *flags: str, **more) -> list[subprocess.Popen]:
    flags = ("--heartbeat_timeout_s=10", "--start_timeout_s=60", *flags)
    return runs.start_gang(run, data, *flags, **{**FIELDS, **more})


def saved(run: pathlib.Path) -> list[int]:
    """Steps committed so far."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def saving(run: pathlib.Path) -> bool:
    """Whether a save after the first is in progress, judged by the files."""
    return bool(saved(run)) and any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def compiles(run: pathlib.Path, process: int = 0) -> bool:
    """Whether a process has begun to compile the train step, i.e. its start-up page is in the log."""
    log = run / f"log.{process}.txt"
    return log.exists() and "untrained" in log.read_text()


def trained(run: pathlib.Path) -> list[tuple]:
    """The logged metrics of each step, without those of evaluations, which may follow different steps."""
    kept = ("step", "tokens", "train/loss", "train/grad_norm", "train/param_norm", "train/lr")
    return [tuple(row[k] for k in kept) for row in runs.rows(run) if "train/loss" in row]


def goes_on(run: pathlib.Path, data: pathlib.Path, reference: pathlib.Path, *flags: str, size: int = 2, **more) -> None:
    """Runs the same command: it must resume from the newest checkpoint, with the metrics of an uninterrupted run."""
    step = saved(run)[-1]
    more["num_train_steps"] = step + 5
    if size == 2:
        first, _ = runs.finish_gang(start_gang(run, data, *flags, **more))
    else:
        first = runs.finish(start_one(run, data, *flags, **more))
    assert f"Resuming after step {step}." in first
    assert trained(run) == trained(reference)[: step + 5]
