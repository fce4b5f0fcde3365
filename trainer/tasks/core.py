"""CORE, the 22 tasks of DCLM (Li et al., 2024), from the files and by the definitions of nanochat.

A folder (nanochat's eval_bundle) has core.yaml, eval_meta_data.csv, and eval_data/ with a .jsonl file for each task. A
task is one of three kinds: choose the most likely continuation of a text (multiple_choice), choose the text after which
a continuation is most likely (schema), or write a continuation as it is (language_modeling).
"""

import csv
import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from data.errors import DataError
from trainer.tasks.scorer import Pair, Score
from trainer.tasks.text import Text

SHUFFLE_SEED, FEWSHOT_SEED = 1337, 1234  # of nanochat
FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of CORE.

    Attributes:
      baseline: the accuracy of a random choice, from 0 to 1.
      delimiter: the text between a context and its continuation.
    """

    label: str
    kind: str
    path: pathlib.Path
    num_fewshot: int
    delimiter: str
    baseline: float

    def items(self, limit: int | None = None) -> list[Item]:
        """The examples in the order of nanochat, at most `limit`. Raises DataError."""
        if not self.path.is_file():
            raise DataError(f"{self.path}, the data of {self.label}, does not exist; unpack the whole eval_bundle")
        items = [self._item(i, line) for i, line in enumerate(self.path.read_bytes().splitlines(), 1)]
        random.Random(SHUFFLE_SEED).shuffle(items)
        items = items[:limit]
        if len(items) <= self.num_fewshot:
            raise DataError(
                f"{self.path} has {len(items)} examples, and {self.label} needs more than {self.num_fewshot}"
            )
        return items

    def _item(self, number: int, line: bytes) -> Item:
        """The example in a line. Raises DataError unless it has the fields of the kind."""
        try:
            item = json.loads(line)
            for name, kind in FIELDS[self.kind].items():
                if not isinstance(item[name], kind):
                    raise TypeError(f"{name} is {item[name]!r}"[:100])
            options = next((item[name] for name, kind in FIELDS[self.kind].items() if kind is list), None)
            if options is not None and not all(isinstance(option, str) for option in options):
                raise TypeError("not all options are texts")
            if options is not None and item["gold"] not in range(len(options)):
                raise ValueError(f"gold is {item['gold']}, and there are {len(options)} options")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise DataError(f"{self.path}, line {number} is not an example of {self.kind}: {e!r}") from None
        return item

    def prompts(self, item: Item, shots: Sequence[Item]) -> list[str]:
        """The texts to compare; for language_modeling, the text without the continuation and with it."""
        before = "".join(f"{self._prompt(shot)}\n\n" for shot in shots)
        if self.kind == "multiple_choice":
            return [before + item["query"] + self.delimiter + choice for choice in item["choices"]]
        if self.kind == "schema":
            return [before + option + self.delimiter + item["continuation"] for option in item["context_options"]]
        without = before + item["context"].strip() + self.delimiter
        return [without.strip(), without + item["continuation"]]

    def _prompt(self, item: Item) -> str:
        """An example with its right answer."""
        if self.kind == "multiple_choice":
            return item["query"] + self.delimiter + item["choices"][item["gold"]]
        if self.kind == "schema":
            return item["context_options"][item["gold"]] + self.delimiter + item["continuation"]
        return item["context"].strip() + self.delimiter + item["continuation"]

    def pairs(self, prompts: Sequence[Sequence[int]], context: int) -> list[Pair]:
        """What is scored, given the tokens of the prompts: the tokens in which options differ, up to their end; the
        tokens that they share at their end (schema); those after the text without the continuation.

        Of a longer prompt, the last `context` tokens count.
        """
        if self.kind == "schema":
            shared = _common([ids[::-1] for ids in prompts])
            cuts = [(ids, len(ids) - shared) for ids in prompts]
        elif self.kind == "multiple_choice":
            cuts = [(ids, _common(prompts)) for ids in prompts]
        else:
            cuts = [(prompts[1], _common(prompts))]
        return [(ids[max(0, len(ids) - context) : cut], ids[cut:]) for ids, cut in cuts]

    def is_right(self, item: Item, scores: Sequence[Score]) -> bool:
        if self.kind == "language_modeling":
            return scores[0].greedy
        losses = [-score.mean for score in scores]
        return losses.index(min(losses)) == item["gold"]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all sequences begin."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def tasks(folder: pathlib.Path) -> list[Task]:
    """The tasks that core.yaml lists. Raises DataError if it or eval_meta_data.csv is missing or damaged."""
    try:
        with (folder / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        listed = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
        found = [
            Task(
                row["label"], row["icl_task_type"], folder / "eval_data" / row["dataset_uri"], row["num_fewshot"][0],
                row.get("continuation_delimiter", " "), baselines[row["label"]],
            )
            for row in listed
        ]  # fmt: skip
    except FileNotFoundError as e:
        raise DataError(f"{e.filename} is missing; name the folder eval_bundle of nanochat") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, yaml.YAMLError) as e:
        reason = " ".join(repr(e).split())
        raise DataError(f"core.yaml or eval_meta_data.csv of {folder} is damaged: {reason}") from None
    if not found:
        raise DataError(f"{folder / 'core.yaml'} lists no tasks")
    for task in found:
        if task.kind not in FIELDS:
            raise DataError(f"{folder / 'core.yaml'}: {task.label} is of the unknown kind {task.kind!r}")
    return found


def evaluate(
    task: Task, items: Sequence[Item], text: Text, score: Callable[[Sequence[Pair]], list[Score]], context: int
) -> dict[str, float]:
    """acc, and centered: 0 for a random choice, 1 if all is right."""
    asked = []
    for i, item in enumerate(items):
        drawn = random.Random(FEWSHOT_SEED + i).sample(range(len(items) - 1), task.num_fewshot)
        shots = [items[k + (k >= i)] for k in drawn]  # of all items except i
        prompts = [[text.first_id, *text.tokenizer.encode(p).tolist()] for p in task.prompts(item, shots)]
        asked.append(task.pairs(prompts, context))
        if task.kind == "language_modeling" and not asked[-1][0][1]:
            raise DataError(f"{task.path}: the continuation {item['continuation']!r} has no tokens after its text")
    scores = iter(score([pair for pairs in asked for pair in pairs]))
    right = [task.is_right(item, [next(scores) for _ in pairs]) for item, pairs in zip(items, asked, strict=True)]
    acc = sum(right) / len(right)
    return {"acc": acc, "centered": (acc - task.baseline) / (1 - task.baseline), "examples": len(right)}
