"""How time and memory of a preparation grow with an input that is hard in one way. Prints a Markdown table.

  python -m benchmarks.growth [--only=lines,run] [--gb=10]

Each row runs launch.prepare on inputs of 1, 10 and 100 times a size. Slopes are log-log, over the last factor of ten: 1
is linear; start-up time is subtracted. With --gb a text of that size with a problem every 7,000 lines is prepared,
interleaved with the same text without problems, and CPU time is compared as well as wall time.
"""

import base64
import json
import math
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import zstandard
from absl import app, flags

from benchmarks.memory import PeakMemory

ONLY = flags.DEFINE_list("only", [], "Rows to run; all when empty.")
GB = flags.DEFINE_float("gb", 0, "Only compare clean and problematic lines, with this much text.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Interleaved rounds of that comparison; medians are printed.")

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 7000  # lines
LINE = (
    json.dumps({"text": "a record of some words, as they are met in a corpus of the web, and a number: 12345"}) + "\n"
)
EMPTY = json.dumps({"text": ""}).ljust(len(LINE) - 1) + "\n"
NOT_ASCII = (
    json.dumps({"text": "naïve café — 東京 さくら, в чащах юга жил бы цитрус, 한국어"}, ensure_ascii=False) + "\n"
)

Write = Callable[[pathlib.Path, int], list[str]]  # writes the input of a size and returns further flags


def lines(path: pathlib.Path, megabytes: int, problems: bool = True) -> list[str]:
    """JSON lines with an empty document at intervals: each is counted, and some are reported by line number."""
    block = LINE * (EVERY - 1) + (EMPTY if problems else LINE)
    with path.with_suffix(".jsonl").open("w") as f:
        for _ in range(max(1, megabytes * 1_000_000 // len(block))):
            f.write(block)
    return [f"--source={path.with_suffix('.jsonl')}", "--tokenizer=byte", "--val_fraction=0"]


def not_ascii(path: pathlib.Path, megabytes: int) -> list[str]:
    path.with_suffix(".jsonl").write_text(NOT_ASCII * (megabytes * 1_000_000 // len(NOT_ASCII.encode())))
    return [f"--source={path.with_suffix('.jsonl')}", "--tokenizer=byte", "--val_fraction=0"]


def many_files(path: pathlib.Path, files: int) -> list[str]:
    path.mkdir()
    for i in range(files):
        folder = path / f"{i // 1000:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i % 1000:03d}.txt").write_text(f"the text of file {i}\n")
    return [f"--source={path}", "--tokenizer=byte", "--val_fraction=0"]


def trained(text: Callable[[int], str]) -> Write:
    def write(path: pathlib.Path, characters: int) -> list[str]:
        path.with_suffix(".txt").write_text("some other words to learn from\n" * 100 + text(characters))
        return [f"--source={path.with_suffix('.txt')}", "--tokenizer=bpe:512"]

    return write


def letters(characters: int) -> str:
    return "".join(random.Random(0).choices("acgt", k=characters))


def one_character(characters: int) -> str:
    return "a" * characters


def as_base64(characters: int) -> str:
    return base64.b64encode(random.Random(0).randbytes(characters * 3 // 4)).decode()


def chinese(characters: int) -> str:
    return "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x4F00), k=characters)))


def one_line(path: pathlib.Path, megabytes: int) -> list[str]:
    path.with_suffix(".jsonl").write_text(json.dumps({"text": "word " * (megabytes * 200_000)}) + "\n" + LINE)
    return [f"--source={path.with_suffix('.jsonl')}", "--tokenizer=byte", "--val_fraction=0"]


def packed(path: pathlib.Path, megabytes: int) -> list[str]:
    """One compressed file on which a tokenizer is trained: only the part for training needs to be decompressed."""
    with path.with_suffix(".txt.zst").open("wb") as f, zstandard.ZstdCompressor().stream_writer(f) as writer:
        for i in range(megabytes * 10):
            writer.write("".join(f"line {i * 4000 + j} of a text\n" for j in range(4000)).encode())
    return [f"--source={path.with_suffix('.txt.zst')}", "--tokenizer=char", "--val_fraction=0"]


def metaspace(path: pathlib.Path, megabytes: int) -> list[str]:
    """One long text, and a tokenizer that tiktoken cannot run."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    words = "a text of a few words that are said again and again, with some variation 0123456789\n"
    model.train_from_iterator([words] * 10, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    model.save(str(path.with_suffix(".json")))
    path.with_suffix(".txt").write_text(words * (megabytes * 1_000_000 // len(words)))
    return [f"--source={path.with_suffix('.txt')}", f"--tokenizer={path.with_suffix('.json')}"]


ROWS: dict[str, tuple[str, Write, int]] = {
    "lines": (f"an empty record every {EVERY:,} lines, MB", lines, 10),
    "not_ascii": ("records that are not ASCII, MB", not_ascii, 5),
    "files": ("files", many_files, 500),
    "line": ("one line of a record, MB", one_line, 1),
    "one_character": ("bpe:512 trained on one character again and again", trained(one_character), 20_000),
    "dna": ("bpe:512 trained on letters without a space (DNA)", trained(letters), 20_000),
    "base64": ("bpe:512 trained on base64", trained(as_base64), 20_000),
    "chinese": ("bpe:512 trained on Chinese characters without a space", trained(chinese), 10_000),
    "packed": ("one .txt.zst, MB", packed, 2),
    "metaspace": ("one text, a tokenizer of the tokenizers library (Metaspace), MB", metaspace, 1),
}


def prepare(out: pathlib.Path, arguments: list[str]) -> tuple[float, float]:
    """Runs launch.prepare; returns its seconds and its peak GiB."""
    argv = [sys.executable, "-m", "launch.prepare", f"--out={out}", "--overwrite", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    memory = PeakMemory(process.pid)
    _, errors = process.communicate()
    seconds, peak = time.perf_counter() - start, memory.result()
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: {errors.decode()}")
    return seconds, peak


def grown(name: str, write: Write, size: int, started: float) -> str:
    measured = []
    for factor in (1, 10, 100):
        with tempfile.TemporaryDirectory() as folder:
            arguments = write(pathlib.Path(folder) / "input", size * factor)
            measured.append(prepare(pathlib.Path(folder) / "out", arguments))
    times = " / ".join(f"{seconds:.1f}" for seconds, _ in measured)
    peaks = " / ".join(f"{peak:.2f}" for _, peak in measured)
    slope = math.log10(max(measured[2][0] - started, 0.01) / max(measured[1][0] - started, 0.01))
    growth = math.log10(measured[2][1] / measured[1][1])
    return f"| {name} | {size:,} x 1, 10, 100 | {times} | {slope:.2f} | {peaks} | {growth:.2f} |"


def compared(gigabytes: float) -> None:
    """Prepares clean and problematic lines, interleaved, and prints how long each takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "input"
        clock: dict[bool, list[float]] = {False: [], True: []}
        processors: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS.value):
            for problems in clock:
                arguments = lines(path, round(1000 * gigabytes), problems)
                before = _processor_seconds()
                clock[problems].append(prepare(pathlib.Path(folder) / "out", arguments)[0])
                processors[problems].append(_processor_seconds() - before)
    for name, seconds in (("clock", clock), ("processors", processors)):
        clean, with_problems = (sorted(times)[len(times) // 2] for times in seconds.values())
        times = f"clean {clean:.0f} s, with problems {with_problems:.0f} s, {with_problems / clean:.2f} x"
        print(f"{gigabytes} GB, {name}: {times}")


def _processor_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: list[str]) -> None:
    if GB.value:
        compared(GB.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = lines(pathlib.Path(folder) / "input", 0)
        started = min(prepare(pathlib.Path(folder) / "out", arguments)[0] for _ in range(3))
    print("| what grows | sizes | seconds | slope | GiB at most | slope |\n|---|---|---|---|---|---|")
    for name, (what, write, size) in ROWS.items():
        if not ONLY.value or name in ONLY.value:
            print(grown(what, write, size, started), flush=True)


if __name__ == "__main__":
    app.run(main)
