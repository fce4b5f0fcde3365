"""How wide the tokens of a file without a header are, told by where its zeros lie.

Tokens are small beside what their type holds. So the upper half of nearly every uint32 is 0 to 3 (ids up to 262,143),
and the lower half is not. Shares are compared, over stretches of the whole file: a single odd id, such as -1, and a
header before the tokens change nothing. Of uint16 tokens the two bytes tell: the lower one takes more values.
"""

import dataclasses

import numpy as np

UPPER_HALF_LIMIT = 4
# Shares of words below the limit, or of zeros: those of upper halves are at least the first, those of lower ones at
# most the second; and how many words (of 16 bits) it takes, because in fewer chance decides. Between them nothing is
# told: a vocabulary of a few tokens has zeros everywhere.
LIMITS = ((0.9, 0.5, 128), (0.999, 0.9, 1024))
# uint16 of any vocabulary: high bytes have fewer bits of entropy than low ones, in natural and in random orders of ids.
SWAPPED_BITS, SWAPPED_WORDS = 1.0, 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    bytes: int  # of a token: 2, 4 or 8
    big_endian: bool

    @property
    def numpy(self) -> str:
        """As numpy names it."""
        return f"{'>' if self.big_endian else '<'}u{self.bytes}"


def look(raw: bytes) -> Layout | None:
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
    """In bits."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
