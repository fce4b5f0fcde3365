"""A newcomer's first hour: 4 layers, 4 heads, 128 wide, T = 64, batch 12, 200 steps on Shakespeare's characters.

  python -m benchmarks.newcomer --source=tinyshakespeare

Every row runs the real commands as processes. Prints a table; docs/performance.md compares it with its peers.
Installation is timed separately: rm -rf .venv; time make .venv/.installed; du -sm .venv; .venv/bin/pip list | wc -l.
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = flags.DEFINE_string("source", "tinyshakespeare", "As launch.prepare --source.")
STEPS = 200


def call(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, text=True, capture_output=True)


def train_command(folder: pathlib.Path, run: str, *flags: str) -> tuple[str, ...]:
    return (
        "launch.train", "--config=configs/shakespeare_char.py:cpu", f"--workdir={folder / run}",
        f"--config.data.path={folder / 'set'}", f"--config.num_train_steps={STEPS}",
        "--config.checkpoint.every_steps=100", "--config.metrics.every_steps=1", "--config.eval.every_steps=0",
        f"--compilation_cache={folder / 'cache'}", *flags,
    )  # fmt: skip


def rows(folder: pathlib.Path, run: str) -> list[dict]:
    path = folder / run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def until(folder: pathlib.Path, run: str, count: int) -> tuple[subprocess.Popen, float]:
    """Starts a run; returns it once it has written `count` rows, with the seconds that this took."""
    start = time.perf_counter()
    argv = [sys.executable, "-m", *train_command(folder, run)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(rows(folder, run)) < count:
        assert process.poll() is None
        time.sleep(0.01)
    return process, time.perf_counter() - start


def answer(*argv: str) -> str:
    """The response to a wrong command: seconds, lines, exit code."""
    start = time.perf_counter()
    result = call(*argv)
    seconds = time.perf_counter() - start
    lines = (result.stdout + result.stderr).strip().splitlines()
    return f"{seconds:.2f} s, {len(lines)} line(s), exit {result.returncode}: {lines[-1].replace(str(ROOT), '')[:110]}"


def main(argv: list[str]) -> None:
    table: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepared = call("launch.prepare", f"--source={SOURCE.value}", f"--out={folder / 'set'}")
        assert prepared.returncode == 0, prepared.stderr
        first_steps = []
        for i in range(4):
            process, seconds = until(folder, f"start{i}", 1)
            process.kill()
            process.wait()
            first_steps.append(seconds)
        warm = statistics.median(first_steps[1:])
        table.append(("command to first step, cold / second", f"{first_steps[0]:.1f} / {warm:.1f} s"))

        whole = call(*train_command(folder, "whole"))
        assert whole.returncode == 0, whole.stderr
        training = [r for r in rows(folder, "whole") if "train/loss" in r]
        step = statistics.median(r["perf/step_time_s"] for r in training[1:])
        fastest = sorted(r["perf/step_time_s"] for r in training[1:])[len(training) // 10]
        table.append(("steps/s, median / best tenth", f"{1 / step:.1f} / {1 / fastest:.1f}"))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        table.append(("peak memory", f"{peak:.2f} GB"))
        sample = next(i for i, line in enumerate(whole.stdout.splitlines()) if line.startswith("--- a sample"))
        table.append(("lines printed for 200 steps, before the sample of text", str(sample)))

        process, _ = until(folder, "killed", 120)
        process.kill()
        process.wait()
        again = call(*train_command(folder, "killed"))
        assert again.returncode == 0, again.stderr
        losses = [[r["train/loss"] for r in rows(folder, run) if "train/loss" in r] for run in ("whole", "killed")]
        same = sum(a == b for a, b in zip(*losses, strict=True))
        resumed = next(line for line in again.stdout.splitlines() if line.startswith("Resuming"))
        table.append(("SIGKILL at 120, same command", f"{resumed} {same} of {STEPS} losses bit-identical"))

        table.append(("mistyped field", answer(*train_command(folder, "x", "--config.model.num_layer=4"))))
        table.append(("batch not divisible", answer(*train_command(folder, "x", "--config.mesh.data=8"))))
        shard = folder / "set" / "train-00000.bin"
        shard.write_bytes(shard.read_bytes()[:-1000])
        table.append(("truncated data", answer(*train_command(folder, "x")).replace(str(folder), "…")))
    print("| | meshlm |\n|---|---|")
    for name, value in table:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    app.run(main)
