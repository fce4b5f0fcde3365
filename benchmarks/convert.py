"""Speed and memory of launch.convert on a Llama with random weights, next to `cp -r` of the same files, in turns.

  python -m benchmarks.convert [--gb=3] [--rounds=3] [--dtype=bfloat16] [--folder=/tmp]

It needs five times the size on disk, and with a checkpoint (--checkpoint), which is trained for one step, ten times the
size in memory. Results: docs/performance.md.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from model import families
from model.config import ModelConfig
from model.families.layout import Layout
from model.transformer import parameter_shapes
from trainer.interchange.safetensors_writer import DTYPES, FolderWriter

GB = flags.DEFINE_float("gb", 3.0, "Size of the files.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Pairs of cp and launch.convert.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the files.")
FOLDER = flags.DEFINE_string("folder", None, "Where to write; default: the system's temporary folder.")
CHECKPOINT = flags.DEFINE_bool("checkpoint", False, "Also train one step, and export its checkpoint.")

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = {"vocab_size": 32_000, "embed_dim": 2048, "num_heads": 32, "num_kv_heads": 4, "mlp_dim": 5632,
         "tie_embeddings": False, "max_seq_len": 2048, "init_depth_scale": False}  # fmt: skip
LAYER, TABLES = 44_044_288, 2 * 32_000 * 2048  # parameters of a layer of TinyLlama, and of both tables


def make(folder: pathlib.Path) -> int:
    """Writes the model; returns the bytes of its largest tensor."""
    layers = round((GB.value * 1e9 / DTYPES[DTYPE.value].itemsize - TABLES) / LAYER)
    model = ModelConfig(num_layers=layers, **SHAPE)
    family, config = families.expressing(model)
    layout = Layout(family, model, parameter_shapes(model))
    folder.mkdir()
    writer = FolderWriter(folder, {name: (DTYPE.value, shape) for name, shape in layout.shapes.items()})
    draw = np.random.default_rng(0)
    for name, shape in layout.shapes.items():
        writer.write(name, [draw.standard_normal(shape, np.float32)])
    (folder / "config.json").write_text(json.dumps(config))
    return max(int(np.prod(shape)) for shape in layout.shapes.values()) * DTYPES[DTYPE.value].itemsize


def run(*words: object) -> tuple[float, float]:
    """Seconds, and the peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(map(str, words))}: {said[-2000:]}")
    return time.perf_counter() - start, used.ru_maxrss / 1e6


def main(argv: list[str]) -> None:
    convert = (sys.executable, "-m", "launch.convert")
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as name:
        folder = pathlib.Path(name)
        source, copy, made, out = (folder / part for part in ("model", "copy", "run", "out"))
        largest = make(source)
        size = sum(path.stat().st_size for path in source.iterdir())
        ratios = []
        print(f"{size / 1e9:.2f} GB in {DTYPE.value}, largest tensor {largest / 1e9:.2f} GB")
        for _ in range(ROUNDS.value):
            for path in (copy, made, out):
                shutil.rmtree(path, ignore_errors=True)
            cp, _ = run("cp", "-r", source, copy)
            shutil.rmtree(copy)
            into, into_gb = run(*convert, f"--from_hf={source}", f"--workdir={made}")
            back, back_gb = run(*convert, f"--workdir={made}", f"--to_hf={out}", f"--dtype={DTYPE.value}")
            ratios.append((cp / into, size / into / 1e6, size / back / 1e6))
            print(
                f"cp {size / cp / 1e6:5.0f} MB/s | in {size / into / 1e6:4.0f} MB/s, {into_gb:.2f} GB of memory | "
                f"out {size / back / 1e6:4.0f} MB/s, {back_gb:.2f} GB",
                flush=True,
            )
        shares, into_rates, back_rates = zip(*ratios, strict=True)
        print(
            f"medians: in {statistics.median(into_rates):.0f} MB/s, {statistics.median(shares):.2f} of cp; out "
            f"{statistics.median(back_rates):.0f} MB/s"
        )
        if CHECKPOINT.value:
            shutil.rmtree(out)
            export_checkpoint(folder, made, out, size)


def export_checkpoint(folder: pathlib.Path, made: pathlib.Path, out: pathlib.Path, size: int) -> None:
    np.random.default_rng(0).integers(0, 1000, 10_000).astype(np.uint16).tofile(folder / "tokens.bin")
    run(sys.executable, "-m", "launch.train", "--config=configs/default.py", f"--workdir={made}",
        f"--config.data.path={folder / 'tokens.bin'}", "--config.data.seq_len=8", "--config.global_batch_size=1",
        "--config.num_train_steps=1", "--config.eval.every_steps=0", "--config.optimizer.name=adamw")  # fmt: skip
    seconds, gb = run(*(sys.executable, "-m", "launch.convert"), f"--workdir={made}", f"--to_hf={out}")
    print(f"out of a checkpoint: {size / seconds / 1e6:.0f} MB/s, {gb:.2f} GB")


if __name__ == "__main__":
    app.run(main)
