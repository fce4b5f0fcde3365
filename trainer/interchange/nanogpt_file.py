"""A checkpoint of nanoGPT (ckpt.pt) as if it were a folder of Hugging Face. It is a pickle, of which PyTorch reads only
tensors, numbers and texts (weights_only), so it cannot run code. No JAX.

Its layers are torch.nn.Linear, of shape (out, in); Hugging Face's GPT-2 has (in, out).
Format: https://github.com/karpathy/nanoGPT/blob/master/train.py.
"""

import json
import pathlib
import pickle
from typing import Any

import numpy as np

from data.errors import DataError
from model.families.layout import Index
from trainer.errors import ConfigError

LINEAR = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
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

    def __init__(self, path: pathlib.Path):
        self.path = path
        content = self._content()
        model, arguments = content.get("model"), content.get("model_args")
        if not isinstance(model, dict) or not isinstance(arguments, dict):
            raise ConfigError(f"{path} is not a checkpoint of nanoGPT, which has model and model_args")
        self._keys = {name.removeprefix(COMPILED): name for name in model}
        self.shapes = {name: self._shape(name, tuple(model[key].shape)) for name, key in self._keys.items()}
        self.dtypes = {name: str(model[key].dtype).removeprefix("torch.") for name, key in self._keys.items()}
        self.config = self._config(arguments)

    def _content(self) -> dict[str, Any]:
        """What the file holds; its tensors stay on disk until they are used."""
        try:
            import torch
        except ImportError:
            raise ConfigError(f'{self.path} needs PyTorch, which reads it: pip install "meshlm[nanogpt]"') from None
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise ConfigError(f"{self.path} does not exist") from None
        except pickle.UnpicklingError as e:
            reason = " ".join(str(e).split())[:200]
            raise ConfigError(f"{self.path} holds more than tensors, and is not opened ({reason})") from None
        except (OSError, RuntimeError, ValueError, EOFError, KeyError) as e:
            raise DataError(f"{self.path} cannot be read: {' '.join(str(e).split())[:200]}; copy it again") from None
        return content if isinstance(content, dict) else {}

    def _config(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a GPT-2 like this. nanoGPT has the exact GELU, and may have no biases."""
        if missing := [name for name in SIZES if name not in arguments]:
            raise ConfigError(f"{self.path}: model_args lacks {', '.join(missing)}")
        if unknown := [f"{name} = {value!r}" for name, value in arguments.items() if name not in KNOWN and value]:
            raise ConfigError(f"{self.path}: model_args has {', '.join(unknown)}, which nanoGPT does not have")
        config = {theirs: arguments[name] for name, theirs in SIZES.items()}
        return {"model_type": "gpt2", **config, "bias": arguments.get("bias", True), "activation_function": "gelu"}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if name.endswith(LINEAR) else shape

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, in float32. The file is opened again, so that what was read before can leave memory."""
        tensor = self._content()["model"][self._keys[name]]
        if name.endswith(LINEAR):
            return tensor[index[::-1]].float().numpy().T
        return tensor[index].float().numpy()

    def companions(self) -> dict[str, bytes]:
        return {"config.json": json.dumps(self.config, indent=2).encode()}
