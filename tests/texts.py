"""Text for the tests of tokenizers: hard cases, and text that hypothesis generates."""

import random

from hypothesis import strategies as st

from data.tokenizers.ranks import NEW_CHARACTERS, TRICKY

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog said: it's 12345 o'clock!\n",
    "def encode(self, text):\n    return [self.table[c] for c in text]\n\n\n",
    "naïve café — 東京 さくら 🚀🚀 hello, hello, hello   world\t\t\r\n",
] * 5
# Words of the corpus, which TEXT mixes with characters of every kind, so that both merges and splits occur.
PIECES = [
    "the",
    " quick",
    "hello",
    "it's",
    "'LL",
    "123",
    "  ",
    "\n\n",
    "self.",
    "é",
    "東京",
    "🚀",
    "<|endoftext|>",
    "</s>",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=30).map("".join)
# Excludes unassigned characters: the regex package may know a newer version of Unicode than the other libraries do.
OLD_CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
OLD_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(OLD_CHARACTERS, max_size=5)), max_size=30).map("".join)
OLD_TRICKY = [*TRICKY, "", "a" * 3000, " " * 3000]
ALL_TRICKY = [*OLD_TRICKY, NEW_CHARACTERS]


def damaged_copies(raw: bytes, times: int):
    """`times` damaged copies of `raw`: a third are cut off, the others have changed bytes."""
    rng = random.Random(0)
    for i in range(times):
        if i % 3 == 0:
            yield raw[: rng.randrange(len(raw))]
            continue
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(min(len(raw), rng.choice((200, len(raw)))))  # more often near the beginning
            changed[at] = rng.choice((0, 10, 34, 49, 255, rng.randrange(256)))
        yield bytes(changed)
