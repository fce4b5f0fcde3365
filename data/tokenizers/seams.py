"""Encodes long texts in parts whose concatenated tokens are those of the full text.

Tokenizers join characters across any place, put a space before a text, strip its ends, and look at what surrounds a
word. So a text is split at a seam: a place where the tokens of the text around it, a window, begin with the tokens of
the text before it. The text after a seam is encoded with the window's first part in front, whose tokens are then
removed. That is correct if the tokens near the seam depend only on the window; so the tokens of both parts are compared
with the window's, and if they differ, `ends` or `take` says so.

Equal ids identify a place only if the ids a little further on differ. They identify nothing in a run of one id, such as
unknown words or N in DNA, or of a few ids that repeat. Nor is there a seam if the tokens depend on how far away the
text begins, as when it is split into sixes: so windows that begin later must have the same tokens, too.

Unigram models add up scores from the beginning of a call, so rounding decides between two segmentations of the same
score (an odd run of newlines as pairs and one). A part may then use the other one; both decode to the same text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

WINDOW = 1024  # characters on each side of a cut
REACH = 256  # characters that a cut may move
WORDS, PLACES = 16, 32  # ends of words tried as seams, and other places on each side
TOKENS = 16  # before a seam; they must not repeat
BEGINNINGS = 2  # of windows that are compared, one character apart
PART = 1 << 18  # characters per call, if seams are found; libraries need some 160 bytes for each

Encode = Callable[[str], np.ndarray]
EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place in `window`, `shift` characters after the cut, and the window's tokens before and after it."""

    window: str
    at: int
    shift: int
    head: np.ndarray
    rest: np.ndarray

    @property
    def before(self) -> str:
        """The text to put before the text after the seam when encoding it."""
        return self.window[: self.at]

    def ends(self, ids: np.ndarray) -> bool:
        """Whether `ids`, of a text that ends here, end like the window's tokens before the seam."""
        n = max(len(self.head) // 2, 1)
        return np.array_equal(ids[-n:], self.head[-n:])

    def take(self, ids: np.ndarray) -> np.ndarray | None:
        """The tokens of a text, from those of `before` + text; None if they differ from the window's."""
        n = len(self.rest) // 2
        start = len(self.head)
        same = np.array_equal(ids[:start], self.head) and np.array_equal(ids[start : start + n], self.rest[:n])
        return ids[start:] if same else None


def find_seam(encode: Encode, before: str, after: str, reach: int = REACH) -> Seam | None:
    """A seam at most `reach` characters from where the texts meet; None if there is none.

    Args:
      before: the characters of the document right before the cut, at most WINDOW.
      after: likewise right after it.
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
    """Whether the ids are periodic, so that the same ids may also occur further on in the text."""
    return any(np.array_equal(ids[period:], ids[:-period]) for period in range(1, max(len(ids) // 2, 1) + 1))


def _is_local(encode: Encode, seam: Seam) -> bool:
    """Whether windows that begin later, one character apart, have the same tokens on both sides of the seam."""
    for start in range(seam.at // 2, min(seam.at // 2 + BEGINNINGS, seam.at)):
        head, whole = encode(seam.window[start : seam.at]), encode(seam.window[start:])
        n = max(len(head) // 2, 1)
        same = np.array_equal(whole, np.concatenate([head, seam.rest])) and np.array_equal(head[-n:], seam.head[-n:])
        if not same:
            return False
    return True


def _places(window: str, cut: int, reach: int) -> Iterator[int]:
    """Indices into `window`: the cut, then the nearest ends of words, then any places, nearest first."""
    near = sorted(range(max(cut - reach, 1), min(cut + reach, len(window) - 1) + 1), key=lambda at: abs(at - cut))
    words = [at for at in near if window[at].isspace() and not window[at - 1].isspace()]
    return iter(dict.fromkeys([cut, *words[:WORDS], *near[: 2 * PLACES]]))


def encode_batch(encode: EncodeBatch, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text; to bound memory, `encode` gets about PART characters per call at most."""
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
    """Tokens of a text, in parts of about PART characters; longer ones if there is no seam, or it fails."""
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
        if part is None:  # the tokens after the seam differ from the window's
            return encode(text)
        if seam and not seam.ends(part):
            size *= 2  # so that all attempts together take as long as the last one
            continue
        found.append(part)
        start, size, last = stop, PART, seam
    return np.concatenate(found) if found else encode(text)
