"""Which tasks to evaluate, checked without JAX.

A name is a task of lm-evaluation-harness, or a path: hellaswag_val.jsonl, hellaswag_val.bin of llm.c, or nanochat's
folder eval_bundle, which has the tasks of DCLM CORE.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence

from trainer.config import EvalConfig
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Asked:
    """What flags or config.eval ask for.

    Attributes:
      names: each is a task of the harness or a path.
      folder: the folder with the harness's tasks; None: its own tasks.
      limit: the most examples of a task; None: all.
      num_fewshot: for tasks of the harness, instead of their own number.
      setting: what the names were given by, for messages.

    Raises:
      ConfigError: for what can be found wrong before JAX is loaded.
    """

    names: Sequence[str]
    folder: pathlib.Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    setting: str = "--tasks"

    def __post_init__(self) -> None:
        if not self.names or not all(self.names) or len(set(self.names)) < len(self.names):
            raise ConfigError(f"{self.setting}={','.join(self.names)} has an empty name, or a name twice")
        for path in self.files:
            if not path.exists():
                raise ConfigError(f"{self.setting}: {path} does not exist")
            if path.is_dir() and not (path / "core.yaml").is_file():
                raise ConfigError(f"{self.setting}: {path} has no core.yaml; a folder is nanochat's eval_bundle")
            if path.is_file() and path.suffix not in (".jsonl", ".bin"):
                raise ConfigError(f"{self.setting}: {path} is not a .jsonl or .bin file of HellaSwag")
        if self.of_harness and importlib.util.find_spec("lm_eval") is None:
            name = self.of_harness[0]
            raise ConfigError(f'{self.setting}={name} needs the lm-eval package: pip install "meshlm[eval]"')

    @classmethod
    def of_config(cls, config: EvalConfig) -> "Asked | None":
        """The tasks that a run is evaluated on while it trains; None if there are none. Raises ConfigError."""
        if not config.tasks:
            return None
        folder = pathlib.Path(config.tasks_path).expanduser() if config.tasks_path else None
        return cls(config.tasks, folder, config.tasks_limit or None, setting="config.eval.tasks")

    @property
    def files(self) -> list[pathlib.Path]:
        return [pathlib.Path(name).expanduser() for name in self.names if _is_path(name)]

    @property
    def of_harness(self) -> list[str]:
        return [name for name in self.names if not _is_path(name)]


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".jsonl", ".bin")) or os.path.isfile(os.path.join(name, "core.yaml"))
