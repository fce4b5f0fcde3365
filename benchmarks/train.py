"""Side-by-side figures of this machine: step, loader, start-up, checkpoint stall. Prints one Markdown table.

  python -m benchmarks.train [--steps=30]

Step times are medians of interleaved rounds, so that drifts of the machine's speed affect all rows alike. The start-up
rows are real processes: the time from the command to the first finished step, with an empty and with a filled
compilation cache.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from data.storage import malloc

STEPS = flags.DEFINE_integer("steps", 30, "Steps a round.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are printed.")

malloc.tune_allocator()  # as launch.train does, before anything allocates

import jax  # noqa: E402
import numpy as np  # noqa: E402

from data import loader  # noqa: E402
from data.preparation import pipeline  # noqa: E402
from data.token_files import formats  # noqa: E402
from trainer import sharding  # noqa: E402
from trainer.config import CheckpointConfig, Config, from_dict  # noqa: E402
from trainer.reliability.checkpoint import Checkpoints  # noqa: E402
from trainer.state import Program  # noqa: E402
from trainer.step import make_train_step  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


def recipe(variant: str, vocab_size: int) -> Config:
    from configs import shakespeare_char

    config = from_dict(shakespeare_char.get_config(variant).to_dict())
    model = dataclasses.replace(config.model, vocab_size=vocab_size, max_seq_len=config.data.seq_len)
    return dataclasses.replace(config, model=model)


class Stepper:
    """A compiled train step and its batches."""

    def __init__(self, config: Config, folder: pathlib.Path, manifest: formats.Manifest):
        self.config = config
        mesh = sharding.make_mesh(config)
        jax.set_mesh(mesh)
        self.program = Program(config, mesh)
        self.state = self.program.init()
        self.step = make_train_step(self.program)
        windows = loader.TokenWindows(
            formats.TokenFiles(folder, manifest, "train"), seq_len=config.data.seq_len, seed=0
        )
        sharded = sharding.named(mesh, "batch")
        self.batches = loader.Loader(windows, global_batch_size=config.global_batch_size, sharding=sharded).prefetched(
            0, 2
        )
        self.run(1)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, next(self.batches), np.uint32(0))
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps


def loader_tokens_per_s(folder: pathlib.Path, seq_len: int = 1024, rows: int = 512) -> float:
    """Tokens gathered per second from 1 GiB of uint16 in the page cache into host memory, including the order."""
    path = folder / "big-00000.bin"
    np.random.default_rng(0).integers(0, 1 << 16, size=1 << 29, dtype=np.uint16).tofile(path)
    shard = formats.Shard(path.name, 1 << 29, "")
    split = formats.Split(1 << 29, 1 << 29, 1, (shard,))
    manifest = formats.Manifest("uint16", 1 << 16, None, "", {"train": split}, {})
    hash_limit = formats.HASH_AT_START_BYTES
    formats.HASH_AT_START_BYTES = 0
    windows = loader.TokenWindows(formats.TokenFiles(folder, manifest, "train"), seq_len=seq_len, seed=0)
    formats.HASH_AT_START_BYTES = hash_limit
    windows.rows(np.arange(windows.num_windows // 4))  # warm the page cache
    best = []
    for i in range(20):
        start = time.perf_counter()
        windows.rows(np.arange(i * rows, (i + 1) * rows))
        best.append(time.perf_counter() - start)
    path.unlink()
    return rows * (seq_len + 1) / float(np.median(best))


def seconds_to_first_step(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """A real process of launch.train, from its start to the first row of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as run:
        argv = [
            sys.executable, "-m", "launch.train", "--config=configs/shakespeare_char.py:cpu", f"--workdir={run}/run",
            f"--config.data.path={folder}", "--config.num_train_steps=1000", "--config.metrics.every_steps=1",
            f"--compilation_cache={cache}",
        ]  # fmt: skip
        metrics = pathlib.Path(run, "run", "metrics.jsonl")
        start = time.perf_counter()
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert process.poll() is None
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return seconds


def main(argv: list[str]) -> None:
    source = flags.FLAGS.source
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        manifest = pipeline.prepare_dataset(folder / "set", source=source, tokenizer="char", min_frequency=100)
        small, large = (Stepper(recipe(v, manifest.vocab_size), folder / "set", manifest) for v in ("cpu", ""))
        times: dict[str, list[float]] = {"small": [], "large": []}
        for _ in range(ROUNDS.value):
            times["small"].append(small.run(STEPS.value))
            times["large"].append(large.run(max(1, STEPS.value // 15)))
        for name, stepper in (("small", small), ("large", large)):
            c, t = stepper.config, float(np.median(times[name]))
            m = c.model
            size = f"{m.num_layers} layers, {m.embed_dim} wide, T {c.data.seq_len}, batch {c.global_batch_size}"
            rows.append((f"train step, {size}", f"{t * 1e3:.1f} ms, {c.tokens_per_step / t:,.0f} tokens/s"))
        rows.append(
            ("loader, gathered, T 1024, batch 512, warm", f"{loader_tokens_per_s(folder) / 1e6:,.0f} M tokens/s")
        )
        cache = folder / "cache"
        rows.append(
            ("command to first step, empty compilation cache", f"{seconds_to_first_step(folder / 'set', cache):.1f} s")
        )
        warm = float(np.median([seconds_to_first_step(folder / "set", cache) for _ in range(3)]))
        rows.append(("command to first step, filled compilation cache", f"{warm:.1f} s"))
        checkpoints = Checkpoints(folder / "run", CheckpointConfig(keep_last=2))
        stalls = []
        for i in range(6):
            small.run(5)
            stalls.append(checkpoints.save(i, small.state, {"samples": 0}))
            small.run(20)
        checkpoints.wait()
        stall, step = float(np.median(stalls[1:])), float(np.median(times["small"]))
        rows.append(("stall of one async save, small model", f"{stall * 1e3:.0f} ms, {stall / step:.2f} of a step"))
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "python": sys.version.split()[0]}))


flags.DEFINE_string("source", "python-stdlib", "Corpus of the train steps, as launch.prepare --source.")

if __name__ == "__main__":
    app.run(main)
