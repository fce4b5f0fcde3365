"""A tensor in a file, row-major and uncompressed, read slice by slice."""

import dataclasses
import math
import pathlib

import numpy as np

from data.errors import DataError
from model.families.layout import Index


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is: the offset is in bytes, the shape is that in the file."""

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        """A slice; whole rows are read. Raises DataError if the file ends before the slice, or cannot be read.

        The file is not mapped: what was read of a mapped file stays in the memory of the process, and makes its writes
        to other files several times as slow.
        """
        start, stop, _ = index[0].indices(self.shape[0])
        width = math.prod(self.shape[1:])
        offset, count = self.offset + start * width * self.dtype.itemsize, (stop - start) * width
        try:
            found = np.fromfile(self.path, self.dtype, count, offset=offset)
        except OSError as e:
            raise DataError(f"{self.path} cannot be read: {e}") from None
        if found.size != count:
            raise DataError(f"{self.path} has become shorter; copy it again")
        return found.reshape(stop - start, *self.shape[1:])[(slice(None), *index[1:])]
