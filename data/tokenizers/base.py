"""The interface of all tokenizers, special tokens, and text that cannot be encoded.

Text that spells the name of a special token is ordinary text: no tokenizer here makes a special token from it, so a
document cannot forge the end of another. `name_finder` finds such text. Decoding writes a special token as its name.
"""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data.errors import DataError

MAX_ID = (1 << 24) - 1  # a file with a larger id is damaged: vocabularies are smaller
END_OF_TEXT = "<eos>"
# Names of the token after a document in files of other systems; the first name that a tokenizer has is used. Names of
# base models come before names of chat models: <|eot_id|> and <|im_end|> end a turn, not a text.
END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    END_OF_TEXT,
    "<EOS>",
    "[EOS]",
    "<|eos|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Maps text to token ids and back.

    Attributes:
      specials: the special tokens, id to name, in the order of their ids.
      special_tokens: the names of the special tokens.
      eos_id: the token after a document, if there is one.
      unknown_id: the token for text that the tokenizer cannot express, if there is one.
      lossless: every text decodes to itself, except for unknown tokens.
      joins: a token may depend on more than one character.
      phased: a token may depend on the number of characters before it, for example if text is split at a fixed length.
    """

    kind: str
    vocab_size: int
    special_tokens: list[str]
    specials: dict[int, str]
    eos_id: int | None
    unknown_id: int | None = None
    lossless: bool = False
    joins: bool = True
    phased: bool = False

    @property
    def eos(self) -> str:
        """The name of the end-of-text token; "" if there is no such token."""
        return "" if self.eos_id is None else self.specials[self.eos_id]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [number of tokens]. Raises DataError if the text cannot be expressed."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in one call if that is faster."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, maybe only a part of a character; for a special token, of its name."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The content of meshlm_tokenizer.json, except the name and sha256 of a file."""
        ...

    def file(self) -> tuple[str, bytes] | None:
        """Name and content of the tokenizer's standard file; None if meshlm_tokenizer.json has everything."""
        return None


def name_finder(names: Collection[str]) -> Callable[[str], list[str]]:
    """A function that lists all occurrences of the names in a text; if two begin at one place, the longer name."""
    beginnings = {name[:2] for name in names}
    expression = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def found(text: str) -> list[str]:
        # str.find is some thirty times faster than a regular expression, and most texts contain none.
        return expression.findall(text) if any(beginning in text for beginning in beginnings) else []

    return found


def find_eos(names: Collection[str]) -> str | None:
    return next((name for name in END_OF_TEXT_NAMES if name in names), None)


def encodable(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which UTF-8 cannot express; surrogate pairs become characters."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def decode_around(
    ids: Iterable[int], specials: Mapping[int, str], vocab_size: int, plain: Callable[[list[int]], str]
) -> str:
    """Decodes runs of ordinary ids with `plain` and puts the names of special tokens between them."""
    out: list[str] = []
    run: list[int] = []
    for i in map(int, ids):
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} is outside the tokenizer's vocabulary of {vocab_size}")
        if i in specials:
            out += [plain(run), specials[i]]
            run = []
        else:
            run.append(i)
    return "".join([*out, plain(run)])


def choose_eos(where: str, specials: Mapping[str, int], wanted: str | None) -> int | None:
    """The id of `wanted`; if that is None, of the first known end-of-text name, or None. Raises DataError."""
    name = find_eos(specials) if wanted is None else wanted
    if name is not None and name not in specials:
        known = ", ".join(list(specials)[:10]) or "none"
        raise DataError(f"{where} has no special token {name!r}; an existing tokenizer keeps its own: {known}")
    return None if name is None else specials[name]


def check_special_tokens(names: Sequence[str]) -> None:
    """Raises DataError for a name that is empty, given twice, or not Unicode text."""
    for i, name in enumerate(names):
        if not name or name in names[:i] or encodable(name) != name:
            raise DataError(f"special token {name!r} is empty, given twice or not Unicode text")


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        spec = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} is damaged: it is not JSON ({e})") from None
    if not isinstance(spec, dict):
        raise DataError(f"{where} is not a tokenizer: its JSON is a {type(spec).__name__}, not an object")
    return spec


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns a library's exception about a file's content, or a Rust panic, into a DataError `what: why`."""
    try:
        yield
    except DataError:
        raise
    except BaseException as e:
        if isinstance(e, MemoryError) or not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):
            raise
        raise DataError(f"{what}: {' '.join(f'{type(e).__name__}: {e}'.split())[:300]}") from None
