"""Makes tokenizers from a spec, saves them into a folder, and loads them from it. Nothing is ever unpickled.

A spec is `char` or `bpe:16384` (or `bpe:16384:llama3`, with another pattern), which are made from text; or `byte`; or
the path of an existing tokenizer, whose kind is detected from its content and not from its name.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from data.errors import DataError
from data.storage import files
from data.tokenizers import hf_json, minbpe
from data.tokenizers.base import (
    END_OF_TEXT,
    END_OF_TEXT_NAMES,
    MAX_ID,
    Tokenizer,
    check_special_tokens,
    find_eos,
    parse_json,
)
from data.tokenizers.characters import CODE_POINTS, UNKNOWN, ByteTokenizer, CharTokenizer, code_points
from data.tokenizers.hf_json import JsonTokenizer, train_bpe
from data.tokenizers.minbpe import MinbpeTokenizer
from data.tokenizers.sentencepiece_file import PieceTokenizer
from data.tokenizers.tiktoken_file import RankTokenizer

__all__ = [
    "CODE_POINTS",
    "END_OF_TEXT",
    "FILE_NAME",
    "KINDS",
    "UNKNOWN",
    "ByteTokenizer",
    "CharTokenizer",
    "JsonTokenizer",
    "Tokenizer",
    "code_points",
    "file_of",
    "in_folder",
    "load",
    "make",
    "needs_texts",
    "save",
]

KINDS: dict[str, type[ByteTokenizer] | type[CharTokenizer]] = {t.kind: t for t in (CharTokenizer, ByteTokenizer)}
FileTokenizer = JsonTokenizer | MinbpeTokenizer | RankTokenizer | PieceTokenizer  # these have a standard file
FILE_KINDS: dict[str, type[FileTokenizer]] = {
    t.kind: t for t in (JsonTokenizer, MinbpeTokenizer, RankTokenizer, PieceTokenizer)
}
FILE_NAME = "meshlm_tokenizer.json"
# File names of tokenizers in the folder of another system's model, in order of preference.
STANDARD_NAMES = (hf_json.FILE_NAME, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MAX_BYTES = 1 << 30
EXPECTED = (
    "expected a tokenizer.json, a .tiktoken file, a minbpe .model, a SentencePiece .model, a folder with one of them "
    "or a dataset; or char, byte, bpe:16384"
)
# Files that users name by mistake, recognised by their first bytes.
MISTAKEN = (
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "an image"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never opened"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "compressed; unpack it first"),
    (rb"(?s).{8}\{\"", "safetensors: a model's weights"),
    (rb"GGUF", "a GGUF model"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page: the download was not the file itself"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself with git lfs pull"),
)


def needs_texts(spec: str) -> bool:
    """Whether a tokenizer of this spec is made from text (char, bpe:N). Raises DataError for a malformed bpe spec."""
    return spec == "char" or _bpe(spec) is not None


def make(
    spec: str,
    texts: Iterable[str] | None = None,
    *,
    special_tokens: Sequence[str] = (),
    min_frequency: int = 1,
    eos: bool = False,
) -> Tokenizer:
    """The tokenizer of a spec.

    Args:
      texts: the texts from which char and bpe:N are made.
      special_tokens: the special tokens of a new tokenizer. A tokenizer from a file keeps its own special tokens: each
        name here must be one of them, and the first becomes the end-of-text token (a dataset keeps its own).
      min_frequency: char: rarer characters become <unk>; bpe: rarer pairs are not merged.
      eos: whether an end-of-text token follows each document. char and byte then get <eos>, BPE always has
        <|endoftext|> (or a known name among special_tokens); a tokenizer from a file must have an end-of-text token.

    Raises:
      DataError: the tokenizer does not exist, is damaged, or lacks the requested special tokens.
    """
    names = list(special_tokens)
    check_special_tokens(names)
    trained = _bpe(spec)
    if spec not in KINDS and trained is None:
        return _from_path(spec, names, eos)
    if trained and not find_eos(names):  # always, because the tokenizer may be used on other documents
        names.append(END_OF_TEXT_NAMES[0])
    elif eos and not trained and END_OF_TEXT not in names:
        names.append(END_OF_TEXT)
    if spec == "byte":
        return ByteTokenizer(names)
    if texts is None:
        raise DataError(f"a {spec} tokenizer must be trained on text; name an existing tokenizer or dataset instead")
    if trained:
        size, pattern = trained
        return train_bpe(texts, size, pattern=pattern, special_tokens=names, min_frequency=min_frequency)
    return CharTokenizer.train(texts, min_frequency=min_frequency, special_tokens=names)


def in_folder(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer in the folder of a model of another system; None if the folder has none. Raises DataError."""
    there = any((folder / name).exists() for name in STANDARD_NAMES)
    return make(str(folder)) if there else None


def _bpe(spec: str) -> tuple[int, str] | None:
    """(vocabulary size, pattern) of bpe:N[:PATTERN]; None for a spec of another kind."""
    kind, _, rest = spec.partition(":")
    if kind != "bpe":
        return None
    size, _, pattern = rest.partition(":")
    pattern = pattern or "gpt2"
    if not re.fullmatch(r"[1-9][0-9]{2,7}", size) or int(size) > MAX_ID + 1 or pattern not in hf_json.PATTERNS:
        raise DataError(
            f"tokenizer {spec!r} is not bpe:N or bpe:N:PATTERN, such as bpe:16384, with a vocabulary of 256 to "
            f"{MAX_ID + 1} and one of the patterns {', '.join(hf_json.PATTERNS)}"
        )
    return int(size), pattern


def file_of(spec: str) -> pathlib.Path | None:
    """The file of an existing tokenizer; None if the spec makes a new one. Raises DataError if the file is missing."""
    return None if spec in KINDS or needs_texts(spec) else _located(spec)[0]


def _located(spec: str) -> tuple[pathlib.Path, str]:
    """The file of a spec, and the pattern after its name. Raises DataError."""
    path = pathlib.Path(spec)
    if path.is_dir():
        for folder in (path, path / "tokenizer"):
            if (folder / FILE_NAME).exists():
                return folder / FILE_NAME, ""
        found = [path / name for name in STANDARD_NAMES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path} does not contain a tokenizer; {EXPECTED}")
        path = found[0]
    pattern = ""
    if not path.exists() and ":" in spec:
        name, _, pattern = spec.rpartition(":")
        path = pathlib.Path(name)
    if not path.is_file():
        raise DataError(f"there is no tokenizer {spec}; {EXPECTED}")
    return path, pattern


def _from_path(spec: str, names: list[str], eos: bool) -> Tokenizer:
    path, pattern = _located(spec)
    if path.name == FILE_NAME and pathlib.Path(spec).is_dir():
        return _with_specials(load(path.parent), str(path), names, eos)
    raw = _read(path)
    kind, wanted = FILE_KINDS[_kind(raw, path)], names[0] if names else None
    if issubclass(kind, RankTokenizer):
        tokenizer: Tokenizer = kind(raw, str(path), wanted, pattern)
    elif pattern:
        raise DataError(f"{path} is a {kind.kind} file; only a .tiktoken file takes a pattern, such as :{pattern}")
    else:
        tokenizer = kind(raw, str(path), wanted)
    return _with_specials(tokenizer, str(path), names, eos)


def _with_specials(tokenizer: Tokenizer, where: str, names: list[str], eos: bool) -> Tokenizer:
    """`tokenizer`, if it has the requested special tokens. Raises DataError otherwise."""
    if unknown := [name for name in names if name not in tokenizer.special_tokens]:
        known = ", ".join(tokenizer.special_tokens[:10]) or "none"
        raise DataError(
            f"{where} has no special token {unknown[0]!r}, and an existing tokenizer keeps its own: {known}"
        )
    if eos and tokenizer.eos_id is None:
        known = ", ".join(tokenizer.special_tokens[:10])
        raise DataError(
            f"{where} has no end-of-text token to put after each document (such as {END_OF_TEXT_NAMES[0]}, </s>); "
            + (f"name the one to use with --special_tokens, of: {known}" if known else "choose another tokenizer")
        )
    return tokenizer


def _read(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is {path.stat().st_size:,} bytes, too large for a tokenizer; {EXPECTED}")
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


def _kind(raw: bytes, path: pathlib.Path) -> str:
    """The key in FILE_KINDS of a file, by its content. Raises DataError."""
    if not raw:
        raise DataError(f"{path} is empty; {EXPECTED}")
    for pattern, what in MISTAKEN:
        if re.match(pattern, raw):
            raise DataError(f"{path} is {what}; {EXPECTED}")
    if raw.lstrip()[:1] == b"{":
        spec = parse_json(raw, str(path))
        if "model" not in spec:
            raise DataError(f'{path} is JSON, but not a tokenizer.json: it has no "model"; {EXPECTED}')
        return JsonTokenizer.kind
    if raw.startswith(minbpe.FIRST_LINE.encode()):
        return MinbpeTokenizer.kind
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?(\n|$)", raw):
        return RankTokenizer.kind
    if re.match(rb"(?s)\n.{1,3}\n", raw):  # protobuf: the first piece, which contains its text
        return PieceTokenizer.kind
    raise DataError(f"{path} is not a tokenizer of a known kind; {EXPECTED}")


def save(tokenizer: Tokenizer, folder: pathlib.Path) -> pathlib.Path:
    """Writes meshlm_tokenizer.json and the tokenizer's standard file into `folder`; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, file = tokenizer.to_json(), tokenizer.file()
    if file is not None:
        name, raw = file
        files.write_durably(folder / name, raw)
        spec |= {"file": name, "sha256": hashlib.sha256(raw).hexdigest()}
    path = folder / FILE_NAME
    files.write_durably(path, json.dumps(spec, indent=1).encode())
    return path


def load(folder: pathlib.Path, sha256: str = "") -> Tokenizer:
    """Reads what `save` wrote.

    Args:
      sha256: the hash that meshlm_tokenizer.json must have; '': any. The hash of the other file is always checked.

    Raises:
      DataError: a file is missing, is not a tokenizer, or differs from the saved one.
    """
    path = folder / FILE_NAME
    try:
        raw = path.read_bytes()
        if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
            raise DataError(f"{path} is not the tokenizer of the dataset; prepare it again (--overwrite)")
        spec = json.loads(raw.decode("utf-8"))
        if "file" not in spec:
            return KINDS[spec["kind"]].from_json(spec)
        return _load_file(folder / pathlib.PurePath(spec["file"]).name, spec)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise DataError(f"{e.filename} is missing: the tokenizer that belongs to the dataset or run") from None
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{path} is not a meshlm tokenizer file: {e!r}") from None


def _load_file(path: pathlib.Path, spec: dict[str, Any]) -> Tokenizer:
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != spec["sha256"]:
        raise DataError(
            f"{path} was changed after it was saved; restore it, or prepare the dataset again (--overwrite)"
        )
    return FILE_KINDS[spec["kind"]].from_json(spec, raw, str(path))
