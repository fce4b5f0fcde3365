"""Runs that diverge, in real processes, because the data has a stretch of noise, or the learning rate leads to NaN."""

import math
import re

import numpy as np
import pytest

from data import loader
from data.config import DataConfig
from data.sources import open_sources
from tests import runs

pytestmark = pytest.mark.slow
VOCAB, BATCH, SEQ_LEN, STEPS, BAD = 300, 8, 32, 60, 45
FIELDS = {
    "num_train_steps": STEPS,
    "model__vocab_size": VOCAB,
    "eval__every_steps": 1,
    "eval__num_windows": 0,
    "divergence__window": 8,
    "optimizer__peak_lr": 0.01,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
}
NAN = {"optimizer__peak_lr": 1e18, "optimizer__warmup_steps": 0, "optimizer__clip_norm": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tokens in a fixed order, except for noise in the samples of step BAD; no noise is in adjacent windows."""
    folder = tmp_path_factory.mktemp("data")
    places = np.arange(60_000, dtype="<u2")  # each token is its offset, so a window shows its place
    places.tofile(folder / "train.bin")
    sources = open_sources(DataConfig(path=str(folder / "train.bin"), seq_len=SEQ_LEN), 1 << 16)
    windows = loader.MixedWindows(sources.files("train"), sources.stages, seq_len=SEQ_LEN, seed=0, packings={})
    noisy = windows.rows(np.arange((BAD - 1) * BATCH, BAD * BATCH))
    tokens = (places % 16).astype("<u2")
    for row in noisy:
        tokens[row[1:-1]] = np.random.default_rng(int(row[0])).integers(16, VOCAB, SEQ_LEN - 1)
    tokens.tofile(folder / "train.bin")
    (places[:12_000] % 16).astype("<u2").tofile(folder / "val.bin")
    return folder / "*.bin"


def everything(run) -> list[dict]:
    """The rows of metrics.jsonl without timings and memory."""
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in runs.rows(run)]


def of_step(run, step: int) -> list[dict]:
    return [row for row in everything(run) if row["step"] == step]


def losses_after(run, step: int) -> list[float]:
    return [row["val/loss"] for row in everything(run) if row["step"] > step and "val/loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    """A run that ignores spikes, with which other policies are compared."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    runs.train(run, data, **FIELDS)
    train = {row["step"]: row["train/loss"] for row in runs.rows(run) if "train/loss" in row}
    assert train[BAD] > 4 * train[BAD - 1], "there is a spike"
    assert all(train[step] < 1.2 * train[step - 1] for step in range(10, BAD)), "and no other before it"
    return run


def test_skip(tmp_path, data, plain):
    """Fault 17: the update of the bad batch is skipped, a row says so, and the next validation loss is lower than
    without skipping."""
    run = tmp_path / "run"
    out = runs.train(run, data, **FIELDS, divergence__spike="skip")
    (line,) = [line for line in out.splitlines() if "its update was left out" in line]
    assert line.startswith(f"step {BAD} stands out: loss ")
    training = {row["step"]: row for row in everything(run) if "train/loss" in row}
    assert [step for step, row in training.items() if row["train/skipped"]] == [BAD]
    assert training[BAD]["train/param_norm"] == training[BAD - 1]["train/param_norm"]
    assert losses_after(run, BAD)[0] < losses_after(plain, BAD)[0]


def test_stop(tmp_path, data):
    """Fault 17: the run exits with 4, and the state after the bad step is not saved."""
    run = tmp_path / "run"
    out = runs.train(run, data, **FIELDS, divergence__spike="stop", checkpoint__every_steps=5, code=4)
    assert f"error: step {BAD} stands out" in out.splitlines()[-1] and "Traceback" not in out
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == BAD - 5


def test_rollback_and_killed_after_it(tmp_path, data):
    """Fault 17: the run rolls back to step 40, and continues with the samples after the bad step. If it is killed
    before and after the next save, it ends with the same metrics bit for bit."""
    fields = {**FIELDS, "divergence__spike": "rollback"}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    out = runs.train(whole, data, **fields)
    assert f"back to step 40, skipping {BATCH * (BAD - 40)} samples" in out
    assert "Everything is in" in out
    event = {"event/rollback_from": float(BAD), "event/skipped_samples": float(BATCH * (BAD - 40))}
    assert {"step": 41, "tokens": BATCH * SEQ_LEN * BAD, **event} in of_step(whole, 41)
    assert [row["step"] for row in everything(whole) if "train/loss" in row] == list(range(1, STEPS + 1))
    assert everything(whole)[-1]["tokens"] == BATCH * SEQ_LEN * (STEPS + BAD - 40)
    for last in (42, 52):
        process = runs.start(runs.command(run, data, **fields))
        with runs.ending(process):
            went_back = lambda: any("event/rollback_from" in row for row in runs.rows(run))  # noqa: E731
            runs.wait_until(lambda: went_back() and runs.rows(run)[-1]["step"] >= last, process)  # noqa: B023
    runs.train(run, data, **fields)
    assert everything(run) == everything(whole)


def test_a_stop_does_not_change_where_a_run_goes_back_to(tmp_path, data):
    """There are no timed saves: the save at the stop after step 42 is not a rollback target and displaces none."""
    fields = {
        **FIELDS,
        "divergence__spike": "rollback",
        "checkpoint__every_steps": 10,
        "checkpoint__every_minutes": 0.0,
    }
    fields |= {"checkpoint__keep_last": 1, "checkpoint__keep_best": 0, "optimizer__decay_steps": STEPS}
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    runs.train(whole, data, **fields)
    runs.train(run, data, **{**fields, "num_train_steps": 42})
    assert (run / "checkpoints/42").is_dir()
    assert f"back to step 40, skipping {BATCH * (BAD - 40)} samples" in runs.train(run, data, **fields)
    assert [row for row in everything(whole) if row not in everything(run)] == []


def test_rollback_in_a_gang(tmp_path, data):
    """Fault 17: all processes roll back to the same step."""
    fields = {**FIELDS, "divergence__spike": "rollback", "mesh__data": 2, "eval__every_steps": 20}
    out = runs.finish_gang(runs.start_gang(tmp_path / "run", data, **fields))
    assert all("back to step 40" in text for text in out)
    assert [row["step"] for row in everything(tmp_path / "run") if "train/loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_nan_for_good(tmp_path, data, policy):
    """Fault 17: if every path leads to NaN, skip and rollback end with 4, and no bad state is saved."""
    run = tmp_path / "run"
    fields = {**FIELDS, **NAN, "divergence__not_finite": policy, "divergence__max_in_a_row": 2}
    out = runs.train(run, data, **fields, checkpoint__every_steps=1, code=4)
    line = out.splitlines()[-1]
    assert re.match(r"error: step \d+ is not finite", line) and "Traceback" not in out
    assert (policy == "rollback") == ("times; it was not saved" in line)
    assert all(math.isfinite(value) for row in runs.rows(run) for value in row.values())
