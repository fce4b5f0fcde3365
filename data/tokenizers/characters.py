"""Characters and bytes: the two tokenizers that need neither a library nor a file of their own."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizers.base import END_OF_TEXT, Tokenizer, decode_around, encodable

UNKNOWN = "<unk>"
CODE_POINTS = 0x110000  # the number of Unicode code points


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def count(text: str, counts: np.ndarray) -> None:
    """Adds the number of occurrences of each code point to `counts`, int64 [CODE_POINTS]."""
    utf8 = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    counts[:128] += byte_counts(utf8)[:128]  # in UTF-8, each of these bytes is always one character
    if (high := utf8 >= 128).any():
        seen = np.bincount(code_points(utf8[high].tobytes().decode("utf-8", "surrogatepass")))
        counts[: len(seen)] += seen


def byte_counts(raw: np.ndarray) -> np.ndarray:
    """The number of occurrences of each byte, int64 [256]; counted in pairs, which halves the work."""
    pairs = np.bincount(raw[: len(raw) // 2 * 2].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1)
    if len(raw) % 2:
        counts[raw[-1]] += 1
    return counts


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, ids 0 to 255, then the special tokens. Encodes any text; invalid bytes are decoded to U+FFFD."""

    kind = "byte"
    lossless = True
    joins = False

    def __init__(self, special_tokens: Sequence[str] = ()):
        self.special_tokens = list(special_tokens)
        self.vocab_size = 256 + len(self.special_tokens)
        self.specials = dict(enumerate(self.special_tokens, start=256))
        self.eos_id = 256 + self.special_tokens.index(END_OF_TEXT) if END_OF_TEXT in self.special_tokens else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [number of bytes]."""
        return self.encode_bytes(encodable(text).encode("utf-8"))

    @staticmethod
    def encode_bytes(raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return decode_around(
            ids, self.specials, self.vocab_size, lambda run: bytes(run).decode("utf-8", errors="replace")
        )

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else self.specials[id].encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "special_tokens": self.special_tokens}

    @classmethod
    def from_json(cls, spec: dict) -> "ByteTokenizer":
        return cls(spec["special_tokens"])


CHUNK = 1 << 14  # characters encoded at a time; in most languages many chunks are only ASCII


class CharTokenizer(Tokenizer):
    """Characters, ids in code point order (as nanoGPT's), then the special tokens.

    A character outside the vocabulary becomes `<unk>` if that is one of the special tokens. Otherwise it is an error,
    because dropping the character would change the text silently.
    """

    kind = "char"
    lossless = True
    joins = False

    def __init__(self, characters: str, special_tokens: Sequence[str] = ()):
        self.characters = characters
        self.special_tokens = list(special_tokens)
        self.pieces = [*characters, *self.special_tokens]
        self.specials = dict(enumerate(self.special_tokens, start=len(characters)))
        self.vocab_size = len(self.pieces)
        self.eos_id = self._special_id(END_OF_TEXT)
        # A lookup table by code point: one indexing operation on the UTF-32 form of a text gives its ids.
        self.unknown_id = self._special_id(UNKNOWN)
        missing = self.vocab_size if self.unknown_id is None else self.unknown_id
        self._table = np.full(CODE_POINTS, missing, np.uint32)
        self._table[[ord(c) for c in characters]] = np.arange(len(characters), dtype=np.uint32)
        # For ASCII, bytes.translate does the same five times faster; 255 stands for an id that does not fit.
        self._ascii = bytes(np.minimum(self._table[:128], 255).astype(np.uint8)) + bytes([255]) * 128

    def _special_id(self, token: str) -> int | None:
        return len(self.characters) + self.special_tokens.index(token) if token in self.special_tokens else None

    @classmethod
    def train(
        cls, texts: Iterable[str], *, min_frequency: int = 1, special_tokens: Sequence[str] = ()
    ) -> "CharTokenizer":
        """The characters that occur at least `min_frequency` times; rarer ones become `<unk>`."""
        counts = np.zeros(CODE_POINTS, np.int64)
        for text in texts:
            count(text, counts)
        return cls.of_counts(counts, min_frequency=min_frequency, special_tokens=special_tokens)

    @classmethod
    def of_counts(
        cls, counts: np.ndarray, *, min_frequency: int = 1, special_tokens: Sequence[str] = ()
    ) -> "CharTokenizer":
        """As `train`, from the number of occurrences of each code point, int64 [CODE_POINTS]."""
        kept = "".join(map(chr, np.flatnonzero(counts >= max(min_frequency, 1))))
        specials = list(special_tokens)
        if len(kept) < np.count_nonzero(counts) and UNKNOWN not in specials:
            specials.insert(0, UNKNOWN)
        return cls(kept, specials)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [number of characters]. Raises DataError on a character without an id."""
        ids = np.empty(len(text), np.uint32)
        for start in range(0, len(text), CHUNK):
            chunk = text[start : start + CHUNK]
            narrow = chunk.encode().translate(self._ascii) if chunk.isascii() else b"\xff"
            if b"\xff" in narrow:
                ids[start : start + CHUNK] = self._table[code_points(chunk)]
            else:
                ids[start : start + CHUNK] = np.frombuffer(narrow, np.uint8)
        if ids.size and ids.max() >= self.vocab_size:
            missing = sorted(set(text) - set(self.characters))
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in missing[:5])
            raise DataError(
                f"not in the tokenizer's {len(self.characters)} characters: {shown}; "
                "leave them out, or prepare the dataset with --special_tokens=<unk>"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            raise DataError(f"a token id is outside the tokenizer's vocabulary of {self.vocab_size}")
        return "".join(self.pieces[i] for i in listed)

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id].encode("utf-8", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters, "special_tokens": self.special_tokens}

    @classmethod
    def from_json(cls, spec: dict) -> "CharTokenizer":
        return cls(spec["characters"], spec["special_tokens"])
