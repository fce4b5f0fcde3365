"""The metrics of evaluation tasks, of a checkpoint or of a run while it trains."""

import functools
import logging
import os
import pathlib
import sys
from collections.abc import Callable

from trainer.errors import ConfigError
from trainer.state import Program
from trainer.tasks import core, hellaswag
from trainer.tasks.asked import Asked
from trainer.tasks.scorer import Interrupted, Scorer
from trainer.tasks.text import Text

log = logging.getLogger("meshlm")
Results = dict[str, dict[str, float]]  # task, metric


class Tasks:
    """Tasks for the model of a run.

    Args:
      run_dir: has the tokenizer.

    Raises:
      ConfigError: a task is not known, or the run has no tokenizer.
      DataError: a task or its data cannot be read.
    """

    def __init__(self, program: Program, run_dir: pathlib.Path, asked: Asked):
        self._asked = asked
        self._text, self._scorer = Text(run_dir), Scorer(program)
        self._questions = {path: self._read(path) for path in asked.files if not path.is_dir()}
        self._core = {path: core.tasks(path) for path in asked.files if path.is_dir()}
        names = [path.name for path in self._questions]
        for tasks in self._core.values():
            names += ["CORE", *(task.label for task in tasks)]
            for task in tasks:
                task.items(asked.limit)  # raises DataError, so that it is not found in the middle of a run
        if asked.of_harness:
            self._prepare_libraries()
            from trainer.tasks import harness

            names += harness.load(asked)["tasks"]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{asked.setting}: two tasks have the name {min(twice)}; evaluate them one after another")

    def measure(self, params: dict, interrupted: Callable[[], bool] = lambda: False) -> Results | None:
        """The metrics of each task.

        Args:
          interrupted: is called after each batch, on all processes; if it returns True, the result is None.

        Raises:
          DataError: a task cannot be computed.
          Diverged: the model's log-probabilities are not finite.
        """
        self._scorer.interrupted = interrupted
        score = functools.partial(self._scorer.score, params)
        limit, results = self._asked.limit, Results()
        try:
            for path in self._asked.files:
                if path in self._questions:
                    results[path.name] = hellaswag.evaluate(self._questions[path][:limit], score)
                    continue
                for task in self._core[path]:
                    found = core.evaluate(task, self._text, score, context=self._scorer.context, limit=limit)
                    results[task.label] = found
                    log.info("%s: accuracy %.4f", task.label, found["acc"])
                rows = [results[task.label] for task in self._core[path]]
                results["CORE"] = {"core_metric": sum(row["centered"] for row in rows) / len(rows)}
            if self._asked.of_harness:
                from trainer.tasks import harness

                model = harness.Model.of(self._text, self._scorer, params)
                results |= harness.numbers(harness.run(model, self._asked))
        except Interrupted:
            return None
        return results

    def _read(self, path: pathlib.Path) -> list[hellaswag.Question]:
        if path.suffix != ".bin":
            return hellaswag.read_jsonl(path, self._text)
        if not hellaswag.is_of_gpt2(self._text):
            log.warning("%s has tokens of GPT-2, and the tokenizer of the run is another", path)
        return hellaswag.read_bin(path)

    def _prepare_libraries(self) -> None:
        """Settings that the harness's libraries read when they are imported."""
        if self._asked.folder is not None:  # its tasks need no network, and the libraries must not ask for one
            os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
