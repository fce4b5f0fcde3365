"""SentencePiece `.model` files, read with the sentencepiece package."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizers import seams
from data.tokenizers.base import Tokenizer, choose_eos, decode_around, encodable, find_eos, refusing

FILE_NAME = "tokenizer.model"
SPACE = "▁"  # this character stands for a space in pieces


class PieceTokenizer(Tokenizer):
    """A SentencePiece model. Its special tokens are control pieces and <unk>; user-defined pieces are found in text.

    Decoding gives the text as the model normalises it (often without a space at the beginning, and with single spaces).

    Args:
      raw: the content of the file.
      where: the file's name in errors.
      eos: the name of the end-of-text token; None: the model's own, or the first known name; "": no such token.

    Raises:
      DataError: `raw` is not such a file, is damaged, or lacks the token `eos`; or the package is missing.
    """

    kind = "sentencepiece"

    def __init__(self, raw: bytes, where: str = FILE_NAME, eos: str | None = None):
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"{where} needs the sentencepiece package: pip install 'meshlm[data]'") from None
        self._raw = raw
        self._where = where
        with refusing(f"{where} is not a SentencePiece model, or is damaged"):
            model = self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
            self.vocab_size = model.get_piece_size()
            self._pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
            self.specials = {
                i: piece for i, piece in enumerate(self._pieces) if model.is_control(i) or model.is_unknown(i)
            }
            self._bytes = {i: bytes.fromhex(self._pieces[i][3:5]) for i in range(self.vocab_size) if model.is_byte(i)}
            own = model.eos_id()
            self.unknown_id = model.unk_id()
        if not self._pieces:
            raise DataError(f"{where} is a SentencePiece model without pieces")
        self.special_tokens = list(self.specials.values())
        ids = {name: id for id, name in self.specials.items()}
        if eos is None:
            eos = self.specials.get(own) or find_eos(ids) or ""
        self.eos_id = None if eos == "" else choose_eos(where, ids, eos)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return seams.encode_batch(self._encode_batch, [encodable(text) for text in texts])

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with refusing(f"{self._where} cannot encode a text"):
            rows = self._model.encode(texts, out_type=int, num_threads=1)
        return [np.array(row, np.uint32) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_around(ids, self.specials, self.vocab_size, self._plain)

    def _plain(self, ids: list[int]) -> str:
        with refusing(f"{self._where} cannot decode"):
            return self._model.decode(ids) if ids else ""

    def token_bytes(self, id: int) -> bytes:
        return self._bytes[id] if id in self._bytes else self._pieces[id].replace(SPACE, " ").encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos": self.eos}

    @classmethod
    def from_json(cls, spec: dict[str, Any], raw: bytes, where: str) -> "PieceTokenizer":
        return cls(raw, where, spec["eos"])

    def file(self) -> tuple[str, bytes]:
        return FILE_NAME, self._raw
