"""launch.bench prints a row with all fields for a tiny recipe, takes turns with a peer, and fails with one line."""

import functools
import json
import os
import subprocess
import sys

import pytest

from launch import bench
from tests import runs
from trainer.config import DEFAULT_VOCAB_SIZE, complete_without_dataset, from_dict
from trainer.reporting import flops

TINY = {
    "global_batch_size": 8, "data.seq_len": 32, "model.num_layers": 2, "model.embed_dim": 32, "model.num_heads": 4,
    "model.vocab_size": 300,
}  # fmt: skip
ROUNDS, STEPS = 2, 2
TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)  # set it if the Python of the tests has no torch


def call(*argv: str, devices: int = 1, **fields) -> subprocess.CompletedProcess:
    values = TINY | {k.replace("__", "."): v for k, v in fields.items()}
    overrides = [f"--config.{k}={v}" for k, v in values.items()]
    command = [sys.executable, "-m", "launch.bench", "--config=configs/default.py", *overrides]
    rounds = [f"--rounds={ROUNDS}", f"--steps={STEPS}", "--warmup=1"]
    return subprocess.run(
        [*command, *rounds, *argv], cwd=runs.ROOT, env=runs.environment(devices), text=True, capture_output=True,
        timeout=runs.TIMEOUT_S,
    )  # fmt: skip


def row_of(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@functools.cache
def two_devices() -> dict:
    return row_of(call(devices=2, mesh__data=1, mesh__fsdp=2, grad_accum_steps=2, model__remat="full"))


def test_row_says_what_was_timed():
    expected = {
        "config": "configs/default.py", "device": "cpu", "devices": 2, "processes": 1, "dtype": "float32",
        "attention": "xla", "remat": "full", "seq_len": 32, "global_batch_size": 8, "grad_accum_steps": 2,
        "tokens_per_step": 256, "vocab_size": 300, "vocab_size_is_default": False, "rounds": ROUNDS, "steps": STEPS,
        "mesh": {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}, "flops_formula": flops.FORMULA,
    }  # fmt: skip
    row = two_devices()
    assert {name: row[name] for name in expected} == expected
    assert not [name for name in row if name.startswith("peer")] and "ratio" not in row


def test_rates_agree_with_each_other_and_no_mfu_is_guessed():
    row = two_devices()
    assert 0 < row["step_time_s_min"] <= row["step_time_s"] <= row["step_time_s_max"]
    assert row["steps_per_s"] == pytest.approx(1 / row["step_time_s"])
    assert row["tokens_per_s"] == pytest.approx(256 / row["step_time_s"])
    assert row["tokens_per_s_per_device"] == pytest.approx(row["tokens_per_s"] / 2)
    config = complete_without_dataset(
        from_dict({"data": {"seq_len": 32}, "model": {"embed_dim": 32, "num_layers": 2, "vocab_size": 300}})
    )
    assert row["tflops_per_device"] == pytest.approx(
        row["tokens_per_s_per_device"] * flops.flops_per_token(config) / 1e12
    )
    assert row["compile_s"] > 0 and row["peak_memory_gib"] > 0 and row["last_loss"] < row["first_loss"]
    assert "mfu" not in row  # the peak of a CPU is not known


def test_a_profile_and_the_program_it_is_of(tmp_path):
    row_of(call(f"--trace={tmp_path}"))
    assert "HloModule" in (tmp_path / "step.hlo.txt").read_text()
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def has_torch() -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([TORCH_PYTHON, "-c", code]).returncode == 0


@pytest.mark.skipif(not has_torch(), reason="no torch here; TORCH_PYTHON may name a Python that has it")
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_peer_takes_turns(mlp):
    fields = {"model__mlp": mlp, "model__norm": "layernorm", "model__position": "learned"}
    row = row_of(call("--peer", f"--torch_python={TORCH_PYTHON}", **fields))
    assert (
        row["peer"] == "GPT-2 blocks" if mlp == "gelu" else row["peer"].startswith("GPT-2 blocks of the nearest size")
    )
    assert row["ratio"] == pytest.approx(row["tokens_per_s_per_device"] / row["peer_tokens_per_s"])
    if mlp == "gelu":  # the parameters are the same, except for rows that pad the vocabulary
        assert row["peer_num_params"] == row["num_params"] + 20 * 32


@pytest.mark.parametrize(
    ("model", "mlp_dim"),
    [
        ({"mlp": "gelu"}, 4 * 2048),
        # TinyLlama's layer: 2 (2048 + 256) 2048 + 3 x 5632 x 2048 = 4 x 2048² + 2 x 6656 x 2048
        ({"num_heads": 32, "num_kv_heads": 4, "mlp_dim": 5632}, 6656),
    ],
)
def test_peer_has_as_many_parameters_in_a_layer(model, mlp_dim):
    config = complete_without_dataset(from_dict({"model": {"embed_dim": 2048, **model}}))
    spec = bench.peer_spec(config, devices=4)
    assert spec["mlp_dim"] == mlp_dim and spec["rows"] == 4 and spec["vocab_size"] == DEFAULT_VOCAB_SIZE


def test_losses_are_looked_at_before_a_number_is_printed():
    result = call(optimizer__peak_lr="1e30", optimizer__warmup_steps=0)
    assert result.returncode == 4 and result.stdout == "", result
    assert len(result.stderr.strip().splitlines()) == 1 and "the loss of step" in result.stderr


@pytest.mark.parametrize(
    ("first", "part"), [(5.71, None), (5.0, "first loss is 5.0000"), (6.5, "5.710"), (float("nan"), "step 1 is nan")]
)
def test_first_loss_is_that_of_an_untrained_model(first, part):
    config = complete_without_dataset(from_dict({"model": {"embed_dim": 32, "vocab_size": 300}}))
    if part is None:
        bench.check_losses(config, [first, 1.0])
    else:
        with pytest.raises(bench.Diverged, match=part):
            bench.check_losses(config, [first, 1.0])


@pytest.mark.parametrize(
    ("argv", "fields", "parts"),
    [
        (["--peer", "--torch_python=nowhere"], {}, ["--torch_python=nowhere"]),
        ([], {"model__max_seq_len": 16}, ["max_seq_len = 16", "seq_len = 32"]),
        ([], {"mesh__data": 3}, ["global_batch_size = 8", "3"]),
        (["--stepps=2"], {}, ["did you mean --steps?"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(argv, fields, parts):
    result = call(*argv, **fields)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and result.stdout == "", result
    assert all(part in lines[0] for part in parts), lines


def test_a_mistake_is_answered_before_jax_is_loaded():
    code = "import sys, launch.bench; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 0
