"""Writes the .safetensors files of a folder piece by piece and in any order, so that memory need not hold a tensor.

The library's own writer takes all tensors of a file at once. Format: a little-endian u64, the length of a JSON header
{name: {dtype, shape, data_offsets}}; then the data, row-major, in the order of the offsets.
"""

import json
import math
import pathlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from trainer.errors import CheckpointError
from trainer.interchange.folder import INDEX, SINGLE

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Bits of the exponent: if all are set, the number is not finite.
EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
ALIGNMENT = 8  # of the data, in bytes; spaces pad the header to a multiple of it
SHARD_BYTES = 5_000_000_000
BLOCK = (
    2 << 20
)  # elements that are converted, checked or read back at a time: few enough that glibc reuses their memory

Spec = tuple[str, tuple[int, ...]]  # dtype and shape


def row_blocks(shape: tuple[int, ...], elements: int = BLOCK) -> Iterator[slice]:
    """Slices of the first axis with at most about `elements` elements each; one row may have more."""
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


class FolderWriter:
    """The tensors `specs` of a folder, in files of at most `shard_bytes`; a larger tensor has a file of its own.

    Raises OSError if the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES):
        self._folder = folder
        self._specs = specs
        self._places: dict[str, tuple[pathlib.Path, int]] = {}  # file and offset of each tensor
        self._sums: dict[str, int] = {}  # CRC-32 of each tensor's bytes
        groups = _shards(specs, shard_bytes)
        files = [SINGLE] if len(groups) == 1 else [
            f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))
        ]  # fmt: skip
        for file, group in zip(files, groups, strict=True):
            self._begin(folder / file, group)
        if len(groups) > 1:
            of_tensor = {name: path.name for name, (path, _) in self._places.items()}
            index = {"metadata": {"total_size": sum(map(_size, specs.values()))}, "weight_map": of_tensor}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, path: pathlib.Path, names: list[str]) -> None:
        """Writes the header of a file, which gets its full size."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        for name in names:
            dtype, shape = self._specs[name]
            ends.append(ends[-1] + _size(self._specs[name]))
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        with path.open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(f.tell() + ends[-1])
        self._places |= {name: (path, 8 + len(text) + end) for name, end in zip(names, ends, strict=False)}

    def write(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Writes a tensor, whose rows come in `pieces`, in its dtype.

        Raises OSError, and ValueError if a number is not finite in the dtype.
        """
        dtype, shape = self._specs[name]
        path, offset = self._places[name]
        checksum, written = 0, 0
        with path.open("r+b") as f:
            f.seek(offset)
            for piece in pieces:
                flat = piece.reshape(-1)
                for block in row_blocks(flat.shape):
                    with np.errstate(over="ignore"):
                        numbers = np.ascontiguousarray(flat[block].astype(DTYPES[dtype], copy=False))
                    bits = numbers.view(f"u{numbers.itemsize}")
                    if ((bits & EXPONENTS[dtype]) == EXPONENTS[dtype]).any():
                        raise ValueError(f"{name} is not finite in {dtype}")
                    checksum = zlib.crc32(bits.data, checksum)
                    f.write(bits.data)
                    written += bits.size
        assert written == math.prod(shape), name
        self._sums[name] = checksum

    def verify(self) -> None:
        """Reads each tensor back with the safetensors library. Raises CheckpointError if it is not what was written."""
        for name, (_, shape) in self._specs.items():
            path, checksum = self._places[name][0], 0
            for rows in row_blocks(shape):
                with safetensors.safe_open(path, "numpy") as opened:  # reopened, because what was read stays in memory
                    block = np.ascontiguousarray(opened.get_slice(name)[rows])
                checksum = zlib.crc32(block.view(np.uint8).reshape(-1).data, checksum)
            if checksum != self._sums[name]:
                raise CheckpointError(f"{path}: {name} is not what was written; check the disk")


def _size(spec: Spec) -> int:
    return math.prod(spec[1]) * DTYPES[spec[0]].itemsize


def _shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """The names of the tensors of each file, in order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + _size(spec) > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _size(spec)
    return files
