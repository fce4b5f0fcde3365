"""Units to shards: the tokens of all units in the order of the plan, cut into shards, hashed on the way."""

import hashlib
import pathlib
from typing import IO, Any

import numpy as np

from data import documents, encode, files, formats

SHARD_TOKENS = 100_000_000
COPY_TOKENS = 1 << 22  # held in memory


class _SplitWriter:
    """Writes one split: shards, and where each document begins."""

    def __init__(self, folder: pathlib.Path, split: str, job: encode.Job):
        self.folder, self.split, self.job = folder, split, job
        self.shards: list[formats.Shard] = []
        self.tokens = self.text_bytes = self.documents = self.longest = 0
        self._begin = 0  # of the document that is being written
        self._offsets: IO[bytes] = (folder / f"{split}.documents.bin").open("wb")
        self._open_shard()

    def _open_shard(self) -> None:
        self._path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
        self._file: IO[bytes] = self._path.open("wb")
        self._sha256, self._shard_tokens = hashlib.sha256(), 0

    def _close_shard(self) -> None:
        files.close_durably(self._file)
        self.shards.append(formats.Shard(self._path.name, self._shard_tokens, self._sha256.hexdigest()))

    def unit(self, tokens: pathlib.Path, ends: np.ndarray, text_bytes: int) -> None:
        """Appends the tokens of a file; `ends`, relative to its first, are where documents end."""
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
        if self.tokens > self._begin:  # cut off by the split: a document without an end
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


class Merge:
    """Writes the shards and document offsets of both splits into `partial`, unit by unit in the order of the plan.

    Units may be added in any order: each is appended when those before it have been.
    """

    def __init__(self, partial: pathlib.Path, job: encode.Job):
        self.partial, self.job = partial, job
        self.writers = {split: _SplitWriter(partial, split, job) for split in encode.SPLITS}
        self.problems = documents.Problems()
        self._waiting: dict[int, dict] = {}
        self._next = 0

    def add(self, index: int, result: dict) -> None:
        """`result`: what encode.encode returned for unit `index`."""
        self._waiting[index] = result
        while self._next in self._waiting:
            self._append(self._waiting.pop(self._next))
            self._next += 1

    def _append(self, result: dict) -> None:
        stem = self.partial / "units" / f"{self._next:06d}"
        self.problems.add(documents.Problems(**result["problems"]))
        for split, writer in self.writers.items():
            ends = np.fromfile(stem.with_suffix(f".{split}.ends"), "<u8").astype(np.int64)
            writer.unit(stem.with_suffix(f".{split}.tokens"), ends, result["text_bytes"][split])

    def finish(self) -> tuple[dict[str, formats.Split], dict[str, Any]]:
        """The splits of the manifest; the summary: documents, tokens, bytes per token, longest document, problems."""
        assert not self._waiting
        splits = {split: writer.close() for split, writer in self.writers.items()}
        tokens, text_bytes = (sum(getattr(s, what) for s in splits.values()) for what in ("tokens", "text_bytes"))
        summary: dict[str, Any] = {
            "documents": sum(s.documents for s in splits.values()),
            "tokens": tokens,
            "bytes_per_token": text_bytes / tokens if tokens else None,
            "longest_document_tokens": max(w.longest for w in self.writers.values()),
            "problems": self.problems.to_json(),
        }
        if self.job.hashes:
            summary["duplicates"] = _duplicates(self.partial, self._next)
        return splits, summary


def _duplicates(partial: pathlib.Path, num_units: int) -> int:
    """Documents whose text occurred before; 8 bytes of memory for each document."""
    stems = (partial / "units" / f"{index:06d}" for index in range(num_units))
    hashes = np.concatenate([np.fromfile(stem.with_suffix(".hashes"), "<u8") for stem in stems])
    return len(hashes) - len(np.unique(hashes))
