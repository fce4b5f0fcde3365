"""Detects the width of tokens in a file without a header from the positions of its zeros.

Ids are small compared with the range of their type. So the upper half of nearly every uint32 is 0 to 3 (ids up to
262,143), and the lower half is not. Shares are compared, over blocks from the whole file, so that a single odd id, such
as -1, or a header before the tokens does not matter. In uint16 tokens the lower byte takes more values.
"""

import dataclasses

import numpy as np

UPPER_HALF_LIMIT = 4
# (a, b, n): the share of words below the limit, or zero, is >= a in upper halves and <= b in lower ones, over at
# least n 16-bit words: fewer may look so by chance. A share between a and b is inconclusive: a vocabulary of a few
# tokens has zeros everywhere.
LIMITS = ((0.9, 0.5, 128), (0.999, 0.9, 1024))
# In uint16 tokens, high bytes have less entropy than low ones, whether ids are in a natural or in a random order.
SWAPPED_BITS, SWAPPED_WORDS = 1.0, 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    bytes: int  # per token: 2, 4 or 8
    big_endian: bool

    @property
    def numpy(self) -> str:
        """The name of the dtype in numpy."""
        return f"{'>' if self.big_endian else '<'}u{self.bytes}"


def detect_layout(raw: bytes) -> Layout | None:
    """What `raw` (tokens, from a multiple of 8 bytes on) seems to hold; None: nothing is told."""
    words = np.frombuffer(raw, "<u2", len(raw) // 8 * 4).reshape(-1, 4)
    if words.size < LIMITS[0][2]:
        return None
    for low in (words < UPPER_HALF_LIMIT, words.byteswap() < UPPER_HALF_LIMIT, words == 0):
        share = low.mean(axis=0)
        for most, few, needed in LIMITS:
            empty = share >= most
            if words.size < needed or not (empty | (share <= few)).all():
                continue
            if empty.sum() == 3:
                return Layout(8, big_endian=not empty[3])
            if empty.sum() == 2 and empty[0] == empty[2]:
                return Layout(4, big_endian=bool(empty[0]))
    if (words[:, 1::2] < UPPER_HALF_LIMIT).mean() >= 0.5:
        return None
    low, high = (_entropy(half) for half in (words & 255, words >> 8))
    return Layout(2, big_endian=words.size >= SWAPPED_WORDS and high > low + SWAPPED_BITS)


def _entropy(values: np.ndarray) -> float:
    """Entropy in bits."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
