"""Divides long texts into parts whose concatenated tokens are those of the complete text.

Tokenizers join characters across any border, put a space before a text, strip its ends, and depend on the context of a
word. So a text is divided at a seam: a place at which the tokens of the text around it (a window) begin with the tokens
of the part before it. The text after a seam is encoded together with the window's first half, whose tokens are then
removed. This is correct if the tokens near the seam depend only on the window. Therefore the tokens of both parts are
compared with the window's, and the caller learns if they differ.

Equal ids identify a place only if the ids a little further on differ. They do not differ in a run of one id, such as
unknown words or a run of N in DNA, or in a run of a few ids that repeat. There is also no seam if the tokens depend on
the distance from the beginning of the text, for example if text is split into pieces of six characters. So windows that
begin elsewhere must have the same tokens.

Unigram models sum scores from the beginning of a call, so rounding decides between two segmentations with the same
score (such as an odd number of newlines as pairs and a single one). So the tokens of a part may be the other
segmentation; both decode to the same text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

WINDOW = 1024  # characters examined on each side of a border
REACH = 256  # the most characters by which a border is moved
WORDS, PLACES = 16, 32  # how many beginnings of words, and other places on each side, are tried
TOKENS = 16  # this many tokens before a seam must not be periodic
BEGINNINGS = 2  # how many windows with a later beginning are compared
PART = 1 << 18  # characters encoded in one call if seams are found; libraries need some 160 bytes for each character

Encode = Callable[[str], np.ndarray]
EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place at which a text can be divided.

    Attributes:
      window: the text around the seam.
      at: the seam's index in `window`.
      shift: how many characters the seam is after the requested border.
      head: tokens of the window before the seam.
      rest: tokens of the window after the seam.
    """

    window: str
    at: int
    shift: int
    head: np.ndarray
    rest: np.ndarray

    @property
    def before(self) -> str:
        """The first part of the window. The text after the seam is encoded together with it."""
        return self.window[: self.at]

    def ends(self, ids: np.ndarray) -> bool:
        """Whether the tokens of a text that ends here end as the window's head does."""
        n = max(len(self.head) // 2, 1)
        return np.array_equal(ids[-n:], self.head[-n:])

    def take(self, ids: np.ndarray) -> np.ndarray | None:
        """The tokens of a text, given the tokens of `before` + the text; None if these differ from the window's."""
        n = len(self.rest) // 2
        start = len(self.head)
        same = np.array_equal(ids[:start], self.head) and np.array_equal(ids[start : start + n], self.rest[:n])
        return ids[start:] if same else None


def find_seam(encode: Encode, before: str, after: str, reach: int = REACH) -> Seam | None:
    """A seam at most `reach` characters from the border of two texts; None if there is none.

    Args:
      before: the last characters, at most WINDOW, of the document before the border.
      after: the first characters, at most WINDOW, of the document after the border.
    """
    window = before + after
    whole = encode(window)
    for at in _places(window, len(before), reach):
        head = encode(window[:at])
        seam = Seam(window, at, at - len(before), head, whole[len(head) :])
        if np.array_equal(whole[: len(head)], head) and not _repeats(head[-TOKENS:]) and _is_local(encode, seam):
            return seam
    return None


def _repeats(ids: np.ndarray) -> bool:
    """Whether the ids repeat with some period, so that equal ids may occur further on in the text."""
    return any(np.array_equal(ids[period:], ids[:-period]) for period in range(1, max(len(ids) // 2, 1) + 1))


def _is_local(encode: Encode, seam: Seam) -> bool:
    """Whether windows that begin some characters later have the same tokens on both sides of the seam."""
    for start in range(seam.at // 2, min(seam.at // 2 + BEGINNINGS, seam.at)):
        head, whole = encode(seam.window[start : seam.at]), encode(seam.window[start:])
        n = max(len(head) // 2, 1)
        same = np.array_equal(whole, np.concatenate([head, seam.rest])) and np.array_equal(head[-n:], seam.head[-n:])
        if not same:
            return False
    return True


def _places(window: str, cut: int, reach: int) -> Iterator[int]:
    """The border itself, the nearest beginnings of words, then other places in `window`, the nearest first."""
    near = sorted(range(max(cut - reach, 1), min(cut + reach, len(window) - 1) + 1), key=lambda at: abs(at - cut))
    words = [at for at in near if window[at].isspace() and not window[at - 1].isspace()]
    return iter(dict.fromkeys([cut, *words[:WORDS], *near[: 2 * PLACES]]))


def encode_batch(encode: EncodeBatch, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text. A call of `encode` gets about PART characters at most, to limit memory."""
    found: list[np.ndarray] = []
    group: list[str] = []
    characters = 0
    for text in texts:
        characters += len(text)
        if group and characters > PART:
            found += encode(group)
            group, characters = [], len(text)
        if len(text) > PART:
            found.append(encode_long(lambda part: encode([part])[0], text))
            characters = 0
        else:
            group.append(text)
    return found + (encode(group) if group else [])


def encode_long(encode: Encode, text: str) -> np.ndarray:
    """The tokens of a text, encoded in parts of about PART characters; in longer ones if a seam is missing or fails."""
    found: list[np.ndarray] = []
    last: Seam | None = None
    start, size = 0, PART
    while start < len(text):
        cut = start + size
        within = cut + WINDOW < len(text)
        seam = find_seam(encode, text[cut - WINDOW : cut], text[cut : cut + WINDOW]) if within else None
        if within and seam is None:
            size *= 2
            continue
        stop = cut + seam.shift if seam else len(text)
        ids = encode((last.before if last else "") + text[start:stop])
        part = last.take(ids) if last else ids
        if part is None:  # the tokens after the seam differ from those in the window
            return encode(text)
        if seam and not seam.ends(part):
            size *= 2  # so that all attempts together take about as long as the last one
            continue
        found.append(part)
        start, size, last = stop, PART, seam
    return np.concatenate(found) if found else encode(text)
