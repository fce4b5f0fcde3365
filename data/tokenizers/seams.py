"""Long texts in parts whose tokens, one after another, are those of the whole.

Tokenizers join characters across any place, put a space before a text, strip its ends, and look at what lies around a
word. So a text is cut at a seam: a place where the tokens of the text around it, a window, begin with the tokens of
what is before it. What follows a seam is encoded behind the window's first part, whose tokens are then taken off. That
is right if the tokens near the seam depend on the window alone; hence the tokens of both parts are compared with the
window's, and the caller is told when they are not the same.

Equal ids tell a place only if they would be others a little further on. They tell nothing in a row of one id, such as
unknown words or a run of N in DNA, or of a few ids that repeat. Nor is there a seam if the tokens depend on how far
away the text begins, as when it is cut into sixes: so windows that begin elsewhere must have the same tokens, too.

Unigram models add scores up from the beginning of a call, so between two ways of the same score (an odd run of newlines
as pairs and one) rounding decides. There a part may take the other way; both stand for the same text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

WINDOW = 1024  # characters that are looked at on each side of a cut
REACH = 256  # how far a cut is moved
WORDS, PLACES = 16, 32  # beginnings of words, and other places on each side, that are tried
TOKENS = 16  # before a seam that must not repeat
BEGINNINGS = 2  # of windows that are compared
PART = 1 << 18  # characters encoded in one call, if seams are found; libraries need some 160 bytes for each

Encode = Callable[[str], np.ndarray]
EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place in `window`, `shift` characters behind the cut, and the tokens of what is before and after it."""

    window: str
    at: int
    shift: int
    head: np.ndarray
    rest: np.ndarray

    @property
    def before(self) -> str:
        """What the text after the seam is encoded behind."""
        return self.window[: self.at]

    def ends(self, ids: np.ndarray) -> bool:
        """Whether the tokens of a text that ends here do so as the window's."""
        n = max(len(self.head) // 2, 1)
        return np.array_equal(ids[-n:], self.head[-n:])

    def take(self, ids: np.ndarray) -> np.ndarray | None:
        """Of the tokens of `before` and a text after it, those of the text; None if they are not the window's."""
        n = len(self.rest) // 2
        start = len(self.head)
        same = np.array_equal(ids[:start], self.head) and np.array_equal(ids[start : start + n], self.rest[:n])
        return ids[start:] if same else None


def find(encode: Encode, before: str, after: str, reach: int = REACH) -> Seam | None:
    """A seam at most `reach` characters from where the texts meet; None if there is none.

    Args:
      before: the last characters, WINDOW or fewer, of what lies before the cut in its document.
      after: likewise the first ones.
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
    """Whether the ids are one or a few again and again, so that equal ids may be further on in the text."""
    return any(np.array_equal(ids[period:], ids[:-period]) for period in range(1, max(len(ids) // 2, 1) + 1))


def _is_local(encode: Encode, seam: Seam) -> bool:
    """Whether windows that begin later, by steps of one character, have the same tokens on both sides of the seam."""
    for start in range(seam.at // 2, min(seam.at // 2 + BEGINNINGS, seam.at)):
        head, whole = encode(seam.window[start : seam.at]), encode(seam.window[start:])
        n = max(len(head) // 2, 1)
        same = np.array_equal(whole, np.concatenate([head, seam.rest])) and np.array_equal(head[-n:], seam.head[-n:])
        if not same:
            return False
    return True


def _places(window: str, cut: int, reach: int) -> Iterator[int]:
    """The cut itself, the nearest beginnings of words, then any place; each in `window`, the nearest first."""
    near = sorted(range(max(cut - reach, 1), min(cut + reach, len(window) - 1) + 1), key=lambda at: abs(at - cut))
    words = [at for at in near if window[at].isspace() and not window[at - 1].isspace()]
    return iter(dict.fromkeys([cut, *words[:WORDS], *near[: 2 * PLACES]]))


def encode_batch(encode: EncodeBatch, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, by calls of `encode` with about PART characters at most, for the sake of memory."""
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
    """Tokens of a text, in parts of about PART characters; of longer ones if there is no seam, or it does not hold."""
    found: list[np.ndarray] = []
    last: Seam | None = None
    start, size = 0, PART
    while start < len(text):
        cut = start + size
        within = cut + WINDOW < len(text)
        seam = find(encode, text[cut - WINDOW : cut], text[cut : cut + WINDOW]) if within else None
        if within and seam is None:
            size *= 2
            continue
        stop = cut + seam.shift if seam else len(text)
        ids = encode((last.before if last else "") + text[start:stop])
        part = last.take(ids) if last else ids
        if part is None:  # what is behind a seam is not what it was in the window
            return encode(text)
        if seam and not seam.ends(part):
            size *= 2  # so that all attempts together take as long as the last one
            continue
        found.append(part)
        start, size, last = stop, PART, seam
    return np.concatenate(found) if found else encode(text)
