"""What a tokenizer does not keep of a text, counted: unknown tokens, and texts that do not decode to themselves."""

import numpy as np

from data.preparation.parts import Part
from data.preparation.problems import Problems
from data.tokenizers.base import Tokenizer, finder

UNKNOWN = "unknown token, in place of text that the tokenizer cannot express"
CHANGED = "text that does not decode to itself (of those compared: one character in 16)"
SPELLED = "text that spells a special token, encoded as ordinary text"
LOSSES = (UNKNOWN, CHANGED)  # with these nobody knows how many bytes of text the tokens stand for

COMPARED = 1 << 12  # characters of a text that are compared at most
SHARE = 16  # of all characters one in so many, and COMPARED at the beginning of a unit


class Losses:
    """Looks at the texts of a unit and their tokens, and adds to its problems."""

    def __init__(self, codec: Tokenizer, problems: Problems):
        self.codec, self.problems = codec, problems
        self._names, self._unknown, self._lossless = finder(codec.special_tokens), codec.unknown_id, codec.lossless
        self._due = float(COMPARED)  # characters to be compared by now

    def look(self, part: Part, ids: np.ndarray) -> None:
        """Counts what was lost in `ids`, the tokens of `part`."""
        if isinstance(part.text, bytes):
            return
        if self._unknown is not None and (unknown := np.count_nonzero(ids == self._unknown)):
            at = int(np.argmax(ids == self._unknown))
            around = self.codec.decode(ids[max(at - 5, 0) : at + 6])
            self.problems.found(UNKNOWN, f"{part.path} ({around!r})", int(unknown))
        if names := self._names(part.text):
            self.problems.found(SPELLED, f"{part.path} ({names[0]!r})", len(names))
        if not self._lossless:
            self._compare(part)

    def _compare(self, part: Part) -> None:
        assert isinstance(part.text, str)
        self._due += len(part.text) / SHARE
        text = part.text[:COMPARED]
        if self._due < len(text):
            return
        self._due -= len(text)
        decoded = self.codec.decode(self.codec.encode(text))
        if decoded not in (text, f" {text}"):  # some put a space before each text
            pairs = enumerate(zip(text, decoded, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
            shown = f"{text[max(at - 10, 0) : at + 20]!r} becomes {decoded[max(at - 10, 0) : at + 20]!r}"
            self.problems.found(CHANGED, f"{part.path} ({shown})")
