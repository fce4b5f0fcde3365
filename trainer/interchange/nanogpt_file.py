"""A checkpoint of nanoGPT (ckpt.pt) as if it were a folder of Hugging Face. It is a pickle, of which PyTorch reads only
tensors, numbers and texts (weights_only), so it cannot run code. No JAX.

Its layers are torch.nn.Linear, of shape (out, in); Hugging Face's GPT-2 has (in, out).
Format: https://github.com/karpathy/nanoGPT/blob/master/train.py.
"""

import json
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np

from data.errors import DataError
from model.families.gpt2 import CONV1D
from model.families.layout import Index
from trainer.errors import ConfigError

REOPENED_AFTER = 256 << 20  # bytes
COMPILED = "_orig_mod."  # torch.compile puts this before each name
SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions",
         "vocab_size": "vocab_size"}  # fmt: skip
KNOWN = {*SIZES, "bias", "dropout"}


class NanoGptFile:
    """The model of a ckpt.pt, with the attributes and methods of Weights.

    Raises:
      ConfigError: PyTorch is missing, or the file is not a checkpoint of nanoGPT.
      DataError: the file is damaged.
    """

    by_rows = False

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._cached: dict[str, Any] | None = None
        self._bytes_read = 0
        content = self._content()
        model, arguments = content.get("model"), content.get("model_args")
        if not isinstance(model, dict) or not isinstance(arguments, dict):
            raise ConfigError(f"{path} is not a checkpoint of nanoGPT, which has model and model_args")
        if strange := [name for name, value in model.items() if not _is_weight(name, value)]:
            raise ConfigError(f"{path}: {strange[0]!r} of its model is not a tensor of floating-point numbers")
        self._keys = {name.removeprefix(COMPILED): name for name in model}
        self.shapes = {name: self._shape(name, tuple(model[key].shape)) for name, key in self._keys.items()}
        self.dtypes = {name: str(model[key].dtype).removeprefix("torch.") for name, key in self._keys.items()}
        self.config = self._config(arguments)

    def _content(self) -> dict[str, Any]:
        """What the file holds. Its tensors stay on disk until they are used; what was used stays in memory, so the file
        is opened again from time to time."""
        if self._cached is None or self._bytes_read > REOPENED_AFTER:
            self._cached, self._bytes_read = _opened(self.path), 0
        return self._cached

    def _config(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a GPT-2 like this. nanoGPT has the exact GELU, and may have no biases."""
        if missing := [name for name in SIZES if name not in arguments]:
            raise ConfigError(f"{self.path}: model_args lacks {', '.join(missing)}")
        if unknown := [f"{name} = {value!r}" for name, value in arguments.items() if name not in KNOWN and value]:
            raise ConfigError(f"{self.path}: model_args has {', '.join(unknown)}, which nanoGPT does not have")
        config = {theirs: arguments[name] for name, theirs in SIZES.items()}
        return {"model_type": "gpt2", **config, "bias": arguments.get("bias", True), "activation_function": "gelu"}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if name.endswith(CONV1D) else shape

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, in float32."""
        tensor = self._content()["model"][self._keys[name]]
        linear = name.endswith(CONV1D)
        found = np.array(tensor[index[::-1] if linear else index].float().numpy())
        self._bytes_read += found.nbytes
        return found.T if linear else found

    def companions(self) -> dict[str, bytes]:
        return {"config.json": json.dumps(self.config, indent=2).encode()}


def _opened(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise ConfigError(f'{path} needs PyTorch, which reads it: pip install "meshlm[nanogpt]"') from None
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is damaged, or is not a file of PyTorch 1.6 or later, which is a zip archive")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as e:
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"{path} holds more than tensors, and is not opened ({reason})") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as e:
        raise DataError(f"{path} cannot be read: {' '.join(str(e).split())[:200]}; copy it again") from None
    return content if isinstance(content, dict) else {}


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and hasattr(value, "is_floating_point") and value.is_floating_point()
