"""Tokenizers in a `tokenizer.json`, the format of Hugging Face's library: all that it can read, and BPE trained here.

If such a file is plain byte-level BPE, tiktoken encodes: it gives the same ids, about five times faster (ranks.py).
"""

import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizers import ranks, seams
from data.tokenizers.base import (
    END_OF_TEXT_NAMES,
    MAX_ID,
    Tokenizer,
    check_special_tokens,
    choose_eos,
    decode_around,
    encodable,
    find_eos,
    parse_json,
    refusing,
)
from data.tokenizers.ranks import BYTE_CHARACTERS, BYTE_OF

FILE_NAME = "tokenizer.json"
# How text is split before merges (pre-tokenization), as regular expressions of the tokenizers library (Oniguruma).
PATTERNS = {"gpt2": ranks.GPT2_PATTERN, "llama3": ranks.PATTERNS["llama3"]}

WORD = 999  # the most characters of a word in training; a multiple of 3, because Llama 3's pattern splits digits by 3
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{WORD + 1},}}|(?<!\s)\s{{{WORD + 1},}}")
# A word that PATTERNS split off is one of these runs, except for one more character or line ends.
_KINDS = r"\p{L}++|\p{N}++|[^\s\p{L}\p{N}]++|\s++"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError("this tokenizer needs the tokenizers package: pip install 'meshlm[data]'") from None
    return tokenizers


class JsonTokenizer(Tokenizer):
    """A tokenizer.json. Its special tokens are the added tokens that are marked as such, and the end-of-text token. The
    byte tokens of byte_fallback are ordinary tokens, although trainers have to add them as special ones.

    The file's truncation, padding, dropout and post-processing ([CLS], [SEP], a first <s>) are not used: only the text
    is encoded, the same way each time. If BPE has no unknown token, a character that it cannot express is an error (the
    library would drop it silently).

    Args:
      raw: the content of the file.
      where: the file's name in errors.
      eos: the name of the end-of-text token; None: the first known name; "": no such token.
      accelerate: whether tiktoken may encode.

    Raises:
      DataError: `raw` is not a tokenizer.json, is damaged, or does not have the token `eos`.
    """

    kind = "tokenizer.json"

    def __init__(self, raw: bytes, where: str = FILE_NAME, eos: str | None = None, accelerate: bool = True):
        self._raw = raw
        self._where = where
        self.spec = parse_json(raw, where)
        with refusing(f"{where} is not a tokenizer.json, or is damaged"):
            added = _added_tokens(self.spec)
            ids_of_specials = _special_tokens(added, eos)
            self.eos_id = None if eos == "" else choose_eos(where, ids_of_specials, eos)
            self.specials = dict(sorted((id, name) for name, id in ids_of_specials.items()))
            self.special_tokens = list(self.specials.values())
            copy = _CopyThatEncodes(self.spec, added, ids_of_specials)
            self._unknown = copy.unknown
            self.unknown_id = _unknown_token(self.spec["model"], added)
            self._library = _library().Tokenizer.from_str(json.dumps(copy.spec))
            self._pieces = self._read_pieces(copy)
            self.vocab_size = max(self._pieces) + 1
            self._added = {token["id"]: token["content"] for token in added}
            self.plain = {t: id for id, t in self._pieces.items() if id not in self._added}
            self.byte_level = _mentions(self.spec.get("decoder"), "ByteLevel") and all(
                character in BYTE_OF for token in self.plain for character in token
            )
            self._tiktoken = ranks.accelerated(self.spec, self.plain, self._encode) if accelerate else None
        self.phased = _mentions(self.spec.get("pre_tokenizer"), "FixedLength")
        self.lossless = self.accelerated and self.byte_level

    def _read_pieces(self, copy: "_CopyThatEncodes") -> dict[int, str]:
        """The vocabulary of the library. Raises DataError unless each token has an id of its own."""
        tokens = self._library.get_vocab(with_added_tokens=True)
        for token in copy.spec["added_tokens"]:
            if (id := tokens.get(token["content"])) != token["id"]:
                name = copy.names.get(token["content"], token["content"])
                raise DataError(f"{self._where} gives the added token {name!r} the ids {token['id']} and {id}")
        if len(set(tokens.values())) < len(tokens):
            raise DataError(f"{self._where} gives two tokens the same id")
        pieces = {id: copy.names.get(token, token) for token, id in tokens.items() if id != copy.unknown}
        if not pieces or max(pieces) > MAX_ID:
            raise DataError(f"{self._where} has no tokens, or ids above {MAX_ID}")
        return pieces

    def encode(self, text: str) -> np.ndarray:
        text = encodable(text)
        ids = self._tiktoken(text) if self._tiktoken else None
        if ids is not None:
            return ids
        return self._encode(text) if self.phased else seams.encode_long(self._encode, text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._tiktoken or self.phased:
            return [self.encode(text) for text in texts]
        return seams.encode_batch(self._encode_batch, [encodable(text) for text in texts])

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with refusing(f"{self._where} cannot encode a text"):
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [self._checked(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]

    def _encode(self, text: str) -> np.ndarray:
        with refusing(f"{self._where} cannot encode a text"):
            encoding = self._library.encode(text, add_special_tokens=False)
        return self._checked(encoding, text)

    def _checked(self, encoding: Any, text: str) -> np.ndarray:
        ids = np.array(encoding.ids, np.uint32)
        if self._unknown is not None and (ids == self._unknown).any():
            characters = dict.fromkeys(text)  # look at each character once: there may be millions
            unknown = (c for c in characters if self._unknown in self._library.encode(c, add_special_tokens=False).ids)
            missing = next(unknown, text[0])
            raise DataError(
                f"{self._where} cannot express {missing!r} (U+{ord(missing):04X}) and has no unknown token; "
                "choose a byte-level tokenizer, or leave the character out"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return decode_around(ids, self.specials, self.vocab_size, self._decode)

    def _decode(self, ids: list[int]) -> str:
        if self.byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        with refusing(f"{self._where} cannot decode"):
            return self._library.decode(ids, skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        piece = self._pieces.get(id, "")  # a vocabulary may have unused ids
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in piece)
        model = self.spec["model"]
        if len(piece) == 6 and piece.startswith("<0x") and model.get("byte_fallback"):
            return bytes.fromhex(piece[3:5])
        prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        piece = piece.removeprefix(prefix or "")
        if suffix and piece.endswith(suffix):
            piece = piece.removesuffix(suffix) + " "
        if _mentions(self.spec.get("decoder"), "Metaspace") or _mentions(self.spec.get("decoder"), "▁"):
            piece = piece.replace("▁", " ")
        return piece.encode()

    @property
    def accelerated(self) -> bool:
        """Whether tiktoken encodes."""
        return self._tiktoken is not None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos": self.eos}

    @classmethod
    def from_json(cls, spec: dict[str, Any], raw: bytes, where: str) -> "JsonTokenizer":
        return cls(raw, where, spec["eos"])

    def file(self) -> tuple[str, bytes]:
        return FILE_NAME, self._raw

    def merges(self) -> list[tuple[str, str]]:
        """The pairs in order of their rank, as in the file; empty if the model is not BPE."""
        with refusing(f"{self._where} is damaged"):
            return [_pair(merge) for merge in self.spec["model"].get("merges") or []]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge  # "a b", or [a, b] since tokenizers 0.20
    return left, right


def _added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens, without the byte tokens of byte_fallback."""
    bytes_of_model = _byte_tokens(spec["model"])
    added = spec.get("added_tokens") or []
    return [token for token in added if bytes_of_model.get(token["content"]) != token["id"]]


def _special_tokens(added: list[dict[str, Any]], eos: str | None) -> dict[str, int]:
    """Names and ids of the special tokens: the added tokens that are marked as special, and the end-of-text token."""
    specials = {token["content"]: token["id"] for token in added if token["special"]}
    if eos is None and find_eos(specials) is None:
        eos = find_eos({token["content"] for token in added})
    if eos:
        specials |= {token["content"]: token["id"] for token in added if token["content"] == eos}
    return specials


def _unknown_token(model: dict[str, Any], added: list[dict[str, Any]]) -> int | None:
    if model.get("unk_token"):
        named = {token["content"]: token["id"] for token in added}
        return (model["vocab"] | named).get(model["unk_token"])
    return model.get("unk_id")  # Unigram has an id, other models a name


class _CopyThatEncodes:
    """The copy of a tokenizer.json that the library gets.

    The library finds the names of added tokens in text, and models may have these names as pieces. In the copy, special
    tokens have names that text cannot contain, because they are drawn at random each time. A BPE model without an
    unknown token gets one, so that a character that the model cannot express is noticed.

    Attributes:
      spec: the copy.
      names: the original names of the hidden tokens.
      unknown: the id of the unknown token that was added; None if none was.
    """

    def __init__(self, spec: dict[str, Any], added: list[dict[str, Any]], specials: dict[str, int]):
        secret = secrets.token_hex(16)
        hidden = {name: name + secret for name in specials}
        model = _hide(spec["model"], hidden)
        self.spec = spec | {"truncation": None, "padding": None, "post_processor": None, "model": model}
        self.spec["added_tokens"] = [t | {"content": hidden.get(t["content"], t["content"])} for t in added]
        self.names = {other: name for name, other in hidden.items()}
        self.unknown: int | None = None
        if model.get("type", "BPE") != "BPE":
            return
        model["dropout"] = None
        if not model.get("unk_token"):
            named = {token["content"]: token["id"] for token in self.spec["added_tokens"]}
            vocabulary = named | model["vocab"]
            self.unknown = max(vocabulary.values(), default=-1) + 1
            model |= {"vocab": vocabulary | {f"?{secret}": self.unknown}, "unk_token": f"?{secret}"}


def _hide(model: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """A copy of `model` with renamed pieces; merges that use or make a renamed piece are left out."""
    copy = dict(model)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        copy["vocab"] = {hidden.get(token, token): id for token, id in vocabulary.items()}
    else:  # Unigram: [piece, score]
        copy["vocab"] = [[hidden.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token"):
        copy["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = map(_pair, model["merges"])
        copy["merges"] = [p for p in pairs if not {p[0], p[1], p[0] + p[1]} & hidden.keys()]
    return copy


def _byte_tokens(model: dict[str, Any]) -> dict[str, int]:
    """The tokens <0x00> to <0xFF> of a model with byte_fallback, and their ids."""
    if not model.get("byte_fallback"):
        return {}
    vocabulary = model["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {piece: id for id, (piece, _) in enumerate(vocabulary)}
    return {name: id for name, id in ids.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}


def _mentions(part: Any, word: str) -> bool:
    """Whether a component, or a component inside it, is of type `word` or replaces that text."""
    return part is not None and json.dumps(word) in json.dumps(part)


def pre_tokenizer(pattern: str) -> dict[str, Any]:
    """A component that splits text by `pattern` (not if that is empty), then writes its bytes as BYTE_CHARACTERS."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pattern == PATTERNS["gpt2"]:
        return byte_level | {"use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split] * bool(pattern) + [byte_level | {"use_regex": False}]}


def byte_level_json(merges: Sequence[tuple[str, str]], pattern: str, specials: dict[str, int]) -> bytes:
    """A tokenizer.json of byte-level BPE: ids 0 to 255 are the bytes, and merge i makes id 256 + i.

    Args:
      specials: names of the special tokens, and their ids.

    Raises:
      DataError: two merges make the same token, or a special token has the name of an ordinary one.
    """
    vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    for left, right in merges:
        if left + right in vocabulary:
            raise DataError(f"two merges make the same token, {left + right!r}")
        vocabulary[left + right] = len(vocabulary)
    if same := vocabulary.keys() & specials.keys():
        raise DataError(f"special token {min(same)!r} is an ordinary token already; choose another name")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags, "special": True} for name, id in specials.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | specials,
            "merges": list(merges),
        },
    }
    return json.dumps(spec, ensure_ascii=False, indent=1).encode()


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pattern: str = "gpt2",
    special_tokens: Sequence[str] = (END_OF_TEXT_NAMES[0],),
    min_frequency: int = 1,
) -> JsonTokenizer:
    """Byte-level BPE that encodes any text: the 256 bytes, then merges, then the special tokens.

    The same texts in any order give the same tokenizer. Text with too few pairs gives a smaller vocabulary. Memory
    grows with the number of distinct words: pass a few GB at most. A word (by the pattern) of more than WORD characters
    is divided, because time grows with the square of its length.

    Args:
      vocab_size: the number of tokens, including the special ones.
      pattern: 'gpt2' (which llama.cpp can read) or 'llama3'.
      min_frequency: rarer pairs are not merged.

    Raises:
      DataError: the vocabulary is too small for the bytes and special tokens, the pattern is unknown, or a special
        token is not allowed.
    """
    check_special_tokens(special_tokens)
    if pattern not in PATTERNS:
        raise DataError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    merges = vocab_size - 256 - len(special_tokens)
    if merges < 0:
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(special_tokens)} special token(s); "
            f"ask for at least {256 + len(special_tokens)}"
        )
    library = _library()
    tokenizer = library.Tokenizer.from_str(byte_level_json([], PATTERNS[pattern], {}).decode())
    trainer = library.trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=min_frequency,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(tokenizer, (part for text in texts for part in _without_long_words(encodable(text))), trainer)
    found = [_pair(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    specials = {name: 256 + len(found) + i for i, name in enumerate(special_tokens)}
    return JsonTokenizer(byte_level_json(found, PATTERNS[pattern], specials), "the trained tokenizer")


def _without_long_words(text: str) -> Iterator[str]:
    """The text in parts. It is divided only inside words of more than WORD characters, which are rare."""
    import regex  # a dependency of tiktoken, too

    start = 0
    blocks = (text[at : at + WORD // 2] for at in range(0, len(text) - WORD // 2 + 1, WORD // 2))
    if not any(len(block.split(maxsplit=1)) < 2 for block in blocks):  # no word can be that long: nearly every text
        yield text
        return
    for run in _LONG_RUN.finditer(text):  # a word has white space only at its ends, or consists of it
        for word in regex.finditer(_KINDS, text, pos=run.start(), endpos=run.end()):
            for cut in range(word.start() + WORD, word.end(), WORD):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _train(tokenizer: Any, texts: Iterable[str], trainer: Any) -> None:
    """Trains in another thread, because the library ignores signals: Ctrl-C ends the wait, and with it the process."""
    failed: list[BaseException] = []

    def train() -> None:
        try:
            tokenizer.train_from_iterator(texts, trainer)
        except BaseException as e:  # raised again by the waiting thread
            failed.append(e)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]
