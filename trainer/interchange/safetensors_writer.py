"""Writes .safetensors files of tensors that are made one at a time, so that memory holds only one tensor.

The library's own writer takes all tensors of a file at once. Format: a little-endian u64, the length of a JSON header
{name: {dtype, shape, data_offsets}}; then the data, row-major, in the order of the offsets.
"""

import json
import pathlib
import struct
import zlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ALIGNMENT = 8  # of the data, in bytes; spaces pad the header to a multiple of it


def shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names of tensors in files of at most `limit` bytes each, in order; a larger tensor has a file of its own."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = int(np.prod(shape)) * itemsize
        if files[-1] and size + bytes_ > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += bytes_
    return files


def write(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], np.ndarray], dtype: str
) -> dict[str, int]:
    """Writes the tensors of `shapes` as `make` returns them, in `dtype`; returns the CRC-32 of each tensor's bytes.

    Raises OSError, and ValueError if a tensor is not finite in `dtype`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    sums = {}
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            array = make(name)
            assert array.shape == shape, name
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False))
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise ValueError(f"{name} is not finite in {dtype}")
            data = array.view(np.uint8).reshape(-1).data
            sums[name] = zlib.crc32(data)
            f.write(data)
    return sums
