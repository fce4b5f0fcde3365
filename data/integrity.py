"""Every byte of a dataset, read once and compared with what is said of it, in constant memory."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from data import content, foreign, formats
from data.dataset import Dataset
from data.errors import DataError

CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one split."""

    nbytes: int  # that were read
    largest_id: int  # -1 without a token


def verify(data: Dataset) -> dict[str, Found]:
    """Reads all splits whole. Hashes of a dataset folder, ids of any data, document offsets, the tokenizer.

    The sizes and headers of foreign files were compared when they were opened; of their content nothing is said.

    Raises:
      DataError: the first damage that is met, with the file and both numbers.
    """
    try:
        data.load_tokenizer()
        if data.foreign_files:
            return {name: _foreign(files, data.vocab_size) for name, files in data.foreign_files.items()}
        folder = pathlib.Path(data.path)
        return {name: _split(folder, data.manifest, name) for name in data.manifest.splits}
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read: {e.strerror}") from None


def _foreign(files: list[foreign.TokenFile], vocab_size: int) -> Found:
    largest = -1
    for file, found in zip(files, content.contents(files, whole=True), strict=True):
        content.check(file, found, file.dtype, vocab_size)
        largest = max(largest, found.largest_id)
    return Found(sum(f.nbytes for f in files), largest)


def _split(folder: pathlib.Path, manifest: formats.Manifest, name: str) -> Found:
    spec = manifest.splits[name]
    formats.TokenFiles(folder, manifest, name)  # sizes, and hashes of a small split: cheap things first
    dtype, largest, nbytes = np.dtype(manifest.dtype).newbyteorder("<"), -1, 0
    for shard in spec.shards:
        path, digest = folder / shard.file, hashlib.sha256()
        for raw in _chunks(path):
            digest.update(raw)
            nbytes += len(raw)
            largest = max(largest, int(np.frombuffer(raw, dtype).max()))
        if digest.hexdigest() != shard.sha256:
            raise DataError(
                f"{path} has the right size but not the content its manifest names (sha256 {digest.hexdigest()[:12]}…, "
                f"expected {shard.sha256[:12]}…); copy it again or prepare again with --overwrite"
            )
        _check_largest(largest, path, manifest.vocab_size)
    check_documents(folder / f"{name}.documents.bin", spec)
    return Found(nbytes, largest)


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as f:
        while raw := f.read(CHUNK_BYTES):
            yield raw


def _check_largest(largest: int, path: pathlib.Path, limit: int) -> None:
    if largest >= limit:
        raise DataError(f"token id {largest} in {path} is outside the vocabulary of {limit}; it belongs to another one")


def check_documents(path: pathlib.Path, split: formats.Split) -> None:
    """Offsets of documents: as many as there are, from 0, never falling, inside the split."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy the whole folder again or prepare again with --overwrite") from None
    if size != 8 * split.documents:
        raise DataError(f"{path} is {size} bytes, expected {8 * split.documents} ({split.documents} documents)")
    before = 0
    for raw in _chunks(path):
        offsets = np.frombuffer(raw, "<u8")
        if (offsets < np.concatenate([[np.uint64(before)], offsets[:-1]])).any() or offsets[-1] > split.tokens:
            raise DataError(
                f"{path}: offsets fall, or lie beyond the {split.tokens} tokens of the split; copy it again"
            )
        before = int(offsets[-1])
