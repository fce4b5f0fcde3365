"""What a worker does: one unit of a corpus surveyed (characters counted) or encoded (tokens into files of their own).

A unit's files, in PARTIAL/units/: I.train.tokens and I.val.tokens; I.train.ends and I.val.ends (uint64: where, in the
tokens of this unit, each document ends that ends here); I.hashes (uint64, when asked for); and I.json, which is
written last: where it is, the unit is done.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from data import characters, documents, files, formats, tokenizers
from data.errors import DataError

VERSION = 2  # of the unit files; a preparation does not go on with another version's
SPLITS = ("train", "val")
BATCH_CHARACTERS = 1 << 20  # encoded in one call


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for every unit.

    `split`: 'file' (each stretch names its own), 'document' (a hash of the text below val_fraction is validation) or
    'last' (characters from `cut` on are validation).
    """

    partial: pathlib.Path
    reading: documents.Reading
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    split: str
    val_fraction: float
    cut: int = 0
    hashes: bool = False  # of documents, to count duplicates

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens of a shard."""
        return np.dtype(formats.token_dtype(self.vocab_size)).newbyteorder("<")

    @property
    def unit_dtype(self) -> np.dtype:
        """Of the tokens of a unit: as narrow as they fit, for the disk is what a preparation waits for."""
        return np.dtype(np.uint8) if self.vocab_size <= 256 else self.dtype


@dataclasses.dataclass(frozen=True)
class Survey:
    characters: int
    code_points: np.ndarray  # the distinct ones, uint32
    counts: np.ndarray  # how often each occurs, int64


def survey(unit: documents.Unit, reading: documents.Reading, index: int) -> Survey:
    """Counts the characters of unit `index` (bytes where reading.raw)."""
    counts = np.zeros(tokenizers.CODE_POINTS, np.int64)
    texts = (part for stretch in unit for part in documents.read(stretch, reading, documents.Problems()))
    for batch in _batches(("", text, ends) for text, ends in texts):  # many small documents cost as much as one
        if reading.raw:
            raw = b"".join(text for _, text, _ in batch if isinstance(text, bytes))
            counts[:256] += characters.byte_counts(np.frombuffer(raw, np.uint8))
        else:
            characters.count("".join(text for _, text, _ in batch if isinstance(text, str)), counts)
    found = np.flatnonzero(counts)
    return Survey(int(counts.sum()), found.astype(np.uint32), counts[found])


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: pathlib.Path, sha256: str) -> tokenizers.Tokenizer:
    return tokenizers.load(folder, sha256)


def encode(index: int, unit: documents.Unit, first_character: int, job: Job) -> dict:
    """Writes a unit's files and returns what its .json holds. `first_character`: characters in the units before it.

    Raises:
      DataError: the unit cannot be read, or there is no room for the files.
    """
    stem = job.partial / "units" / f"{index:06d}"
    problems = documents.Problems()
    codec = _tokenizer(job.partial / "tokenizer", job.tokenizer_sha256)
    try:
        outputs = {split: _Output(stem, split, job) for split in SPLITS}
        hashes: list[int] = []
        for batch in _batches(_parts(unit, first_character, job, problems, hashes)):
            for (split, text, ends), ids in zip(batch, _encode_batch(codec, batch), strict=True):
                outputs[split].add(ids, len(text) if text.isascii() else len(_utf8(text)), ends)
        for output in outputs.values():
            output.close()
        if job.hashes:
            files.write_durably(stem.with_suffix(".hashes"), np.array(hashes, "<u8").tobytes())
        result = {
            "tokens": {split: output.tokens for split, output in outputs.items()},
            "text_bytes": {split: output.text_bytes for split, output in outputs.items()},
            "problems": problems.to_json(),
        }
        files.write_durably(stem.with_suffix(".json"), json.dumps(result).encode())
    except OSError as e:
        raise DataError(
            f"cannot write {stem.parent}: {e.strerror}; make room, then start the same command again"
        ) from None
    return result


def finished(partial: pathlib.Path, index: int) -> dict | None:
    """What `encode` returned for a unit that is done; None where it is not."""
    path = partial / "units" / f"{index:06d}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def _encode_batch(codec: tokenizers.Tokenizer, batch: list["Part"]) -> list[np.ndarray]:
    texts = [text for _, text, _ in batch if isinstance(text, str)]
    if texts:
        return codec.encode_batch(texts)
    # The byte tokenizer alone reads raw, and always.
    return [tokenizers.ByteTokenizer.encode_bytes(text) for _, text, _ in batch if isinstance(text, bytes)]


Part = tuple[str, str | bytes, bool]  # split, text, whether a document ends with it


def _parts(
    unit: documents.Unit, character: int, job: Job, problems: documents.Problems, hashes: list[int]
) -> Iterator[Part]:
    """The texts of a unit with their splits; a text across the cut becomes two."""
    for stretch in unit:
        whole = stretch.start == 0 or stretch.file.kind != "text"  # else the rest of a document begun before
        for text, ends in documents.read(stretch, job.reading, problems):
            if job.hashes and whole and ends:
                hashes.append(_hash(text))
            whole = ends
            if job.split == "last":
                before = min(max(job.cut - character, 0), len(text))
                character += len(text)
                if not text:  # the end of a text of which all was given before
                    yield "train" if character <= job.cut else "val", text, ends
                if text[:before]:
                    yield "train", text[:before], ends and before == len(text)
                if text[before:]:
                    yield "val", text[before:], ends
            elif job.split == "document":
                # A file of text is one document that may come in several parts, so its name decides.
                key = stretch.file.name if stretch.file.kind == "text" else text
                yield "val" if _hash(key) < job.val_fraction * 2**64 else "train", text, ends
            else:
                assert stretch.split is not None
                yield stretch.split, text, ends


def _utf8(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _hash(text: str | bytes) -> int:
    return int.from_bytes(hashlib.blake2b(_utf8(text), digest_size=8).digest(), "little")


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


class _Output:
    """One split of a unit."""

    def __init__(self, stem: pathlib.Path, split: str, job: Job):
        self.stem, self.split, self.eos_id = stem, split, job.eos_id
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
