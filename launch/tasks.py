"""launch.evaluate --tasks: the tasks that others report, on the checkpoint of a run.

A name is a task of lm-evaluation-harness, or a path: hellaswag_val.jsonl, hellaswag_val.bin of llm.c, or nanochat's
folder eval_bundle, which has the tasks of DCLM CORE.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch import cli
from trainer.errors import ConfigError

if TYPE_CHECKING:  # these import JAX, or define flags
    from launch.inference import LoadedRun
    from trainer.tasks.scorer import Scorer
    from trainer.tasks.text import Text

Results = dict[str, dict[str, float]]  # task, metric


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the flags ask for.

    Attributes:
      folder: the folder with the harness's tasks; None: its own tasks.
      limit: the most examples of a task; None: all.
      num_fewshot: for tasks of the harness, instead of their own number.
    """

    names: Sequence[str]
    folder: pathlib.Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what can be found wrong before JAX is loaded."""
        if not self.names or not all(self.names) or len(set(self.names)) < len(self.names):
            raise ConfigError(f"--tasks={','.join(self.names)} has an empty name, or a name twice")
        for path in self.files:
            if not path.exists():
                raise ConfigError(f"--tasks: {path} does not exist")
            if path.is_dir() and not (path / "core.yaml").is_file():
                raise ConfigError(f"--tasks: {path} has no core.yaml; a folder is nanochat's eval_bundle")
            if path.is_file() and path.suffix not in (".jsonl", ".bin"):
                raise ConfigError(f"--tasks: {path} is not a .jsonl or .bin file of HellaSwag")
        if self.of_harness and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f'--tasks={self.of_harness[0]} needs the lm-eval package: pip install "meshlm[eval]"')

    @property
    def files(self) -> list[pathlib.Path]:
        return [pathlib.Path(name).expanduser() for name in self.names if _is_path(name)]

    @property
    def of_harness(self) -> list[str]:
        return [name for name in self.names if not _is_path(name)]


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".jsonl", ".bin")) or os.path.isfile(os.path.join(name, "core.yaml"))


def measure(run: "LoadedRun", asked: Asked) -> Results:
    """The metrics of each task. Raises ConfigError, DataError."""
    from trainer.tasks.scorer import Scorer
    from trainer.tasks.text import Text

    text, scorer = Text(run.path), Scorer(run.program)
    results: Results = {}
    for path in asked.files:
        results |= _of_path(path, run, text, scorer, asked.limit)
    if asked.of_harness:
        results |= _of_harness(run, text, scorer, asked)
    return results


def _of_path(path: pathlib.Path, run: "LoadedRun", text: "Text", scorer: "Scorer", limit: int | None) -> Results:
    """The results of a file of HellaSwag, or of CORE."""
    from trainer.tasks import core, hellaswag

    score = functools.partial(scorer.score, run.params)
    if not path.is_dir():
        questions = hellaswag.read_bin(path) if path.suffix == ".bin" else hellaswag.read_jsonl(path, text)
        if path.suffix == ".bin" and not hellaswag.is_of_gpt2(text):
            cli.log.warning("%s has tokens of GPT-2, and the tokenizer of %s is another", path, run.path)
        return {path.name: hellaswag.evaluate(questions[:limit], score)}
    results, tasks = {}, core.tasks(path)
    for task in tasks:
        results[task.label] = core.evaluate(task, text, score, context=scorer.context, limit=limit)
        cli.log.info("%s: accuracy %.4f", task.label, results[task.label]["acc"])
    return results | {"CORE": {"core_metric": sum(row["centered"] for row in results.values()) / len(tasks)}}


def _of_harness(run: "LoadedRun", text: "Text", scorer: "Scorer", asked: Asked) -> Results:
    if asked.folder is not None:  # its tasks need no network, and Hugging Face's libraries must not ask for one
        os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from trainer.tasks import harness

    model = harness.Model.of(text, scorer, run.params)
    results = harness.run(
        model, asked.of_harness, folder=asked.folder, limit=asked.limit, num_fewshot=asked.num_fewshot
    )
    return harness.numbers(results)


def table(results: Results) -> str:
    """A line for each metric, with its standard error."""
    lines = [("task", "metric", "value")]
    for task, row in results.items():
        for metric, value in row.items():
            name, _, filter = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = row.get(f"{name}_stderr,{filter}" if filter else f"{name}_stderr")
            lines.append((task, metric, f"{value:.6g}" + ("" if error is None else f" ± {error:.4f}")))
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(2)]
    return "\n".join(f"{task:<{widths[0]}}{metric:<{widths[1]}}{value}" for task, metric, value in lines)
