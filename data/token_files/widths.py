"""Detects the width of the tokens in a file without a header, by the positions of its zeros.

Tokens are small compared with the range of their type. So the upper half of nearly every uint32 is 0 to 3 (ids up to
262,143), and the lower half is not. Shares are compared, over blocks of the complete file, so a single odd id, such as
-1, or a header before the tokens does not matter. For uint16 tokens the two bytes decide: the lower one takes more
values.
"""

import dataclasses

import numpy as np

UPPER_HALF_LIMIT = 4
# Shares of 16-bit words that are below the limit, or zero: for upper halves at least the first number, for lower halves
# at most the second. The third is the number of words that are needed, because with fewer the shares are random. Shares
# between the two decide nothing: a vocabulary of a few tokens has zeros everywhere.
LIMITS = ((0.9, 0.5, 128), (0.999, 0.9, 1024))
# uint16 of any vocabulary: high bytes have less entropy than low bytes, whether ids are in natural or random order.
SWAPPED_BITS, SWAPPED_WORDS = 1.0, 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    bytes: int  # of a token: 2, 4 or 8
    big_endian: bool

    @property
    def numpy(self) -> str:
        """The dtype's name in NumPy."""
        return f"{'>' if self.big_endian else '<'}u{self.bytes}"


def detect_layout(raw: bytes) -> Layout | None:
    """The layout that `raw` (tokens, from a multiple of 8 bytes on) seems to have; None: unclear."""
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
    """In bits."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
