"""Text to token ids and back: characters and bytes. Each tokenizer is one JSON file in a folder; nothing is pickled."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from data.errors import DataError

UNKNOWN = "<unk>"
END_OF_TEXT = "<eos>"


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class ByteTokenizer:
    """UTF-8 bytes, ids 0 to 255, then the special tokens. Encodes anything; a decoder's stray bytes become U+FFFD."""

    kind = "byte"

    def __init__(self, special_tokens: Sequence[str] = ()):
        self.special_tokens = list(special_tokens)
        self.vocab_size = 256 + len(self.special_tokens)

    @property
    def eos_id(self) -> int | None:
        return 256 + self.special_tokens.index(END_OF_TEXT) if END_OF_TEXT in self.special_tokens else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [number of bytes]."""
        return self.encode_bytes(text.encode("utf-8"))

    @staticmethod
    def encode_bytes(raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        raw, out = bytearray(), []
        for i in map(int, ids):
            if i < 256:
                raw.append(i)
            else:
                out.append(raw.decode("utf-8", "replace") + self.special_tokens[i - 256])
                raw.clear()
        return "".join(out) + raw.decode("utf-8", "replace")

    def to_json(self) -> dict:
        return {"kind": self.kind, "special_tokens": self.special_tokens}

    @classmethod
    def from_json(cls, spec: dict) -> "ByteTokenizer":
        return cls(spec["special_tokens"])


class CharTokenizer:
    """Characters, ids in code point order (as nanoGPT's), then the special tokens.

    A character outside the vocabulary becomes `<unk>` when that is one of the special tokens; otherwise it is an
    error, because dropping it would change the text without a word.
    """

    kind = "char"

    def __init__(self, characters: str, special_tokens: Sequence[str] = ()):
        self.characters = characters
        self.special_tokens = list(special_tokens)
        self.pieces = [*characters, *self.special_tokens]
        self.vocab_size = len(self.pieces)
        # A lookup table over code points: text becomes ids by one indexing operation on its UTF-32 form.
        missing = self.vocab_size
        self._table = np.full(0x110000, self._special_id(UNKNOWN, missing), np.uint32)
        self._table[[ord(c) for c in characters]] = np.arange(len(characters), dtype=np.uint32)

    def _special_id(self, token: str, default=None):
        return len(self.characters) + self.special_tokens.index(token) if token in self.special_tokens else default

    @property
    def eos_id(self) -> int | None:
        return self._special_id(END_OF_TEXT)

    @classmethod
    def train(
        cls, texts: Iterable[str], *, min_frequency: int = 1, special_tokens: Sequence[str] = ()
    ) -> "CharTokenizer":
        """The characters that occur at least `min_frequency` times; rarer ones become `<unk>`."""
        counts = np.zeros(0x110000, np.int64)
        for text in texts:
            seen = np.bincount(_code_points(text))
            counts[: len(seen)] += seen
        kept = "".join(map(chr, np.flatnonzero(counts >= max(min_frequency, 1))))
        specials = list(special_tokens)
        if len(kept) < np.count_nonzero(counts) and UNKNOWN not in specials:
            specials.insert(0, UNKNOWN)
        return cls(kept, specials)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [number of characters]. Raises DataError on a character without an id."""
        ids = self._table[_code_points(text)]
        if ids.size and ids.max() >= self.vocab_size:
            missing = sorted(set(text) - set(self.characters))
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in missing[:5])
            raise DataError(
                f"not in the tokenizer's {len(self.characters)} characters: {shown}; "
                "leave them out, or prepare the dataset with --special_tokens=<unk>"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[int(i)] for i in ids)

    def to_json(self) -> dict:
        return {"kind": self.kind, "characters": self.characters, "special_tokens": self.special_tokens}

    @classmethod
    def from_json(cls, spec: dict) -> "CharTokenizer":
        return cls(spec["characters"], spec["special_tokens"])


Tokenizer = ByteTokenizer | CharTokenizer
KINDS: dict[str, type[ByteTokenizer] | type[CharTokenizer]] = {t.kind: t for t in (CharTokenizer, ByteTokenizer)}
FILE_NAME = "meshlm_tokenizer.json"


def save(tokenizer: Tokenizer, folder: pathlib.Path) -> pathlib.Path:
    """Writes the tokenizer's one file into `folder` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(json.dumps(tokenizer.to_json(), indent=1), encoding="utf-8")
    return path


def load(folder: pathlib.Path, sha256: str = "") -> Tokenizer:
    """Reads what `save` wrote. Raises DataError for a missing file, one that is no tokenizer, or another `sha256`."""
    path = folder / FILE_NAME
    try:
        raw = path.read_bytes()
        if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
            raise DataError(f"{path} is not the tokenizer the dataset was made with; prepare it again (--overwrite)")
        spec = json.loads(raw.decode("utf-8"))
        return KINDS[spec["kind"]].from_json(spec)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing: the tokenizer that belongs to the dataset or run") from None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is not a meshlm tokenizer file: {e!r}") from None
