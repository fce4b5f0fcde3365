"""A GPT-2 of llm.c (gpt2_124M.bin, or model_00000100.bin of a run) as if it were a folder of Hugging Face. No JAX.

256 int32 (magic, version, longest context, vocabulary, layers, heads, width, rows of the embedding), then the tensors:
each kind for all layers, float32 (versions 1 and 3) or bfloat16 (version 5). Its layers are torch.nn.Linear, of shape
(out, in); Hugging Face's GPT-2 has (in, out). Format: https://github.com/karpathy/llm.c/blob/master/train_gpt2.py.
"""

import json
import math
import pathlib

import ml_dtypes
import numpy as np

from data.errors import DataError
from model.families.gpt2 import CONV1D
from model.families.layout import Index
from trainer.errors import ConfigError
from trainer.interchange.stored import Stored

MAGIC, HEADER_BYTES = 20240326, 1024
DTYPES = {1: np.dtype("<f4"), 3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
NAMES = {np.dtype("<f4"): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


class LlmcFile:
    """The model of a .bin file of llm.c, with the attributes and methods of Weights.

    Raises:
      ConfigError: it is not such a file.
      DataError: the file is damaged.
    """

    by_rows = False

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not path.is_file():
            raise ConfigError(f"{path} does not exist")
        header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
        if len(header) < 8 or header[0] != MAGIC:
            raise ConfigError(f"{path} is not a model of llm.c, which begins with the number {MAGIC}")
        version, self._longest, self._vocab, self._layers, self._heads, self._width, self._rows = map(int, header[1:8])
        if version not in DTYPES:
            raise ConfigError(f"{path} has version {version} of llm.c's format; those known are 1, 3 and 5")
        self._rows = self._rows or self._vocab  # version 1 does not pad the vocabulary
        sizes = (self._longest, self._vocab, self._layers, self._heads, self._width)
        if min(sizes) < 1 or max(sizes) > 1 << 24 or self._rows < self._vocab:
            raise DataError(f"{path} has the sizes {sizes}, which no model has; copy it again")
        self._dtype = DTYPES[version]
        self._places, end = self._layout()
        if (size := path.stat().st_size) != end:
            raise DataError(f"{path} has {size:,} bytes, and the model of its header {end:,}; copy it again")
        self.shapes = {
            name: place.shape[::-1] if name.endswith(CONV1D) else place.shape for name, place in self._places.items()
        } | {"transformer.wte.weight": (self._vocab, self._width)}
        self.dtypes = dict.fromkeys(self._places, NAMES[self._dtype])
        self.config = {
            "model_type": "gpt2", "n_layer": self._layers, "n_head": self._heads, "n_embd": self._width,
            "n_positions": self._longest, "vocab_size": self._vocab, "activation_function": "gelu_new",
        }  # fmt: skip

    def _layout(self) -> tuple[dict[str, Stored], int]:
        """Where each tensor is, and the size of the file, in bytes."""
        c, end = self._width, HEADER_BYTES
        places: dict[str, Stored] = {}

        def add(name: str, *shape: int) -> None:
            nonlocal end
            places[f"transformer.{name}"] = Stored(self.path, end, shape, self._dtype)
            end += math.prod(shape) * self._dtype.itemsize

        add("wte.weight", self._rows, c)
        add("wpe.weight", self._longest, c)
        for part, *shapes in (
            ("ln_1", (c,)), ("attn.c_attn", (3 * c, c)), ("attn.c_proj", (c, c)), ("ln_2", (c,)),
            ("mlp.c_fc", (4 * c, c)), ("mlp.c_proj", (c, 4 * c)),
        ):  # fmt: skip
            for kind, shape in (("weight", shapes[0]), ("bias", shapes[0][:1])):
                for i in range(self._layers):
                    add(f"h.{i}.{part}.{kind}", *shape)
        add("ln_f.weight", c)
        add("ln_f.bias", c)
        return places, end

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file."""
        if name.endswith(CONV1D):
            return self._places[name].read(index[::-1]).T
        return self._places[name].read(index)

    def companions(self) -> dict[str, bytes]:
        return {"config.json": json.dumps(self.config, indent=2).encode()}
