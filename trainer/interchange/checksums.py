"""The checksums beside a copy of weights: the sum of the bits of each parameter's float32 numbers, modulo 2**32.

They do not depend on the mesh, so they are compared with the sums that trainer/reliability/checkpoint.py computes on
the devices.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.errors import DataError
from model.families.layout import Layout, Read
from trainer.interchange.folder import CHECKSUMS
from trainer.interchange.safetensors_writer import row_blocks

FORMAT = "meshlm checksums 1"


def of_tensors(layout: Layout, read: Read) -> dict[str, int]:
    """The sum of each parameter of `layout`, by dotted path, read from the tensors that hold it."""
    sums: dict[str, int] = {}
    for name in layout.shapes:
        for path, (rows, *rest) in layout.parts(name):
            for block in row_blocks(tuple(s.stop - s.start for s in (rows, *rest))):
                part = read(name, (slice(rows.start + block.start, rows.start + block.stop), *rest))
                bits = np.ascontiguousarray(part.astype(np.float32, copy=False)).view(np.uint32)
                sums[path] = (sums.get(path, 0) + int(bits.sum(dtype=np.uint64))) % 2**32
    return sums


def write(folder: pathlib.Path, sums: Mapping[str, int]) -> None:
    (folder / CHECKSUMS).write_text(json.dumps({"format": FORMAT, "parameters": sums}, indent=1) + "\n")


def check(folder: pathlib.Path, sums: Mapping[str, int]) -> None:
    """Raises DataError if `folder` has checksums of ours, and those of `sums` are others."""
    try:
        recorded: Any = json.loads((folder / CHECKSUMS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{folder / CHECKSUMS} cannot be read ({e}); convert the weights again") from None
    if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
        return  # a file of another program
    differing = [name for name, now in sums.items() if recorded["parameters"].get(name) != now]
    if differing:
        raise DataError(f"{folder}: {differing[0]} is not what was converted (checksum); convert the weights again")
