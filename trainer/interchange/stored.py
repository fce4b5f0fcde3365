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
        """A slice, in memory. Raises DataError if the file cannot be read, or ends before the tensor does.

        Whole rows are read. Parts of rows are copied from a mapping of the file, which is not used for whole rows: what
        was read of a mapped file counts as memory of the process, and makes its writes several times as slow.
        """
        start, stop, _ = index[0].indices(self.shape[0])
        width = math.prod(self.shape[1:])
        whole = all(s.indices(n) == (0, n, 1) for s, n in zip(index[1:], self.shape[1:], strict=True))
        try:
            if not whole and stop > start:
                return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index])
            offset, count = self.offset + start * width * self.dtype.itemsize, (stop - start) * width
            found = np.fromfile(self.path, self.dtype, count, offset=offset)
        except (OSError, ValueError) as e:
            raise DataError(f"{self.path} cannot be read: {e}; copy it again") from None
        if found.size != count:
            raise DataError(f"{self.path} has become shorter; copy it again")
        return found.reshape(stop - start, *self.shape[1:])[(slice(None), *index[1:])]
