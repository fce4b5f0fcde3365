"""The parameters of a run as those of a plain model: its adapters, if it has any, are added to their projections."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from model import transformer
from model.config import LoraConfig, ModelConfig
from trainer.config import Config
from trainer.reliability.checkpoint import Checkpoints
from trainer.state import Program


def plain(model: ModelConfig) -> ModelConfig:
    """`model` without adapters."""
    return dataclasses.replace(model, lora=LoraConfig())


class Reader:
    """Reads the parameters of a run's step onto a mesh.

    Args:
      config: of the run.
      apart: whether adapters stay apart, so that the parameters are those of the run.

    Attributes:
      program: of the plain model, or of the run's.
    """

    def __init__(self, config: Config, mesh: Mesh, checkpoints: Checkpoints, step: int, *, apart: bool = False):
        self._trained = Program(config, mesh)
        self.program = self._trained
        if config.model.lora.rank and not apart:
            self.program = Program(dataclasses.replace(config, model=plain(config.model)), mesh)
        self._lora = config.model.lora
        self._checkpoints = checkpoints
        self._step = step

    def read(self, only: Iterable[str] | None = None, expected: dict[str, Any] | None = None) -> dict:
        """The parameters of `program`, nested; the arguments are those of Checkpoints.restore_params."""
        if self._trained is self.program:
            return self._checkpoints.restore_params(self.program, self._step, only, expected)[0]
        saved = traverse_util.flatten_dict(self._trained.params, sep=".")
        if only is not None:
            projections = [path.removesuffix("kernel") for path in only if path.endswith(".kernel")]
            only = {*only, *(f"{path}lora.{name}" for path in projections for name in "ab")} & saved.keys()
        params = self._checkpoints.restore_params(self._trained, self._step, only, expected)[0]
        return jax.jit(lambda params: transformer.merged(params, self._lora))(params)

    def adapters(self, expected: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """The arrays of the run's adapters, by dotted path."""
        saved = traverse_util.flatten_dict(self._trained.params, sep=".")
        only = saved.keys() - transformer.without_adapters(saved).keys()
        if not only:
            return {}
        params = self._checkpoints.restore_params(self._trained, self._step, only, expected)[0]
        return {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params, sep=".").items() if path in only}
