"""metrics.jsonl reads as one uninterrupted run, exactly."""

import errno
import json
import os
import pathlib
import resource

import numpy as np
import pytest

from data.errors import UserError
from trainer.reliability import reading
from trainer.reliability.reading import Unreadable
from trainer.reporting import metrics


def opened(run_dir: pathlib.Path, step: int, *, tensorboard: bool = False) -> metrics.MetricWriters:
    writers = metrics.MetricWriters(run_dir, tensorboard=tensorboard)
    writers.open(step)
    return writers


def test_rows_past_a_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "train/loss": 1 / (step + 1)}) + "\n" for step in range(6)]
    path.write_text("".join(rows) + '{"step": 3, "train/lo')
    assert metrics.cut_rows_after(path, 3) == 3
    assert path.read_text() == "".join(rows[:4])
    assert metrics.cut_rows_after(path, 3) == 0
    assert metrics.cut_rows_after(tmp_path / "missing.jsonl", 3) == 0


def test_rows_are_on_the_disk_before_they_take_the_place_of_the_old_ones(tmp_path, monkeypatch):
    """A power cut after a resume may leave the old rows or the new ones, but never an empty file."""
    path, synced = tmp_path / "metrics.jsonl", {}
    path.write_text('{"step": 1}\n{"step": 2}\n')
    old = path.stat().st_ino
    real = os.fsync

    def fsync(fd):
        found = os.fstat(fd)
        assert path.stat().st_ino == old
        synced[found.st_ino] = found.st_size
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert metrics.cut_rows_after(path, 1) == 1
    found = path.stat()
    assert found.st_ino != old and synced == {found.st_ino: len(path.read_bytes())} and found.st_size == 12


def test_rows_that_cannot_be_begun(tmp_path, monkeypatch):
    """A transient error has no effect; a persistent one raises UserError with its code, and closing still works."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    writers = opened(tmp_path, 0, tensorboard=True)
    writers.metrics(1, 1, {"train/loss": 1.0})
    real, failing = pathlib.Path.open, []

    def fail(path, *args, **named):
        if failing and path.name == "samples.jsonl":
            code = failing.pop()
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **named)

    monkeypatch.setattr(pathlib.Path, "open", fail)
    failing += [errno.EIO]
    opened(tmp_path, 1).close()
    for code, exit_code in ((errno.EIO, 42), (errno.ENOSPC, 2)):
        failing += [code] * 2
        try:  # as the training loop does in a rollback
            with pytest.raises(UserError, match=os.strerror(code)) as e:
                writers.open(1)
        finally:
            writers.close()
        assert e.value.exit_code == exit_code
        failing.clear()


def test_float32_values_read_back_exactly(tmp_path):
    writers = opened(tmp_path, 0)
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for i, value in enumerate(values):
        writers.metrics(i, i * 10, {"train/loss": float(value)})
    writers.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [np.float32(row["train/loss"]) for row in read] == list(values)
    assert read[7]["step"] == 7 and read[7]["tokens"] == 70


def test_writers_continue_after_the_restored_step(tmp_path):
    for first, last in ((0, 5), (3, 8)):
        writers = opened(tmp_path, first, tensorboard=True)
        for step in range(first + 1, last + 1):
            writers.metrics(step, step, {"train/loss": float(step)})
            writers.sample({"step": step, "prompt": "é", "text": "x\n"})
        writers.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list((tmp_path / "tensorboard").iterdir())


def test_losses_that_cannot_be_read_for_a_moment_are_read_again(tmp_path, monkeypatch):
    """Without its losses, the best checkpoint would be treated like any other."""
    path, failing = tmp_path / "metrics.jsonl", ["once", "twice"]
    assert metrics.evaluations(tmp_path, 3) == {}
    rows = [{"step": 1, "val/loss": 2.0}, {"step": 2, "val/loss": None}, {"step": 3, "val/loss": 1.0}, {"step": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "val/l')
    real = pathlib.Path.read_bytes

    def read_bytes(self):
        if failing and failing.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    with pytest.raises(Unreadable, match=r"metrics\.jsonl cannot be read: Input/output error"):
        metrics.evaluations(tmp_path, 3)
    failing.append("once")
    assert metrics.evaluations(tmp_path, 3) == {1: rows[0], 3: rows[2]}


def test_rows_that_cannot_be_written_are_written_later(tmp_path):
    """Fault 12: no file may grow past 100 bytes, which cuts a row in the middle as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for last_try in (False, True):
        writers = opened(tmp_path, 0, tensorboard=True)
        writers.metrics(1, 1, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            for step in range(2, 6):
                writers.metrics(step, step, {"train/loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "metrics.jsonl").stat().st_size == 100
        if not last_try:
            writers.metrics(6, 6, {"train/loss": 6.0})
        writers.close()
        text = (tmp_path / "metrics.jsonl").read_text()
        assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, 6 if last_try else 7))


def test_flush_reaches_the_disk(tmp_path, monkeypatch):
    """A checkpoint survives a power cut, so the rows up to its step must survive, too."""
    writers, synced = opened(tmp_path, 0), {}
    monkeypatch.setattr(os, "fsync", lambda fd: synced.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}))
    writers.metrics(1, 8, {"train/loss": 2.0})
    writers.flush()
    found = (tmp_path / "metrics.jsonl").stat()
    assert found.st_size and synced[found.st_ino] == found.st_size
    writers.close()


def test_a_sample_with_line_separators_is_one_row(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines treats both as line ends."""
    writers = opened(tmp_path, 0)
    writers.sample({"step": 1, "text": "a\u2028b\x85c"})
    writers.close()
    assert metrics.cut_rows_after(tmp_path / "samples.jsonl", 1) == 0
