"""Maps each parameter of a model to its part of a tensor in a family's files, for any slice. Needs only NumPy."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from model.config import ModelConfig
from model.families.base import Family, Tensor

Index = tuple[slice, ...]
# A function that reads a slice of a file's tensor: (name, index) -> array.
Read = Callable[[str, Index], np.ndarray]
VOCAB_AXIS = {"embedding": 0, "head.kernel": 1}  # the axis of the vocabulary, which is padded in our parameters
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter as a part of a tensor.

    Attributes:
      shape: of one layer's parameter, without rows that pad the vocabulary.
      begin: the parameter's first index along the last axis of the parameters that the tensor holds.
    """

    tensor: Tensor
    path: str
    shape: tuple[int, ...]
    begin: int

    @property
    def layered(self) -> bool:
        return "{i}" in self.tensor.theirs


class Layout:
    """The tensors of a family's files for one model.

    Args:
      shapes: the shapes of all parameters by dotted path, as in Transformer: padded, and stacked by layer.

    Attributes:
      shapes: the shapes of the tensors in the files, by full name, in the order of the table.
    """

    def __init__(self, family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]):
        self.family = family
        self.config = config
        self._padded = dict(shapes)
        self._parts: dict[str, _Part] = {}
        self._of_tensor: dict[str, tuple[Tensor, list[_Part], int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in family.tensors:
            self._add(tensor)
        if strangers := shapes.keys() - self._parts.keys():
            raise ValueError(f"{family.model_type} has no tensor for {', '.join(sorted(strangers))}")

    def _add(self, tensor: Tensor) -> None:
        """Adds a row of the family's table, if the model has any of its parameters."""
        parts, begin = [], 0
        for path in tensor.ours:
            if path in self._padded:
                part = _Part(tensor, path, self._real_shape(path, "{i}" in tensor.theirs), begin)
                self._parts[path] = part
                parts.append(part)
                begin += part.shape[-1]
        if not parts:
            return
        shape = (*parts[0].shape[:-1], begin)
        for i in range(self.config.num_layers) if parts[0].layered else (None,):
            name = self.name(tensor.theirs if i is None else tensor.theirs.format(i=i))
            self.shapes[name] = shape[::-1] if tensor.transpose else shape
            self._of_tensor[name] = (tensor, parts, i)

    def name(self, bare: str) -> str:
        """The full name, in published files, of the tensor that the table calls `bare`."""
        return bare if bare == HEAD else self.family.prefix + bare

    def _real_shape(self, path: str, layered: bool) -> tuple[int, ...]:
        shape = list(self._padded[path][layered:])
        if (axis := VOCAB_AXIS.get(path)) is not None:
            shape[axis] = self.config.vocab_size
        return tuple(shape)

    def shape(self, path: str, layer: int | None) -> tuple[int, ...]:
        """The shape of a parameter, with its padding; with `layer`, of one layer of it."""
        return self._padded[path][layer is not None :]

    def problems(self, found: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is wrong with the tensors of some files, a few words each; `found` maps full names to shapes."""
        ignored = (*self.family.ignored, *([HEAD] if self.config.tie_embeddings else []))
        missing = [f"{name} is missing" for name in self.shapes if name not in found]
        extra = [f"{name} is not known" for name in found if name not in self.shapes and not name.endswith(ignored)]
        wrong = [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in self.shapes.items()
            if name in found and tuple(found[name]) != shape
        ]
        return missing + extra + wrong

    def parameter(self, read: Read, path: str, index: Index) -> np.ndarray:
        """A slice of the parameter `path`, float32, read piece by piece; rows that pad the vocabulary are 0."""
        part, full = self._parts[path], self._padded[path]
        bounds = [range(*s.indices(n)) for s, n in zip(index, full, strict=True)]
        out = np.zeros([len(bound) for bound in bounds], np.float32)
        if not part.layered:
            self._fill(out, read, part, self.name(part.tensor.theirs), bounds)
            return out
        for row, i in zip(out, bounds[0], strict=True):
            self._fill(row, read, part, self.name(part.tensor.theirs.format(i=i)), bounds[1:])
        return out

    def _fill(self, out: np.ndarray, read: Read, part: _Part, name: str, bounds: list[range]) -> None:
        real = [slice(b.start, min(b.stop, n)) for b, n in zip(bounds, part.shape, strict=True)]
        if any(s.stop <= s.start for s in real):
            return  # the whole slice pads the vocabulary
        inside = tuple(slice(0, s.stop - s.start) for s in real)
        real[-1] = slice(real[-1].start + part.begin, real[-1].stop + part.begin)
        if part.tensor.transpose:
            _transpose(read(name, tuple(real[::-1])), out[inside])
        else:
            out[inside] = read(name, tuple(real))

    def groups(self) -> list[tuple[list[str], list[str]]]:
        """(paths, names): parameters, and the tensors that hold them and nothing else. Each is in one group."""
        found: dict[Tensor, tuple[list[str], list[str]]] = {}
        for name, (tensor, parts, _) in self._of_tensor.items():
            found.setdefault(tensor, ([part.path for part in parts], []))[1].append(name)
        return list(found.values())

    def parts(self, name: str) -> list[tuple[str, Index]]:
        """The parameters that a tensor holds (if they are stacked, one layer of each), and their parts of it."""
        tensor, parts, _ = self._of_tensor[name]
        found = []
        for part in parts:
            index = [slice(0, n) for n in part.shape]
            index[-1] = slice(part.begin, part.begin + part.shape[-1])
            found.append((part.path, tuple(index[::-1] if tensor.transpose else index)))
        return found

    def tensor(self, of_layer: Callable[[str, int | None], np.ndarray], name: str) -> np.ndarray:
        """The tensor `name` of a file, C-contiguous.

        Args:
          of_layer: (dotted path, layer or None) -> the complete parameter of that layer.
        """
        tensor, parts, i = self._of_tensor[name]
        arrays = [of_layer(part.path, i)[tuple(map(slice, part.shape))] for part in parts]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
        if not tensor.transpose:
            return np.ascontiguousarray(joined)
        out = np.empty(joined.shape[::-1], joined.dtype)
        _transpose(joined, out)
        return out

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def _transpose(array: np.ndarray, out: np.ndarray) -> None:
    """out = array.T in bands, which is some four times as fast: 16 float32 fill a line of the cache."""
    for i in range(0, len(array), 16):
        out[:, i : i + 16] = array[i : i + 16].T
