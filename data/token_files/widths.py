"""Detects the width of the tokens in a file without a header, by the positions of its zeros.

Tokens are small compared with the range of their type. So the upper half of nearly every uint32 is 0 to 3 (ids up to
262,143), and the lower half is not. Shares over blocks of the complete file are compared, so a single
unusual id, such as -1, or a header before the tokens does not matter. For uint16 tokens, the two bytes decide: the
lower byte takes more values.
"""

import dataclasses

import numpy as np

UPPER_HALF_LIMIT = 4
# The share of 16-bit words below the limit (or zero) must be at least the first number for upper halves, and at most
# the second for lower halves. The third number is how many words are needed: with fewer, shares are random. A share
# between the two decides nothing: a vocabulary of a few tokens has zeros everywhere.
LIMITS = ((0.9, 0.5, 128), (0.999, 0.9, 1024))
# uint16 of any vocabulary: high bytes have less entropy than low bytes, whether ids are in natural or random order.
SWAPPED_BITS, SWAPPED_WORDS = 1.0, 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    bytes: int  # the width of a token: 2, 4 or 8
    big_endian: bool

    @property
    def numpy(self) -> str:
        """The dtype's name in NumPy."""
        return f"{'>' if self.big_endian else '<'}u{self.bytes}"


def detect_layout(raw: bytes) -> Layout | None:
    """The probable layout of `raw` (tokens from a multiple of 8 bytes on); None: unclear."""
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
    """The entropy of values below 256, in bits."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
