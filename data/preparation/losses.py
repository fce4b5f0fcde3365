"""Counts text that a tokenizer loses: unknown tokens, and texts that do not decode to themselves."""

import numpy as np

from data.preparation.input_errors import InputErrors
from data.preparation.parts import Part
from data.tokenizers.base import Tokenizer, name_finder

UNKNOWN = "unknown token, in place of text that the tokenizer cannot express"
CHANGED = "text that does not decode to itself (of those compared: one character in 16)"
SPELLED = "text that spells a special token, encoded as ordinary text"
LOSSES = (UNKNOWN, CHANGED)  # after one of these, the number of bytes that the tokens stand for is not known

COMPARED = 1 << 12  # the most characters of a text that are compared
SHARE = 16  # one in this many characters is compared, and COMPARED characters at the beginning of a unit


class Losses:
    """Compares the texts of a unit with their tokens, and records losses in the unit's errors."""

    def __init__(self, codec: Tokenizer, errors: InputErrors):
        self.codec = codec
        self.errors = errors
        self._names = name_finder(codec.special_tokens)
        self._unknown = codec.unknown_id
        self._lossless = codec.lossless
        self._due = float(COMPARED)  # characters that should have been compared by now

    def look(self, part: Part, ids: np.ndarray) -> None:
        """Counts what was lost in `ids`, the tokens of `part`."""
        if isinstance(part.text, bytes):
            return
        if self._unknown is not None and (unknown := np.count_nonzero(ids == self._unknown)):
            at = int(np.argmax(ids == self._unknown))
            around = self.codec.decode(ids[max(at - 5, 0) : at + 6])
            self.errors.record(UNKNOWN, f"{part.path} ({around!r})", int(unknown))
        if names := self._names(part.text):
            self.errors.record(SPELLED, f"{part.path} ({names[0]!r})", len(names))
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
        if decoded not in (text, f" {text}"):  # some tokenizers put a space before each text
            pairs = enumerate(zip(text, decoded, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
            shown = f"{text[max(at - 10, 0) : at + 20]!r} becomes {decoded[max(at - 10, 0) : at + 20]!r}"
            self.errors.record(CHANGED, f"{part.path} ({shown})")
