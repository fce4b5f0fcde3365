"""`.tiktoken` files: lines of `base64 rank`, as OpenAI and Meta publish them. tiktoken encodes the text.

The file has neither the expression that splits text nor the special tokens; both are known from the number of ranks, or
the user names the expression.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizers.base import MAX_ID, Tokenizer, choose_eos, decode_around, encodable, refusing
from data.tokenizers.ranks import NEVER, PATTERNS

FILE_NAME = "ranks.tiktoken"
END = "<|endoftext|>"
_CL100K = {END: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}


def _llama3() -> dict[str, int]:
    """The special tokens in Llama 3's tokenizer.py."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(256))
    return {f"<|{names.get(i) or f'reserved_special_token_{next(reserved)}'}|>": 128000 + i for i in range(256)}


# From the number of ranks to the pattern and special tokens, as in tiktoken_ext/openai_public.py and Llama 3.
KNOWN: dict[int, tuple[str, dict[str, int]]] = {
    50256: ("gpt2", {END: 50256}),
    50280: ("gpt2", {END: 50256}),  # p50k_base
    100256: ("cl100k", _CL100K | {"<|endofprompt|>": 100276}),
    128000: ("llama3", _llama3()),
    199998: ("o200k", {END: 199999, "<|endofprompt|>": 200018}),
}


class RankTokenizer(Tokenizer):
    """Byte-level BPE by ranks.

    Args:
      raw: the content of the file.
      where: the file's name in errors.
      eos: the name of the end-of-text token; None: the first known name; "": no such token.
      pattern: one of ranks.PATTERNS; "": known from the number of ranks. If the file is not in KNOWN with this pattern,
        its only special token is <|endoftext|>, after its ranks.

    Raises:
      DataError: `raw` is not such a file or is damaged, the pattern is unknown, or tiktoken is missing.
    """

    kind = "tiktoken"
    lossless = True

    def __init__(self, raw: bytes, where: str = FILE_NAME, eos: str | None = None, pattern: str = ""):
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"{where} needs the tiktoken package: pip install 'meshlm[data]'") from None
        self._raw = raw
        self._where = where
        self._ranks = _parse(raw, where)
        known, specials = KNOWN.get(len(self._ranks), ("", {}))
        self.pattern = pattern or known
        if self.pattern not in PATTERNS:
            problem = f"the pattern {pattern!r} is unknown" if pattern else "the file is not a known one"
            raise DataError(
                f"{where} has {len(self._ranks):,} ranks, and {problem}; name the pattern that splits text, as "
                f"{where}:PATTERN, with one of {', '.join(PATTERNS)}"
            )
        if self.pattern != known:
            specials = {END: max(self._ranks.values()) + 1}
        with refusing(f"{where} is damaged"):
            self._encoding = tiktoken.Encoding(
                where, pat_str=PATTERNS[self.pattern], mergeable_ranks=self._ranks, special_tokens={NEVER: MAX_ID + 1}
            )
        self._pieces = {rank: piece for piece, rank in self._ranks.items()}
        self.specials = {id: name for name, id in specials.items()}
        self.special_tokens = list(specials)
        self.eos_id = None if eos == "" else choose_eos(where, specials, eos)
        self.vocab_size = max(*self._pieces, *self.specials) + 1

    def encode(self, text: str) -> np.ndarray:
        text = encodable(text)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of white space is too long for tiktoken's expressions, but not for regex
            import regex

            pieces = regex.findall(PATTERNS[self.pattern], text)
            ids = [self._encoding._core_bpe.encode_single_piece(piece.encode()) for piece in pieces]
            return np.fromiter((i for part in ids for i in part), np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        def plain(run: Sequence[int]) -> str:
            return b"".join(map(self.token_bytes, run)).decode("utf-8", errors="replace")

        return decode_around(ids, self.specials, self.vocab_size, plain)

    def token_bytes(self, id: int) -> bytes:
        return self.specials[id].encode() if id in self.specials else self._pieces.get(id, b"")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos": self.eos, "pattern": self.pattern}

    @classmethod
    def from_json(cls, spec: dict[str, Any], raw: bytes, where: str) -> "RankTokenizer":
        return cls(raw, where, spec["eos"], spec["pattern"])

    def file(self) -> tuple[str, bytes]:
        return FILE_NAME, self._raw


def _parse(raw: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    lines = raw.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{where} line {number} is not `base64 rank`: {line[:40]!r}") from None
    missing = 256 - sum(bytes([b]) in ranks for b in range(256))
    if missing or len(set(ranks.values())) < len(lines) or min(ranks.values()) < 0 or max(ranks.values()) > MAX_ID:
        raise DataError(
            f"{where} is damaged: of {len(lines):,} ranks, {missing} of the 256 bytes are missing and "
            f"{len(lines) - len(set(ranks.values())):,} occur twice, or a rank is not valid"
        )
    return ranks
