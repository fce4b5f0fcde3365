"""metrics.jsonl reads as one uninterrupted run, exactly; FLOPs and peaks are the documented ones."""

import json

import numpy as np
import pytest

from trainer import metrics
from trainer.config import from_dict


def test_rows_past_a_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "train/loss": 1 / (step + 1)}) + "\n" for step in range(6)]
    path.write_text("".join(rows) + '{"step": 3, "train/lo')
    assert metrics.cut_rows_after(path, 3) == 3
    assert path.read_text() == "".join(rows[:4])
    assert metrics.cut_rows_after(path, 3) == 0
    assert metrics.cut_rows_after(tmp_path / "missing.jsonl", 3) == 0


def test_float32_values_read_back_exactly(tmp_path):
    writers = metrics.Writers(tmp_path, 0, tensorboard=False)
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for i, value in enumerate(values):
        writers.metrics(i, i * 10, {"train/loss": float(value)})
    writers.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [np.float32(row["train/loss"]) for row in read] == list(values)
    assert read[7]["step"] == 7 and read[7]["tokens"] == 70


def test_writers_continue_after_the_restored_step(tmp_path):
    for first, last in ((0, 5), (3, 8)):
        writers = metrics.Writers(tmp_path, first, tensorboard=True)
        for step in range(first + 1, last + 1):
            writers.metrics(step, step, {"train/loss": float(step)})
            writers.sample({"step": step, "prompt": "é", "text": "x\n"})
        writers.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list((tmp_path / "tensorboard").iterdir())


def test_flops_are_nanogpts():
    """854.8 MFLOP a token for GPT-2 124M at T = 1024: N = 123.59 M without positions, vocabulary 50304."""
    config = from_dict(
        {
            "data": {"seq_len": 1024},
            "model": {
                "num_layers": 12, "num_heads": 12, "embed_dim": 768, "position": "learned",
                "vocab_size": 50304, "max_seq_len": 1024,
            },
        }
    )  # fmt: skip
    num_params = 123_590_000 + 1024 * 768
    assert metrics.flops_per_token(config, num_params) == pytest.approx(854.8e6, rel=1e-3)


def test_peaks_take_the_longest_name_and_never_guess():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert metrics.peak_tflops(Device("NVIDIA H100 80GB HBM3")) == 989
    assert metrics.peak_tflops(Device("TPU v5 lite")) == 197
    assert metrics.peak_tflops(Device("TPU v5")) == 459
    assert metrics.peak_tflops(Device("cpu")) is None
