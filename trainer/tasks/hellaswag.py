"""HellaSwag (Zellers et al., 2019) as llm.c evaluates it: which of four endings of a text the model finds most likely.

Its numbers are those of llm.c's dev/data/hellaswag.py, and not of the harness's task of that name, which cleans the
text and divides by characters.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from trainer.tasks.scorer import Pair, Score
from trainer.tasks.text import Text

MAGIC, VERSION, HEADER = 20240522, 1, 256  # int32 numbers in the header of llm.c's write_evalfile
START = 2**16 - 1
GPT2 = {"Hello world": [15496, 995]}  # a text and its tokens, which tell GPT-2's tokenizer from others


class Question(NamedTuple):
    context: list[int]
    endings: list[list[int]]
    label: int


def evaluate(questions: Sequence[Question], score: Callable[[Sequence[Pair]], list[Score]]) -> dict[str, float]:
    """acc: the share of questions whose right ending has the largest probability; acc_norm: the largest mean of its
    tokens' log-probabilities."""
    pairs = [(question.context, ending) for question in questions for ending in question.endings]
    scores = iter(score(pairs))
    right = np.zeros(2)
    for question in questions:
        own = [next(scores) for _ in question.endings]
        chosen = np.argmax([[s.logprob for s in own], [s.mean for s in own]], axis=1)
        right += chosen == question.label
    acc, acc_norm = (right / len(questions)).tolist()
    return {"acc": acc, "acc_norm": acc_norm, "examples": len(questions)}


def read_jsonl(path: pathlib.Path, text: Text) -> list[Question]:
    """The questions of hellaswag_val.jsonl. Raises DataError, which names the first line that is wrong."""
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            context, endings, label = row["ctx"], row["endings"], row["label"]
            if not isinstance(context, str) or not isinstance(endings, list):
                raise TypeError("ctx is not a text, or endings is not a list")
            if label not in range(len(endings)):
                raise ValueError(f"label {label!r} is not the number of an ending")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise DataError(f"{path}, line {number} is not a question with ctx, endings and label: {e!r}") from None
        ids = [text.encode(f" {ending}", add=False) for ending in endings]
        if not all(ids):
            raise DataError(f"{path}, line {number}: an ending has no tokens")
        questions.append(Question(text.encode(context), ids, label))
    if not questions:
        raise DataError(f"{path} is empty")
    return questions


def read_bin(path: pathlib.Path) -> list[Question]:
    """The questions of hellaswag_val.bin, which has tokens of GPT-2. Raises DataError if the file is damaged."""
    raw = path.read_bytes()
    if len(raw) < 4 * HEADER or len(raw) % 2:
        raise DataError(f"{path} has {len(raw)} bytes, and is not a whole file of llm.c's dev/data/hellaswag.py")
    magic, version, count = np.frombuffer(raw, "<i4", 3).tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(
            f"{path} begins with {magic} and version {version}; files of llm.c's dev/data/hellaswag.py begin with "
            f"{MAGIC} and version {VERSION}"
        )
    numbers = np.frombuffer(raw, "<u2", offset=4 * HEADER).tolist()
    questions, at = [], 0
    for i in range(count):
        question, end = _question(numbers, at, i)
        if question is None:
            raise DataError(f"{path} is damaged at question {i} of {count}; make or copy it again")
        questions.append(question)
        at = end
    if at != len(numbers) or not questions:
        raise DataError(f"{path} has {len(numbers) - at} numbers after its {count} questions; make or copy it again")
    return questions


def _question(numbers: list[int], at: int, index: int) -> tuple[Question | None, int]:
    """Question `index`, which begins at `at`, and its end; None if it is damaged."""
    if numbers[at : at + 1] != [START] or at + 6 > len(numbers):
        return None, at
    size, own_index, label, count = numbers[at + 1 : at + 5]
    end = at + size // 2
    texts, begin = [], at + 5
    while begin < min(end, len(numbers)):
        texts.append(numbers[begin + 1 : begin + 1 + numbers[begin]])
        begin += 1 + numbers[begin]
    is_whole = begin == end <= len(numbers) and len(texts) == 1 + count and all(texts)
    if not is_whole or own_index != index or label >= count:
        return None, at
    return Question(texts[0], texts[1:], label), end


def is_of_gpt2(text: Text) -> bool:
    """Whether the tokenizer is GPT-2's, as that of the .bin file."""
    return all(text.encode(words, add=False) == ids for words, ids in GPT2.items())
