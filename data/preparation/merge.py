"""From units to shards: concatenates the tokens of all units in order, divides them into shards, and hashes each."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import IO, Any

import numpy as np

from data.errors import DataError
from data.preparation import encode, losses
from data.preparation.input_errors import InputErrors
from data.preparation.output import MERGED, read_note, start_again
from data.storage import files
from data.token_files import formats

SHARD_TOKENS = 100_000_000
COPY_TOKENS = 1 << 22  # tokens in memory at a time
NOTE_UNITS = 8  # units between two records of the progress: some 64 MiB of text


class _SplitWriter:
    """Writes one split: shards, and where each document begins.

    Args:
      written: what `state` returned, to resume from there; None: start a new split.
    """

    def __init__(self, folder: pathlib.Path, split: str, job: encode.Job, written: dict[str, Any] | None = None):
        self.folder = folder
        self.split = split
        self.job = job
        self.shards: list[formats.Shard] = []
        self.tokens = self.text_bytes = self.documents = self.longest = 0
        self._begin = 0  # the first token of the document that is being written
        self._file: IO[bytes]
        offsets = folder / f"{split}.documents.bin"
        if written is None:
            self._offsets: IO[bytes] = offsets.open("wb")
            self._open_shard()
            return
        self.shards = [formats.Shard(*shard) for shard in written["shards"]]
        self.tokens, self.text_bytes, self.documents, self.longest, self._begin = written["counts"]
        self._offsets = _opened_at(offsets, self.documents * 8)
        self._path = self._shard_path()
        self._shard_tokens = self.tokens - sum(shard.tokens for shard in self.shards)
        self._file = _opened_at(self._path, self._shard_tokens * self.job.dtype.itemsize)
        with self._path.open("rb") as f:
            self._sha256 = hashlib.file_digest(f, "sha256")
        if self._sha256.hexdigest() != written["sha256"]:
            raise DataError(f"{self._path} has changed; {start_again(folder)}")

    def state(self) -> dict[str, Any]:
        """Syncs the files to disk, and returns what is needed to resume from here."""
        for file in (self._offsets, self._file):
            file.flush()
            os.fsync(file.fileno())
        counts = [self.tokens, self.text_bytes, self.documents, self.longest, self._begin]
        shards = [dataclasses.astuple(shard) for shard in self.shards]
        return {"shards": shards, "counts": counts, "sha256": self._sha256.hexdigest()}

    def _shard_path(self) -> pathlib.Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.bin"

    def _open_shard(self) -> None:
        self._path = self._shard_path()
        self._file = self._path.open("wb")
        self._sha256 = hashlib.sha256()
        self._shard_tokens = 0

    def _close_shard(self) -> None:
        files.close_durably(self._file)
        self.shards.append(formats.Shard(self._path.name, self._shard_tokens, self._sha256.hexdigest()))

    def unit(self, tokens: pathlib.Path, ends: np.ndarray, text_bytes: int) -> None:
        """Appends the tokens of a unit's file; `ends` are the ends of documents, from the unit's first token."""
        begins = np.concatenate([[self._begin], ends + self.tokens])
        if len(ends):
            begins[:-1].astype("<u8").tofile(self._offsets)
            self.documents += len(ends)
            self.longest = max(self.longest, int(np.diff(begins).max()))
            self._begin = int(begins[-1])
        self.text_bytes += text_bytes
        with tokens.open("rb") as f:
            while len(ids := np.fromfile(f, self.job.unit_dtype, min(COPY_TOKENS, SHARD_TOKENS - self._shard_tokens))):
                raw = ids.astype(self.job.dtype, copy=False).data
                self._file.write(raw)
                self._sha256.update(raw)
                self.tokens += len(ids)
                self._shard_tokens += len(ids)
                if self._shard_tokens == SHARD_TOKENS:
                    self._close_shard()
                    self._open_shard()

    def close(self) -> formats.Split:
        if self.tokens > self._begin:  # the splits divide the last document
            np.array([self._begin], "<u8").tofile(self._offsets)
            self.documents += 1
            self.longest = max(self.longest, self.tokens - self._begin)
        files.close_durably(self._offsets)
        if self._shard_tokens or not self.shards:
            self._close_shard()
        else:  # the last shard was filled exactly
            self._file.close()
            self._path.unlink()
        return formats.Split(self.tokens, self.text_bytes, self.documents, tuple(self.shards))


def _opened_at(path: pathlib.Path, size: int) -> IO[bytes]:
    """Opens a file to append after its first `size` bytes; later bytes, left by a killed preparation, are removed."""
    file = path.open("r+b" if size else "wb")
    if os.fstat(file.fileno()).st_size < size:
        raise DataError(f"{path} is shorter than recorded; {start_again(path.parent)}")
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


class Merge:
    """Writes the shards and document offsets of both splits into `partial`, unit by unit in order.

    Units may be added in any order; each is appended when all units before it have been. Every NOTE_UNITS units, the
    progress is recorded and the files of the appended units are removed, so the tokens of a corpus take disk space only
    once. A later Merge of the same folder resumes from the recorded progress.

    Attributes:
      next: the unit to append next; all units before it are done.
      tokens: the number of tokens in the appended units.
    """

    def __init__(self, partial: pathlib.Path, job: encode.Job):
        self.partial = partial
        self.job = job
        state: dict[str, Any] = {"next": 0, "writers": {}, "problems": InputErrors().to_json()}
        if (partial / MERGED).exists():
            state = read_note(partial / MERGED)
        try:
            writers = {split: state["writers"].get(split) for split in encode.SPLITS}
            self.writers = {split: _SplitWriter(partial, split, job, written) for split, written in writers.items()}
            self.errors = InputErrors.from_json(state["problems"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{partial / MERGED} is damaged; {start_again(partial)}") from None
        self._waiting: dict[int, dict] = {}
        self.next = self._noted = state["next"]

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def add(self, index: int, result: dict) -> None:
        """Adds unit `index`; `result` is what encode_unit returned."""
        self._waiting[index] = result
        while self.next in self._waiting:
            self._append(self._waiting.pop(self.next))
            self.next += 1
            if self.next - self._noted >= NOTE_UNITS:
                self._note()

    def _append(self, result: dict) -> None:
        self.errors.add(InputErrors.from_json(result["problems"]))
        for split, writer in self.writers.items():
            ends = np.fromfile(self._unit(self.next, f".{split}.ends"), "<u8").astype(np.int64)
            writer.unit(self._unit(self.next, f".{split}.tokens"), ends, result["text_bytes"][split])

    def _unit(self, index: int, suffix: str) -> pathlib.Path:
        return self.partial / "units" / f"{index:06d}{suffix}"

    def _note(self) -> None:
        writers = {split: writer.state() for split, writer in self.writers.items()}
        state = {"next": self.next, "writers": writers, "problems": self.errors.to_json()}
        files.write_durably(self.partial / MERGED, json.dumps(state).encode())
        for index in range(self._noted, self.next):
            for suffix in (".json", *(f".{split}.{what}" for split in encode.SPLITS for what in ("ends", "tokens"))):
                self._unit(index, suffix).unlink()
        self._noted = self.next

    def finish(self) -> tuple[dict[str, formats.Split], dict[str, Any]]:
        """Closes the files; returns the manifest's splits, and the summary: counts, longest document, errors."""
        assert not self._waiting
        splits = {split: writer.close() for split, writer in self.writers.items()}
        tokens, text_bytes = (sum(getattr(s, what) for s in splits.values()) for what in ("tokens", "text_bytes"))
        summary: dict[str, Any] = {
            "documents": sum(s.documents for s in splits.values()),
            "tokens": tokens,
            "bytes_per_token": text_bytes / tokens if tokens else None,
            "longest_document_tokens": max(w.longest for w in self.writers.values()),
            "loses_text": any(self.errors.counts[kind] for kind in losses.LOSSES),
            "problems": self.errors.summary(),
        }
        if self.job.hashes:
            summary["duplicates"] = _duplicates(self.partial, self.next)
        return splits, summary


def _duplicates(partial: pathlib.Path, num_units: int) -> int:
    """The number of documents whose text occurred before. Needs at least 16 bytes of memory for each document."""
    stems = (partial / "units" / f"{index:06d}" for index in range(num_units))
    found = [np.fromfile(stem.with_suffix(".hashes"), "<u8") for stem in stems]
    chunks = np.concatenate([np.empty(0, "<u8"), *found]).reshape(-1, 2)
    complete = chunks[:, 1] == 3
    long, held = [], b""
    for chunk, ends in chunks[~complete].tolist():  # equal texts have equal chunks
        held += chunk.to_bytes(8, "little")
        if ends & 2:
            long.append(int.from_bytes(hashlib.blake2b(held, digest_size=8).digest(), "little"))
            held = b""
    hashes = np.concatenate([chunks[complete, 0], np.array(long, "<u8")])
    return len(hashes) - len(np.unique(hashes))
