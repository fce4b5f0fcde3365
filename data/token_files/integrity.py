"""Reads every byte of a dataset once and compares it with the manifest, in constant memory."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from data.dataset import Dataset
from data.errors import DataError
from data.token_files import external, fingerprint, formats

CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Found:
    """What verify_dataset read of one split."""

    nbytes: int
    largest_id: int  # -1 if there are no tokens


def verify_dataset(data: Dataset) -> dict[str, Found]:
    """Reads all files completely, and checks the hashes of a dataset folder, ids, document offsets and the tokenizer.

    Datasets of earlier versions have hashes only of their tokens and tokenizer; their document offsets are compared
    with the end-of-text tokens. The sizes and headers of external files were compared when they were opened; there are
    no hashes of their content.

    Raises:
      DataError: a file is damaged; the message names the first one, with what was found and what was expected.
    """
    try:
        data.load_tokenizer()
        if data.external_files:
            return {name: _check_external(files, data.vocab_size) for name, files in data.external_files.items()}
        _check_manifest(data.folder, data.manifest)
        found = {name: _split(data.folder, data.manifest, name) for name in data.manifest.splits}
        check_files(data.folder, data.manifest)
        return found
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read: {e.strerror}") from None


def _check_external(files: list[external.TokenFile], vocab_size: int) -> Found:
    largest = -1
    for file, found in zip(files, fingerprint.read_contents(files, whole=True), strict=True):
        fingerprint.check_ids(file, found, file.dtype, vocab_size)
        largest = max(largest, found.largest_id)
    return Found(sum(f.nbytes for f in files), largest)


def _split(folder: pathlib.Path, manifest: formats.Manifest, name: str) -> Found:
    spec = manifest.splits[name]
    files = formats.TokenFiles(folder, manifest, name)  # first the cheap checks: sizes, and hashes of a small split
    dtype, largest, nbytes = np.dtype(manifest.dtype).newbyteorder("<"), -1, 0
    for shard in spec.shards:
        path, digest = folder / shard.file, hashlib.sha256()
        for raw in _chunks(path):
            digest.update(raw)
            nbytes += len(raw)
            largest = max(largest, int(np.frombuffer(raw, dtype).max()))
        if digest.hexdigest() != shard.sha256:
            raise DataError(
                f"{path} has the right size but not the content of its manifest (sha256 {digest.hexdigest()[:12]}…, "
                f"expected {shard.sha256[:12]}…); copy it again or prepare again with --overwrite"
            )
        _check_largest(largest, path, manifest.vocab_size)
    if manifest.loss_masks:
        formats.check_hash_of(formats.loss_mask_path(folder, name), manifest.loss_masks[name])
        nbytes += spec.tokens
    path = folder / f"{name}.documents.bin"
    check_documents(path, spec)
    if manifest.eos_id is not None and spec.documents:
        _check_begins(path, files, manifest.eos_id)
    return Found(nbytes, largest)


def _check_manifest(folder: pathlib.Path, manifest: formats.Manifest) -> None:
    """Checks every byte of a manifest. A manifest of an earlier version has no `files`: read_manifest checked it."""
    path = folder / formats.MANIFEST
    if manifest.files and path.read_bytes() != manifest.to_json().encode():
        raise DataError(f"{path} was changed by hand or damaged; copy it again or prepare again with --overwrite")


def check_files(folder: pathlib.Path, manifest: formats.Manifest) -> None:
    """Checks the files that are neither the manifest nor shards. Raises DataError."""
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise DataError(f"{path} is missing; copy the whole folder again or prepare again with --overwrite")
        if (found := formats.sha256_file(path)) != sha256:
            raise DataError(
                f"{path} is not the file of its manifest (sha256 {found[:12]}…, expected {sha256[:12]}…); copy it "
                "again or prepare again with --overwrite"
            )


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as f:
        while raw := f.read(CHUNK_BYTES):
            yield raw


def _check_largest(largest: int, path: pathlib.Path, limit: int) -> None:
    if largest >= limit:
        raise DataError(f"token id {largest} in {path} is outside the vocabulary of {limit}; it belongs to another one")


def check_documents(path: pathlib.Path, split: formats.Split) -> None:
    """Raises DataError unless each document has an offset; offsets must begin at 0, ascend, and be in the split."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy the whole folder again or prepare again with --overwrite") from None
    if size != 8 * split.documents:
        raise DataError(f"{path} is {size} bytes, expected {8 * split.documents} ({split.documents} documents)")
    if not split.documents:
        if split.tokens:
            raise DataError(f"{path} has no document, but the split has {split.tokens} tokens; copy it again")
        return
    offsets = np.memmap(path, "<u8", "r")
    if offsets[0] != 0:
        raise DataError(f"{path}: the first offset is {offsets[0]} and not 0; copy it again")
    for start in range(0, len(offsets), CHUNK_BYTES // 8):
        part = offsets[start : start + CHUNK_BYTES // 8 + 1]
        if (part[1:] <= part[:-1]).any() or part[-1] >= split.tokens:
            raise DataError(
                f"{path}: offsets are not ascending, or beyond the {split.tokens} tokens of the split; copy it again"
            )


def _check_begins(path: pathlib.Path, files: formats.TokenFiles, eos_id: int) -> None:
    """Raises DataError unless each document except the first begins after an end-of-text token."""
    offsets, first = np.memmap(path, "<i8", "r")[1:], 0
    for tokens in files.shards:
        for start in range(0, len(tokens), CHUNK_BYTES // tokens.itemsize):
            part = tokens[start : start + CHUNK_BYTES // tokens.itemsize]
            # The documents, except the first, whose preceding token is in this part.
            low, high = np.searchsorted(offsets, [first + 1, first + len(part) + 1])
            before = offsets[low:high] - 1 - first
            if (wrong := np.flatnonzero(part[before] != eos_id)).size:
                raise DataError(
                    f"{path}: document {low + 1 + wrong[0]} begins at token {offsets[low + wrong[0]]}, but the token "
                    f"before it is {part[before[wrong[0]]]} and not the end-of-text token {eos_id}; copy it again"
                )
            first += len(part)
