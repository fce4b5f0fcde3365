"""Complete runs in real processes: tests that they resume bit for bit, signals, exit codes, sampling and evaluation."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests import runs
from trainer.reliability import identity

STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """A run with dropout, so that a resume has to give the same random numbers, too."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    out = runs.train(run, data, num_train_steps=STEPS, model__dropout=0.1, sample__max_new_tokens=8)
    return run, out


def test_what_a_run_leaves_behind(uninterrupted, data):
    run, out = uninterrupted
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "command.txt", "environment.json", "tokenizer", "metrics.jsonl", "samples.jsonl", "log.0.txt",
        "checkpoints",
    }  # fmt: skip
    rows = runs.rows(run)
    training = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in training] == list(range(1, STEPS + 1))
    assert [r["step"] for r in rows if "val/loss" in r] == [20, 40, 60]
    assert all(r["tokens"] == r["step"] * 8 * 32 for r in rows)
    assert set(training[5]) >= {
        "train/loss", "train/grad_norm", "train/param_norm", "train/lr", "train/epoch", "perf/step_time_s",
        "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/tflops_per_device", "perf/data_wait_s",
        "perf/checkpoint_stall_s", "perf/compile_s", "memory/peak_gib",
    }  # fmt: skip
    assert "perf/mfu" not in training[5], "a CPU has no stated peak"
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    assert abs(training[0]["train/loss"] - math.log(vocabulary)) < 0.05 * math.log(vocabulary)
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 0.2
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir())[-2:] == [50, 60]
    assert f"ln {vocabulary}" in out and "mesh data 1" in out and "Everything is in" in out
    assert len(out.splitlines()) <= 30


def test_killed_three_times_the_losses_are_the_same_bit_for_bit(tmp_path, data, uninterrupted):
    run = tmp_path / "run"
    argv = runs.command(run, data, num_train_steps=STEPS, model__dropout=0.1)
    rows_at_kill = []
    for count in (5, 24, 47):
        process = runs.start(argv)
        runs.wait_for_rows(run, process, count=count)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        rows_at_kill.append(len(runs.rows(run)))
    runs.finish(runs.start(argv))
    assert runs.losses(run) == runs.losses(uninterrupted[0])
    assert len(runs.rows(uninterrupted[0], "samples.jsonl")) == 1 and runs.rows(run, "samples.jsonl") == []
    assert max(rows_at_kill) < STEPS, "the kills came too late to mean anything"


def test_a_stop_at_an_evaluation_step_owes_the_evaluation(tmp_path, data, uninterrupted):
    """An evaluation follows every step here, so the evaluation of the last step before the stop must follow the
    restart."""
    run = tmp_path / "run"
    argv = runs.command(run, data, num_train_steps=STEPS, eval__every_steps=1)
    process = runs.start(argv)
    runs.wait_for_rows(run, process, count=10)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, code=42)
    stopped_at = runs.rows(run)[-1]["step"]
    assert "val/loss" not in runs.rows(run)[-1]
    runs.finish(runs.start(argv))
    assert [r["step"] for r in runs.rows(run) if "val/loss" in r] == list(range(1, STEPS + 1))
    assert stopped_at < STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_42(tmp_path, data, uninterrupted, number):
    """Faults 4 and 5."""
    run = tmp_path / "run"
    argv = runs.command(run, data, num_train_steps=STEPS, model__dropout=0.1, checkpoint__every_steps=0)
    process = runs.start(argv)
    runs.wait_for_rows(run, process, count=8)
    process.send_signal(number)
    out = runs.finish(process, code=42)
    assert "Stopped and saved" in out
    (saved,) = [int(p.name) for p in (run / "checkpoints").iterdir()]
    assert saved == runs.rows(run)[-1]["step"] < STEPS
    assert f"Resuming after step {saved}." in runs.finish(runs.start(argv))
    assert runs.losses(run) == runs.losses(uninterrupted[0])


@pytest.mark.parametrize("supervised", [False, True], ids=["trainer", "supervised"])
@pytest.mark.parametrize("console", ["pipe", "terminal"])
def test_a_console_that_is_closed_ends_no_run_and_hides_no_signal(tmp_path, data, console, supervised):
    run = tmp_path / "run"
    argv = runs.command(run, data, num_train_steps=100_000, checkpoint__every_steps=0, eval__every_steps=0)
    if supervised:
        argv = [sys.executable, "-m", "launch.supervise", "--", *argv]
    reader, writer = os.pipe() if console == "pipe" else os.openpty()
    buffered = runs.environment(PYTHONUNBUFFERED="")  # as for users: at the end, the buffer has unread output
    process = subprocess.Popen(argv, cwd=runs.ROOT, env=buffered, stdout=writer, stderr=writer)
    os.close(writer)
    with runs.ending(process):
        runs.wait_for_rows(run, process, count=3)
        os.close(reader)
        runs.wait_for_rows(run, process, count=100)
        process.send_signal(signal.SIGTERM if console == "pipe" else signal.SIGHUP)
        assert process.wait(runs.TIMEOUT_S) == 42
    (saved,) = [int(p.name) for p in (run / "checkpoints").iterdir()]
    assert saved == runs.rows(run)[-1]["step"]


@pytest.mark.parametrize("console", ["pipe", "terminal"])
def test_a_run_that_nobody_reads_is_done_all_the_same(tmp_path, data, console):
    run = tmp_path / "run"
    reader, writer = os.pipe() if console == "pipe" else os.openpty()
    argv = runs.command(run, data, num_train_steps=STEPS)
    buffered = runs.environment(PYTHONUNBUFFERED="")
    with runs.ending(subprocess.Popen(argv, cwd=runs.ROOT, env=buffered, stdout=writer, stderr=writer)) as (process,):
        os.close(writer)
        runs.wait_for_rows(run, process, count=3)
        os.close(reader)
        assert process.wait(runs.TIMEOUT_S) == 0


def test_a_second_interrupt_leaves_at_once(tmp_path, data):
    """Fault 7."""
    run = tmp_path / "run"
    process = runs.start(runs.command(run, data, num_train_steps=100_000, eval__every_steps=1, eval__num_windows=0))
    runs.wait_for_rows(run, process, count=3)
    # Both signals come during one step or evaluation, before it can end.
    process.send_signal(signal.SIGINT)
    while "Stopping after this step" not in (process.stdout.readline() or "Stopping after this step"):
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=runs.TIMEOUT_S)
    assert process.returncode in (130, 42), "42 only if the save was finished before the second signal came"


def test_a_finished_run_says_so_and_more_steps_continue_it(tmp_path, data, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    before = (run / "metrics.jsonl").read_bytes()
    samples = (run / "samples.jsonl").read_bytes()
    fields = {"model__dropout": 0.1, "sample__max_new_tokens": 8}
    assert "already has its 60 steps" in runs.train(run, data, num_train_steps=STEPS, **fields)
    assert (run / "samples.jsonl").read_bytes() == samples
    assert (run / "metrics.jsonl").read_bytes() == before
    out = runs.train(run, data, num_train_steps=STEPS + 5, model__dropout=0.1)
    assert "Resuming after step 60." in out and "config.num_train_steps: 60 -> 65" in out
    assert [r["step"] for r in runs.rows(run) if "train/loss" in r] == list(range(1, STEPS + 6))


def test_another_model_or_dataset_is_refused(tmp_path, data, uninterrupted):
    """Faults 18 and 19."""
    run, _ = uninterrupted
    before = (run / "config.json").read_bytes()
    out = runs.train(run, data, num_train_steps=STEPS, model__dropout=0.1, model__num_layers=3, code=2)
    assert "config.model.num_layers: 2 -> 3" in out and len(out.splitlines()) == 1
    source = tmp_path / "other.txt"
    source.write_text(runs.text()[::-1])
    subprocess.run(
        [sys.executable, "-m", "launch.prepare", f"--source={source}", f"--out={tmp_path / 'other'}"],
        cwd=runs.ROOT, check=True, capture_output=True,
    )  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    whole = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "log.0.txt"}
    out = runs.train(copy, tmp_path / "other", num_train_steps=STEPS, model__dropout=0.1, code=2)
    assert "another dataset" in out.splitlines()[-1]
    assert {path: path.read_bytes() for path in whole} == whole, "compared before anything was written"
    assert (run / "config.json").read_bytes() == before


def test_divergence_ends_with_4_and_saves_nothing_bad(tmp_path, data):
    """Fault 17."""
    run = tmp_path / "run"
    flags = {"optimizer__peak_lr": 1e18, "optimizer__warmup_steps": 0, "optimizer__clip_norm": 0.0}
    out = runs.train(run, data, num_train_steps=STEPS, checkpoint__every_steps=1, code=4, **flags)
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    bad = int(re.search(r"step (\d+) is not finite", line)[1])
    saved = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert all(step < bad for step in saved)
    assert all(math.isfinite(v) for row in runs.rows(run) for v in row.values())
    assert "Traceback" not in out


def test_damaged_data_is_found_before_the_first_step(tmp_path, data):
    """Fault 9."""
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    out = runs.train(tmp_path / "run", tmp_path / "data", num_train_steps=STEPS, code=3)
    line = out.splitlines()[-1]
    assert "train-00000.bin" in line and "71990 bytes" in line and "expected 72000" in line
    assert runs.rows(tmp_path / "run") == []


def test_compiled_programs_lie_beside_the_run(tmp_path, data):
    """A new machine finds the compiled programs there; a command with a mistake leaves none."""

    def train(name: str, code: int = 0, **fields) -> set[str]:
        argv = ["env", "-u", "JAX_COMPILATION_CACHE_DIR", *runs.command(tmp_path / "runs" / name, data, **fields)]
        runs.finish(runs.start(argv), code)
        return {path.name for path in tmp_path.glob("runs/.xla/*-cache")}

    train("a", 2, model__num_heads=7)
    assert not (tmp_path / "runs").exists()
    compiled = train("a", num_train_steps=2)
    assert any(name.startswith("jit_train_step-") for name in compiled)
    assert train("b", num_train_steps=2) == compiled


def test_a_second_job_on_the_same_run_is_refused(tmp_path, data):
    run = tmp_path / "run"
    process = runs.start(runs.command(run, data, num_train_steps=100_000))
    runs.wait_for_rows(run, process, count=3)
    try:
        assert "is being trained by" in runs.train(run, data, num_train_steps=100_000, code=2)
    finally:
        process.kill()
        process.communicate()
    # The lock of a dead owner is released automatically.
    runs.train(run, data, num_train_steps=max(r["step"] for r in runs.rows(run)) + 5)


def test_a_prompt_outside_the_vocabulary_is_found_at_the_start(tmp_path, data):
    out = runs.train(tmp_path / "run", data, sample__prompt="é", sample__max_new_tokens=1, code=2)
    assert "config.sample.prompt" in out.splitlines()[-1] and "U+00E9" in out
    assert runs.rows(tmp_path / "run") == []


def test_a_mirror_of_another_run_is_found_before_anything_is_written(tmp_path, data):
    meta = {"samples": 7, "data_fingerprint": "another"}
    copy = tmp_path / "mirror/checkpoints/5/_CHECKPOINT_METADATA"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}}))
    (tmp_path / "mirror/mirror.json").write_text('{"id": "one"}')
    out = runs.train(tmp_path / "run", data, checkpoint__mirror=tmp_path / "mirror", code=2)
    assert "mirror was trained on another dataset" in out.splitlines()[-1]
    found = sorted(p.name for name in ("run", "mirror") for p in (tmp_path / name).rglob("*") if p.is_file())
    assert found == [copy.name, "mirror.json"], "neither configuration, nor a lock that stays"


def test_a_kernel_that_this_machine_cannot_run_is_found_before_anything_is_written(tmp_path, data):
    out = runs.train(tmp_path / "run", data, model__attention="splash", code=2)
    (line,) = out.splitlines()
    assert "'splash'" in line and "runs on TPUs" in line and "auto" in line
    assert not (tmp_path / "run").exists()


def with_fault(argv: list[str], code: str) -> subprocess.Popen:
    """Starts the command of `python -m MODULE` after `code` has injected a fault into a function that it calls."""
    python, _, module, *flags = argv
    return runs.start(
        [python, "-c", f"from launch import cli; import {module} as it; {code}; cli.run(it.main)", *flags]
    )


def test_too_little_memory_is_one_line_and_ends_restarts_where_they_cannot_help(tmp_path, data):
    """If memory runs out after a step, a restart may help, so the exit code asks for one; before the first step, a
    restart would only fail again."""
    argv = runs.command(tmp_path / "run", data, num_train_steps=4)
    code = "import jax, trainer.loop as loop; loop.evaluate = lambda *a, **k: exec(\"raise jax.errors.JaxRuntimeError('"
    code += "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 393.2GiB.')\", {'jax': jax})"
    for exit_code, said in ((42, "what was saved is kept"), (2, "raise config.grad_accum_steps")):
        out = runs.finish(with_fault(argv, code), exit_code)
        line = out.splitlines()[-1]
        assert line.startswith("error: the devices' memory is too small: RESOURCE_EXHAUSTED") and said in line
        assert "Traceback" not in out
        assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["4"]
    out = runs.finish(runs.start(argv))
    assert "Resuming after step 4." in out and [r["step"] for r in runs.rows(tmp_path / "run") if "val/loss" in r] == [
        4
    ]


@pytest.mark.parametrize(("module", "said"), [("sample", "lower --num_samples"), ("evaluate", "larger devices")])
def test_too_little_memory_for_what_was_trained_is_one_line(tmp_path, module, said):
    code = "import jax; it.inference.open_run = lambda *_, **__: "
    code += "exec(\"raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: "
    code += "Out of memory while trying to allocate 393.2GiB.')\", {'jax': jax})"
    argv = [sys.executable, "-m", f"launch.{module}", f"--workdir={tmp_path}"]
    (line,) = runs.finish(with_fault(argv, code), 2).splitlines()
    assert line.startswith("error: the devices' memory is too small: RESOURCE_EXHAUSTED") and said in line


def test_a_loss_that_is_not_finite_is_null_and_no_success(uninterrupted):
    argv = [sys.executable, "-m", "launch.evaluate", f"--workdir={uninterrupted[0]}", "--json"]
    code = "import trainer.evaluation as e; real = e.evaluate; "
    code += "e.evaluate = lambda *a, **k: dict.fromkeys(real(*a, **k), float('nan'))"
    row, line = runs.finish(with_fault(argv, code), 4).splitlines()[-2:]
    assert json.loads(row)["val/loss"] is None and json.loads(row)["step"] == STEPS
    assert line.startswith(f"error: the loss of step {STEPS} is not finite")


def tool(module: str, run, *flags: str, code: int = 0, devices: int = 1) -> str:
    argv = [sys.executable, "-m", f"launch.{module}", f"--workdir={run}", *flags]
    return runs.finish(runs.start(argv, devices), code)


def test_sample(uninterrupted):
    run, _ = uninterrupted
    flags = ("--prompt=mesh", "--max_new_tokens=50", "--json", "--seed=3")
    lines = [json.loads(line) for line in tool("sample", run, *flags, "--num_samples=3").splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] and len({line["text"] for line in lines}) == 3
    assert all(line["step"] == STEPS and len(line["text"]) == 50 for line in lines)
    assert json.loads(tool("sample", run, *flags)) == lines[0]
    greedy = [tool("sample", run, "--prompt=mesh", "--temperature=0", f"--seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("mesh")
    warning, rounded = tool("sample", run, *flags, "--logprobs", "--int8").splitlines()
    assert warning.startswith("on CPUs bfloat16 and int8 are slower")
    rows = json.loads(rounded), json.loads(tool("sample", run, *flags, "--logprobs"))
    assert rows[0]["text"][:4] == rows[1]["text"][:4], "int8 changes what is sampled only if it was close"
    ours, theirs = (np.array(row["logprobs"][:4]) for row in rows)
    assert (ours != theirs).all() and np.abs(ours - theirs).max() < 0.1
    assert "no checkpoint at step 7; the steps are" in tool("sample", run, "--step=7", code=3)
    (line,) = tool("sample", run, "--temperature=inf", code=2).splitlines()
    assert "--temperature is inf; it must be a finite number" in line
    assert "'é' (U+00E9)" in tool("sample", run, "--prompt=é", code=2)


def test_answers_to_a_file_of_prompts_are_resumed_with_the_same_bytes(tmp_path, uninterrupted):
    run, _ = uninterrupted
    source, whole, out = (tmp_path / name for name in ("prompts.jsonl", "whole.jsonl", "out.jsonl"))
    prompts = [word * (1 + i % 9) for i in range(20) for word in ("mesh", "layer ")]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = (f"--prompts={source}", "--max_new_tokens=150", "--seed=3", "--repetition_penalty=1.2")
    (said,) = tool("sample", run, *flags, f"--out={whole}").splitlines()
    assert said.startswith("12 of 40 prompts have 32 tokens, the context of the model, or more")
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(prompts))
    assert all(row["tokens"] == len(row["text"]) == 150 and row["end"] == "length" for row in rows)
    words = [sys.executable, "-m", "launch.sample", f"--workdir={run}", *flags, f"--out={out}"]
    process = runs.start(words)
    with runs.ending(process):
        runs.wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out.write_bytes(out.read_bytes()[:-5])  # the last line is torn
    assert len(out.read_bytes()) < len(whole.read_bytes())
    assert "answers" in tool("sample", run, *flags, f"--out={out}")
    assert out.read_bytes() == whole.read_bytes()
    other = "has something else than answers to these prompts with these settings"
    for setting in ("--top_k=3", "--int8"):
        assert other in tool("sample", run, *flags, setting, f"--out={out}", code=2)
    for foreign in (b'{"my": "precious"}', whole.read_bytes() + b"mine"):
        (tmp_path / "foreign").write_bytes(foreign)
        assert other in tool("sample", run, *flags, f"--out={tmp_path / 'foreign'}", code=2)
        assert (tmp_path / "foreign").read_bytes() == foreign
    assert "is the file of the prompts" in tool("sample", run, *flags, f"--out={source}", code=2)
    assert out.read_bytes() == whole.read_bytes()
    source.write_text('{"prompt": "mesh"}\n{"prompt": 3}\n')
    assert "line 2 is not an object with 'prompt'" in tool("sample", run, *flags, f"--out={out}", code=3)
    assert "go together" in tool("sample", run, f"--prompts={source}", code=2)


def test_evaluate_covers_the_whole_split_on_any_devices(tmp_path, uninterrupted, data):
    run, _ = uninterrupted
    result = json.loads(tool("evaluate", run, "--json"))
    assert set(result) == {"step", "tokens", "val/loss", "val/perplexity", "val/bits_per_byte"}
    assert result["step"] == STEPS and result["tokens"] == STEPS * 8 * 32
    assert result["val/perplexity"] == pytest.approx(math.exp(result["val/loss"]))
    assert result["val/bits_per_byte"] == pytest.approx(result["val/loss"] / math.log(2))  # ASCII: 1 byte per token
    for devices in (3, 8):  # 3 does not divide the run's batch size
        elsewhere = json.loads(tool("evaluate", run, "--json", devices=devices))
        assert elsewhere["val/loss"] == pytest.approx(result["val/loss"], rel=1e-6)
    during = [r for r in runs.rows(run) if "val/loss" in r][-1]
    assert during["val/loss"] == pytest.approx(result["val/loss"], abs=0.1)
    assert np.isfinite(result["val/loss"])
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    assert json.loads(tool("evaluate", run, f"--data_path={moved}", "--json")) == result
