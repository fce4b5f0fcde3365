"""Helpers of the whole-system tests: a small dataset, a tiny recipe, real processes with bounded time."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator

from data.preparation.pipeline import prepare_dataset

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT_S = 300  # CI has three test processes and two background jobs on two cores
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
    "sample.max_new_tokens": 0,  # tests that read samples ask for some
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
    prepare_dataset(folder / "dataset", source=str(source), tokenizer="char")
    return folder / "dataset"


def code_lines(page: pathlib.Path) -> list[str]:
    """The lines in the code blocks of a page, each command with its continuation lines on one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def clone(folder: pathlib.Path) -> pathlib.Path:
    """Makes a git repository that has the launchers as they are here."""
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for words in ("init -q", "add launch", "-c user.name=x -c user.email=x commit -q -m x"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder


def command(run: pathlib.Path, data: pathlib.Path, *flags: str, **fields) -> list[str]:
    """launch.train with TINY, `fields` as section__field=value, and further flags."""
    values = {**TINY, "data.path": data, **{k.replace("__", "."): v for k, v in fields.items()}}
    overrides = [f"--config.{k}={v}" for k, v in values.items()]
    recipe = "--config=configs/default.py"
    return [sys.executable, "-m", "launch.train", recipe, f"--workdir={run}", *overrides, *flags]


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """The caller's environment with this many virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", **extra}


def start(argv: list[str], devices: int = 1, cwd: pathlib.Path = ROOT, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        argv, cwd=cwd, env=environment(devices, **extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen, code: int | Container[int] = 0, within_s: float = TIMEOUT_S) -> str:
    """Waits with a time limit, asserts the exit code (128 + n for signal n), and returns the output."""
    try:
        out, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        kill([process])
        out, _ = process.communicate()
        raise AssertionError(f"not done within {within_s} s:\n{out}") from None
    left = exit_code(process)
    assert left in ([code] if isinstance(code, int) else code), f"exit code {left}, expected {code}:\n{out}"
    return out


def exit_code(process: subprocess.Popen) -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def kill(processes: list[subprocess.Popen]) -> None:
    """Kills the processes that still run, and the children of supervisors, which have sessions of their own."""
    for process in processes:
        if process.poll() is None:
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            for child in map(int, children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def ending(*processes: subprocess.Popen) -> Iterator[list[subprocess.Popen]]:
    """Kills the processes at the end of the with statement, if they still run."""
    try:
        yield list(processes)
    finally:
        kill(list(processes))


@contextlib.contextmanager
def quota(*processes: subprocess.Popen) -> Iterator[None]:
    """In the with statement, no file of the processes can grow past 4 KiB: they write as on a full disk."""
    limit_files(4096, processes)
    try:
        yield
    finally:
        limit_files(resource.RLIM_INFINITY, processes)


def limit_files(most: int, processes: Iterable[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # the process has ended
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


@contextlib.contextmanager
def mounted(at: pathlib.Path, *words: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates the folder and runs `mount WORDS AT`, which needs root; unmounts it in the end."""
    at.mkdir()
    subprocess.run(["mount", *words, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


def start_gang(
    run: pathlib.Path,
    data: pathlib.Path,
    *flags: str,
    size: int = 2,
    devices: int = 1,
    address: str = "",
    before: dict[int, list[str]] | None = None,
    per_process: dict[int, dict] | None = None,
    environments: dict[int, dict[str, str]] | None = None,
    **fields,
) -> list[subprocess.Popen]:
    """Starts `size` processes of one run.

    Args:
      before: by number of the process, the words before its command.
      per_process: by number of the process, further fields.
      environments: by number of the process, further environment variables.
    """
    address = address or f"localhost:{free_port()}"
    gang = []
    for i in range(size):
        joining = (f"--coordinator_address={address}", f"--num_processes={size}", f"--process_id={i}")
        own = {**fields, **(per_process or {}).get(i, {})}
        argv = [*(before or {}).get(i, []), *command(run, data, *joining, *flags, **own)]
        gang.append(start(argv, devices, **(environments or {}).get(i, {})))
    return gang


def finish_gang(gang: list[subprocess.Popen], code: int = 0) -> list[str]:
    with ending(*gang):
        return [finish(process, code) for process in gang]


def wait_until(true: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Waits, with a time limit, until `true` returns true; all of the processes must stay alive."""
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, f"ended by itself with {exit_code(ended[0])}:\n{ended[0].communicate()[0]}"
        if time.monotonic() > deadline:
            kill(list(processes))
            outputs = [process.communicate()[0] for process in processes]
            raise AssertionError("\n".join(["nothing happened", *outputs]))
        time.sleep(0.005)


def wait_for_rows(run: pathlib.Path, *processes: subprocess.Popen, count: int) -> None:
    wait_until(lambda: len(rows(run)) >= count, *processes)


def train(run: pathlib.Path, data: pathlib.Path, *flags: str, devices: int = 1, code: int = 0, **fields) -> str:
    return finish(start(command(run, data, *flags, **fields), devices), code)


def train_through_a_kill(run: pathlib.Path, data: pathlib.Path, *, count: int, **fields) -> None:
    """Trains, kills the process with SIGKILL once it has written `count` rows, and resumes the run to its end."""
    process = start(command(run, data, **fields))
    with ending(process):
        wait_for_rows(run, process, count=count)
        process.send_signal(signal.SIGKILL)
        finish(process, code=128 + 9)
    assert "Resuming after step" in train(run, data, **fields)


def rows(run: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """Complete rows so far; a line being written is left out."""
    path = run / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run: pathlib.Path) -> list[tuple]:
    """The values that are the same, bit for bit and in the same order, in an interrupted and an uninterrupted run."""
    kept = ("step", "tokens", "train/loss", "train/grad_norm", "train/param_norm", "train/lr", "val/loss")
    return [tuple(row.get(k) for k in kept) for row in rows(run) if "train/loss" in row or "val/loss" in row]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
