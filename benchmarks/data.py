"""Measure gathering, order, cold files, preparation and its memory. Prints a Markdown table; a ratio is from one run.

  python -m benchmarks.data [--corpus_mb=200] [--rounds=20]

Peers are interleaved with ours. nanoGPT's loop is get_batch of its train.py: a Python loop that slices an
np.memmap, widens the slices and stacks them, for inputs and for targets. Memory is the sum over the processes of one
command, with shared pages counted once.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from benchmarks.memory import PeakMemory
from data.storage import malloc

ROUNDS = flags.DEFINE_integer("rounds", 20, "Interleaved rounds; the table has medians.")
CORPUS_MB = flags.DEFINE_integer("corpus_mb", 200, "Text to prepare; 2000 for the memory goal.")
TOKENS_MB = flags.DEFINE_integer("tokens_mb", 1024, "Token file to gather from.")

malloc.tune_allocator()  # as launch.train does

import numpy as np  # noqa: E402

from data import loader, packing  # noqa: E402
from data.preparation import corpus  # noqa: E402
from data.token_files import formats  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
SEQ_LEN = 1024


def token_file(folder: pathlib.Path) -> tuple[pathlib.Path, loader.TokenWindows]:
    path, tokens = folder / "tokens.bin", TOKENS_MB.value << 19
    np.random.default_rng(0).integers(0, 1 << 16, size=tokens, dtype=np.uint16).tofile(path)
    with path.open("rb") as f:
        os.fsync(f.fileno())
    split = formats.Split(tokens, tokens, 1, (formats.Shard(path.name, tokens, ""),))
    formats.HASH_AT_START_BYTES = 0
    files = formats.TokenFiles(folder, formats.Manifest("uint16", 1 << 16, None, "", {"train": split}, {}), "train")
    return path, loader.TokenWindows(files, seq_len=SEQ_LEN, seed=0)


def nanogpt_batch(path: pathlib.Path, rows: int) -> None:
    data = np.memmap(path, dtype=np.uint16, mode="r")  # opened again for each batch, as in nanoGPT
    starts = np.random.randint(len(data) - SEQ_LEN, size=rows)
    np.stack([data[i : i + SEQ_LEN].astype(np.int64) for i in starts])
    np.stack([data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64) for i in starts])


def medians(rounds: int, **runs: Callable[[int], object]) -> dict[str, float]:
    """Median seconds of each function, interleaved; each is called with the number of the round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(i)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def gather_rows(path: pathlib.Path, windows: loader.TokenWindows) -> list[tuple[str, str]]:
    rows = []
    sum(int(shard.max()) for shard in windows.files.shards)  # warm the page cache, map the file
    for batch in (32, 512):
        shard = windows._rows_of(0, 0)
        picked = np.random.default_rng(1).integers(len(shard.rows), size=(ROUNDS.value, batch))
        t = medians(
            ROUNDS.value,
            ours=lambda i, n=batch: windows.rows(np.arange(i * n, (i + 1) * n)),
            gather=lambda i, s=shard, p=picked: s.gather(p[i]),
            peer=lambda i, n=batch: nanogpt_batch(path, n),
        )
        tokens = batch * SEQ_LEN / 1e6
        rows.append((f"batch {batch}: only gather", f"{tokens / t['gather']:,.0f} M tokens/s"))
        rows.append(
            (
                f"batch {batch}: order, gather, check of ids",
                f"{tokens / t['ours']:,.0f} M tokens/s, {t['peer'] / t['ours']:.0f} x nanoGPT's loop",
            )
        )
    order = medians(64, order=lambda i: windows._windows(7, np.arange(i * 512, (i + 1) * 512)))
    start = time.perf_counter()
    for i in range(64):
        windows._windows(8, np.arange(i * 512, (i + 1) * 512))
    mean = (time.perf_counter() - start) / 64
    rows.append(("order of a batch of 512", f"{order['order'] * 1e6:.0f} µs median, {mean * 1e6:.0f} µs mean"))
    return rows


def cold_rows(path: pathlib.Path, windows: loader.TokenWindows) -> list[tuple[str, str]]:
    """A few batches of 512 from a file that is not in the page cache; the naive way does not advise the kernel."""

    def evict() -> None:
        loader.pages.release(windows.files.shards[0])
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(i: int, advised: bool) -> None:
        for b in range(4):
            g = np.arange(512) + (8 * i + 4 * advised + b) * 512
            if advised:
                windows.will_need(g)
            windows.rows(g)

    times: dict[bool, list[float]] = {False: [], True: []}
    for i in range(5):
        for advised in times:
            evict()
            start = time.perf_counter()
            read(i, advised)
            times[advised].append(time.perf_counter() - start)
    naive, ours = (4 * 512 * SEQ_LEN / 1e6 / float(np.median(times[a])) for a in (False, True))
    return [("cold file, batch 512", f"{ours:.1f} M tokens/s, {ours / naive:.0f} x without advice ({naive:.1f})")]


def prepare_rows(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Times launch.prepare on JSON lines and on text: the source code of this Python, repeated."""
    texts = [f.path.read_text(encoding="utf-8") for f in corpus.find_files("python-stdlib", folder).files]
    source, written, number = folder / "corpus", 0, 0
    source.mkdir()
    while written < CORPUS_MB.value * 1e6:
        with (source / f"{number:04d}.txt").open("w", encoding="utf-8") as f:
            written += f.write("".join(texts))
        number += 1
    size, rows = sum(p.stat().st_size for p in source.iterdir()) / 1e6, []
    first = folder / "small.txt"
    first.write_text("".join(texts)[:20_000_000], encoding="utf-8")
    subprocess.run(
        [*_prepare(first, folder / "bpe"), "--tokenizer=bpe:16384"], cwd=ROOT, check=True, capture_output=True
    )
    for name, spec in (("characters", "char"), ("bytes", "byte"), ("BPE of 16,384, tiktoken", str(folder / "bpe"))):
        out = folder / "out"
        argv = [*_prepare(source, out), f"--tokenizer={spec}", "--overwrite"]
        start = time.perf_counter()
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
        memory = PeakMemory(process.pid)
        code = process.wait()
        seconds, peak = time.perf_counter() - start, memory.result()
        assert code == 0
        rows.append((f"prepare {size:,.0f} MB, {name}", f"{size / seconds:.0f} MB/s, {peak:.2f} GiB at most"))
    return rows


def _prepare(source: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [sys.executable, "-m", "launch.prepare", f"--source={source}", f"--out={out}"]


def packed_rows(dataset: pathlib.Path) -> list[tuple[str, str]]:
    """Gathers rows of packed documents, from launch.pack's index, and windows of the same tokens for comparison."""
    argv = [sys.executable, "-m", "launch.pack", str(dataset), f"--seq_len={SEQ_LEN}"]
    start = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    manifest = formats.read_manifest(dataset)
    files, index = formats.TokenFiles(dataset, manifest, "train"), packing.read_index(dataset, manifest, SEQ_LEN)
    packed, windows = loader.PackedWindows(files, index, seed=0), loader.TokenWindows(files, seq_len=SEQ_LEN, seed=0)
    sum(int(shard.max()) for shard in files.shards)
    t = medians(
        ROUNDS.value,
        packed=lambda i: packed.rows(np.arange(i * 512, (i + 1) * 512)),
        windows=lambda i: windows.rows(np.arange(i * 512, (i + 1) * 512)),
    )
    speed = 512 * SEQ_LEN / 1e6 / t["packed"]
    return [
        (f"launch.pack, {files.tokens / 1e6:,.0f} M tokens", f"{seconds:.1f} s, {100 * index.utilisation:.2f} % used"),
        ("packed rows, batch 512", f"{speed:,.0f} M tokens/s, {t['packed'] / t['windows']:.1f} x the time of windows"),
    ]


def wait_rows(folder: pathlib.Path) -> list[tuple[str, str]]:
    """The share of its steps that a real run waits for data: steps 50 to 300 of the small recipe."""
    run, every = folder / "run", 10
    argv = [
        sys.executable, "-m", "launch.train", "--config=configs/shakespeare_char.py:cpu", f"--workdir={run}",
        f"--config.data.path={folder / 'bpe'}", "--config.num_train_steps=300", f"--config.metrics.every_steps={every}",
        "--config.eval.every_steps=0",
    ]  # fmt: skip
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > 50 and "perf/step_time_s" in row]
    steps, waits = (sum(row[name] for row in rows) for name in ("perf/step_time_s", "perf/data_wait_s"))
    return [("waiting for data, small recipe", f"{100 * waits / (steps * every):.2f} % of the step")]


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        path, windows = token_file(folder)
        rows = gather_rows(path, windows) + cold_rows(path, windows)
        path.unlink()
        rows += prepare_rows(folder) + packed_rows(folder / "out") + wait_rows(folder)
    print("| | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    app.run(main)
