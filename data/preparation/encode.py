"""A worker's task: to survey one unit of a corpus (count its characters) or to encode it (into token files).

The files of unit I in PARTIAL/units/: I.train.tokens and I.val.tokens; I.train.ends and I.val.ends (uint64: the end of
each document that ends in this unit, in the tokens of the unit); I.hashes (if requested; see parts.py); and I.json,
which is written last: the unit is done when this file exists.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import IO, TypeVar

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.preparation import documents
from data.preparation.input_errors import InputErrors
from data.preparation.losses import Losses
from data.preparation.parts import NO_SEAM, Part, Splitting, parts_of_unit
from data.storage import files
from data.token_files import formats
from data.tokenizers import characters

VERSION = 4  # of the unit files; a preparation does not resume from files of another version
SPLITS = ("train", "val")
BATCH_CHARACTERS = 1 << 18  # about this many are encoded in one call


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that are the same for every unit.

    `split`: 'file' (each span names its split), 'document' (a document is for validation if a hash of its text is below
    val_fraction) or 'last' (characters from number `cut` on are for validation).
    """

    partial: pathlib.Path
    options: documents.ReadOptions
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    split: str
    val_fraction: float
    cut: int = 0
    hashes: bool = False  # write hashes of documents, to count duplicates

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tokens in a shard."""
        return np.dtype(formats.token_dtype(self.vocab_size)).newbyteorder("<")

    @property
    def unit_dtype(self) -> np.dtype:
        """The dtype of the tokens in a unit's files: as narrow as possible, because the disk limits a preparation."""
        return np.dtype(np.uint8) if self.vocab_size <= 256 else self.dtype


@dataclasses.dataclass(frozen=True)
class Survey:
    characters: int
    code_points: np.ndarray  # the distinct code points, uint32
    counts: np.ndarray  # how often each occurs, int64


def survey_unit(unit: documents.WorkUnit, options: documents.ReadOptions, index: int) -> Survey:
    """Counts the characters of unit `index` (bytes if options.raw)."""
    counts = np.zeros(tokenizers.CODE_POINTS, np.int64)
    chunks = (chunk for span in unit for chunk in documents.read_chunks(span, options, InputErrors()))
    for batch in _batches(chunks):  # joined, because a call costs about the same for one small document as for many
        if options.raw:
            raw = b"".join(chunk.text for chunk in batch if isinstance(chunk.text, bytes))
            counts[:256] += characters.byte_counts(np.frombuffer(raw, np.uint8))
        else:
            characters.count("".join(chunk.text for chunk in batch if isinstance(chunk.text, str)), counts)
    found = np.flatnonzero(counts)
    return Survey(int(counts.sum()), found.astype(np.uint32), counts[found])


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: pathlib.Path, sha256: str) -> tokenizers.Tokenizer:
    return tokenizers.load(folder, sha256)


def encode_unit(index: int, unit: documents.WorkUnit, first_character: int, job: Job) -> dict:
    """Writes a unit's files and returns the content of its .json.

    Args:
      first_character: the number of characters in the units before this one.

    Raises:
      DataError: the unit cannot be read, or the disk is full.
    """
    stem = job.partial / "units" / f"{index:06d}"
    errors = InputErrors()
    codec = _tokenizer(job.partial / "tokenizer", job.tokenizer_sha256)
    try:
        outputs = {split: _Output(stem, split, job) for split in SPLITS}
        hashes: list[tuple[int, int]] | None = [] if job.hashes else None
        losses = Losses(codec, errors)
        splitting = Splitting(job.split, job.val_fraction, job.cut)
        texts = parts_of_unit(
            unit, first_character, splitting, options=job.options, codec=codec, errors=errors, hashes=hashes
        )
        for batch in _batches(texts):
            for part, ids in zip(batch, _encode_batch(codec, batch, errors), strict=True):
                losses.look(part, ids)
                outputs[part.split].add(ids, _utf8_bytes(part.text), part.ends)
        for output in outputs.values():
            output.close()
        if hashes is not None:
            files.write_durably(stem.with_suffix(".hashes"), np.array(hashes, "<u8").tobytes())
        result = {
            "tokens": {split: output.tokens for split, output in outputs.items()},
            "text_bytes": {split: output.text_bytes for split, output in outputs.items()},
            "sizes": {split: _sizes(stem, split) for split in SPLITS},
            "problems": errors.to_json(),
        }
        files.write_durably(stem.with_suffix(".json"), json.dumps(result).encode())
    except OSError as e:
        raise DataError(
            f"cannot write {stem.parent}: {e.strerror}; make room, then run the same command again"
        ) from None
    return result


def _utf8_bytes(text: str | bytes) -> int:
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode())


def finished_unit(job: Job, index: int) -> dict | None:
    """What encode_unit returned for a unit; None if the unit is not done, or its files were changed."""
    stem = job.partial / "units" / f"{index:06d}"
    try:
        result = json.loads(stem.with_suffix(".json").read_bytes())
        same = all(_sizes(stem, split) == result["sizes"][split] for split in SPLITS)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result if same else None


def _sizes(stem: pathlib.Path, split: str) -> list[int]:
    """The sizes of a unit's files, in bytes."""
    return [stem.with_suffix(f".{split}.{what}").stat().st_size for what in ("tokens", "ends")]


def _encode_batch(codec: tokenizers.Tokenizer, batch: list[Part], errors: InputErrors) -> list[np.ndarray]:
    texts = [(part.left.before if part.left else "") + part.text for part in batch if isinstance(part.text, str)]
    if not texts:  # the parts are raw bytes, which only the byte tokenizer reads
        return [tokenizers.ByteTokenizer.encode_bytes(part.text) for part in batch if isinstance(part.text, bytes)]
    rows = []
    for part, ids in zip(batch, codec.encode_batch(texts), strict=True):
        row = part.left.take(ids) if part.left else ids
        same = row is not None
        if row is None:  # the seam fails: encode the text by itself, as if it began a document
            row = codec.encode(str(part.text))
        if not same or (part.right and not part.right.ends(row)):
            errors.record(NO_SEAM, f"{part.path} ({part.text[:40]!r} …)")
        rows.append(row)
    return rows


T = TypeVar("T", documents.Chunk, Part)


def _batches(parts: Iterator[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


class _Output:
    """The files of one split of a unit."""

    def __init__(self, stem: pathlib.Path, split: str, job: Job):
        self.stem = stem
        self.split = split
        self.eos_id = job.eos_id
        self.dtype = job.unit_dtype
        self.file: IO[bytes] = self._path("tokens").open("wb")
        self.tokens = self.text_bytes = 0
        self.ends: list[int] = []

    def _path(self, what: str) -> pathlib.Path:
        return self.stem.with_suffix(f".{self.split}.{what}")

    def add(self, ids: np.ndarray, text_bytes: int, ends: bool) -> None:
        self.file.write(ids.astype(self.dtype).data)
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        if ends:
            if self.eos_id is not None:
                self.file.write(np.array([self.eos_id], self.dtype).tobytes())
                self.tokens += 1
            self.ends.append(self.tokens)

    def close(self) -> None:
        files.close_durably(self.file)
        files.write_durably(self._path("ends"), np.array(self.ends, "<u8").tobytes())
