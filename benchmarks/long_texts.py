"""How the time of tokenizers grows with long texts that have no place to split. Prints one Markdown table.

  python -m benchmarks.long_texts [--small=40000] [--factor=100]

A row is a tokenizer, a column a kind of text; a cell has the CPU seconds for the large text and the log-log slope of
time over size: 1 is linear, 2 quadratic. `train` trains a byte-level BPE of 512 tokens.
"""

import base64
import math
import random
import time
from collections.abc import Callable

from absl import app, flags

from data.tokenizers.hf_json import train_bpe
from tests import families

SMALL = flags.DEFINE_integer("small", 40_000, "Characters of the small text.")
FACTOR = flags.DEFINE_integer("factor", 100, "Ratio of the long to the short text.")

TEXTS: dict[str, Callable[[random.Random, int], str]] = {
    "one letter": lambda rng, n: "a" * n,
    "spaces": lambda rng, n: " " * n,
    "base64": lambda rng, n: base64.b64encode(rng.randbytes(n * 3 // 4)).decode(),
    "DNA": lambda rng, n: "".join(rng.choices("ACGT", k=n)),
    "CJK": lambda rng, n: "".join(map(chr, rng.choices(range(0x4E00, 0x5E00), k=n))),
}


def seconds(run: Callable[[str], object], text: str, times: int) -> float:
    """The least CPU time of a few runs, over all threads, so that other load on the machine matters little."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run(text)
        found.append(time.process_time() - start)
    return min(found)


def cells(run: Callable[[str], object]) -> list[str]:
    row = []
    for make in TEXTS.values():
        small, large = (make(random.Random(0), size) for size in (SMALL.value, SMALL.value * FACTOR.value))
        first = seconds(run, small, 3)
        second = seconds(run, large, 1)
        row.append(f"{second:.2f} s, {math.log(second / first) / math.log(FACTOR.value):.2f}")
    return row


def main(argv: list[str]) -> None:
    runs: dict[str, Callable[[str], object]] = {"train": lambda text: train_bpe([text], 512)}
    runs |= {name: families.make(name).encode for name in families.FAMILIES}
    print(f"| | {' | '.join(TEXTS)} |\n|{'---|' * (len(TEXTS) + 1)}")
    for name, run in runs.items():
        print(f"| {name} | {' | '.join(cells(run))} |", flush=True)


if __name__ == "__main__":
    app.run(main)
