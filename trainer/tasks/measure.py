"""The metrics of evaluation tasks, of a checkpoint or of a run while it trains."""

import collections
import functools
import hashlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from trainer.errors import ConfigError
from trainer.state import Program
from trainer.tasks import core, hellaswag
from trainer.tasks.asked import Asked
from trainer.tasks.scorer import Interrupted, Pair, Score, Scorer
from trainer.tasks.text import Text

log = logging.getLogger("meshlm")
Numbers = dict[str, float]  # by metric


class Tasks:
    """Tasks for the model of a run. Their data is read once.

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
        bundles = [core.tasks(path) for path in asked.files if path.is_dir()]
        self._core = [[(task, task.items(asked.limit)) for task in tasks] for tasks in bundles]
        names = [path.name for path in self._questions]
        for tasks in bundles:
            names += ["CORE", *(task.label for task in tasks)]
        self._harness = None
        if asked.of_harness:
            self._prepare_libraries()
            from trainer.tasks import harness

            self._harness = harness.Harness(asked, self._text, self._scorer)
            names += self._harness.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{asked.setting}: two tasks have the name {min(twice)}; evaluate them one after another")

    def check(self, on_progress: Callable[[], object] = lambda: None) -> str:
        """Makes all questions without asking the model, so that a mistake is not found in the middle of a run.

        Returns:
          The digest of all questions, which must be the same on all processes.

        Raises:
          ConfigError, DataError: a task cannot be computed.
        """
        digest = hashlib.sha256()

        def asked(tokens: Sequence[Sequence[int]]) -> None:
            digest.update(repr(tokens).encode())
            on_progress()

        def check(pairs: Sequence[Pair]) -> list[Score]:
            asked([[*context, -1, *continuation] for context, continuation in pairs])
            return self._scorer.check(pairs)

        collections.deque(self._of_files(check), maxlen=0)
        if self._harness is not None:
            self._harness.check(check, asked)
        return digest.hexdigest()

    def measure(self, params: dict, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Numbers] | None:
        """The metrics of each task.

        Args:
          interrupted: is called after each batch, on all processes; if it returns True, the result is None.

        Raises:
          DataError: a task cannot be computed.
          Diverged: the model's log-probabilities are not finite.
        """
        self._scorer.interrupted = interrupted
        results = {}
        try:
            for name, found in self._of_files(functools.partial(self._scorer.score, params)):
                results[name] = found
                metric, value = next(iter(found.items()))
                log.info("%s: %s %.4f", name, metric, value)
            if self._harness is not None:
                results |= self._harness.measure(params)
        except Interrupted:
            return None
        return results

    def _of_files(self, score: Callable[[Sequence[Pair]], list[Score]]) -> Iterator[tuple[str, Numbers]]:
        """The metrics of each task that is not of the harness."""
        for path, questions in self._questions.items():
            yield path.name, hellaswag.evaluate(questions[: self._asked.limit], score)
        for tasks in self._core:
            centered = []
            for task, items in tasks:
                found = core.evaluate(task, items, self._text, score, self._scorer.context)
                centered.append(found["centered"])
                yield task.label, found
            yield "CORE", {"core_metric": sum(centered) / len(centered)}

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
