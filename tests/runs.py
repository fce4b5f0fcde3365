"""Helpers of the whole-system tests: a small dataset, a tiny recipe, real processes with bounded time."""

import json
import os
import pathlib
import socket
import subprocess
import sys

from data.prepare import prepare

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT_S = 180
# A model that compiles in seconds; losses still depend on every part of it.
TINY = {
    "global_batch_size": 8,
    "data.seq_len": 32,
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "metrics.every_steps": 1,
    "eval.every_steps": 20,
    "eval.num_windows": 16,
    "checkpoint.every_steps": 10,
    "sample.max_new_tokens": 8,
    "metrics.tensorboard": False,
}


def text(characters: int = 40_000) -> str:
    """Text with structure, the same on every machine."""
    words = ["mesh", "shard", "token", "layer", "step", "loss", "resume", "batch", "head", "norm"]
    out, state = [], 1
    while sum(map(len, out)) < characters:
        state = (state * 1103515245 + 12345) % 2**31
        out.append(words[(state >> 16) % len(words)] + ("\n" if state % 7 == 0 else ""))
    return " ".join(out)[:characters]


def dataset(folder: pathlib.Path) -> pathlib.Path:
    source = folder / "corpus.txt"
    source.write_text(text())
    prepare(folder / "dataset", source=str(source), tokenizer="char")
    return folder / "dataset"


def command(run: pathlib.Path, data: pathlib.Path, *flags: str, **fields) -> list[str]:
    """launch.train with TINY, `fields` as section__field=value, and further flags."""
    values = {**TINY, "data.path": data, **{k.replace("__", "."): v for k, v in fields.items()}}
    overrides = [f"--config.{k}={v}" for k, v in values.items()]
    recipe = "--config=configs/default.py"
    return [sys.executable, "-m", "launch.train", recipe, f"--workdir={run}", *overrides, *flags]


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """The caller's environment with this many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", **extra}


def start(argv: list[str], devices: int = 1, cwd: pathlib.Path = ROOT, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        argv, cwd=cwd, env=environment(devices, **extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits, bounded; asserts the exit code and returns what was printed."""
    try:
        out, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"not done within {TIMEOUT_S} s:\n{out}") from None
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{out}"
    return out


def train(run: pathlib.Path, data: pathlib.Path, *flags: str, devices: int = 1, code: int = 0, **fields) -> str:
    return finish(start(command(run, data, *flags, **fields), devices), code)


def rows(run: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """Complete rows so far; a line being written is left out."""
    path = run / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run: pathlib.Path) -> list[tuple]:
    """What must be the same, bit for bit, in the same order, in an interrupted and an uninterrupted run."""
    kept = ("step", "tokens", "train/loss", "train/grad_norm", "train/param_norm", "train/lr", "val/loss")
    return [tuple(row.get(k) for k in kept) for row in rows(run)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
