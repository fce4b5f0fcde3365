"""HellaSwag's two files give llm.c's numbers, and damaged files are reported."""

import json

import numpy as np
import pytest

from data.errors import DataError
from tests.task_models import TaskModel
from trainer.tasks import hellaswag
from trainer.tasks.scorer import Score

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "it",
    "is",
    "was",
    "for",
    "on",
    "as",
    "with",
    "be",
    "by",
    "this",
    "had",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TaskModel:
    return TaskModel.in_folder(tmp_path_factory.mktemp("run"))


def rows(count: int) -> list[dict]:
    draw = np.random.default_rng(0)

    def words(longest: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, longest)))

    return [
        {"ind": i, "ctx": words(12), "endings": [words(6) for _ in range(4)], "label": int(draw.integers(4))}
        for i in range(count)
    ]


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_bin(path, questions) -> None:
    """The format of llm.c, as its description says."""
    stream = []
    for i, (context, endings, label) in enumerate(questions):
        texts = [number for ids in (context, *endings) for number in (len(ids), *ids)]
        stream += [65535, 2 * (5 + len(texts)), i, label, len(endings), *texts]
    header = np.zeros(256, np.int32)
    header[:4] = 20240522, 1, len(questions), 1000
    path.write_bytes(header.tobytes() + np.array(stream, np.uint16).tobytes())


def by_definition(model: TaskModel, rows: list[dict]) -> dict[str, float]:
    """The numbers of llm.c's evaluation, one ending at a time."""
    right = right_norm = 0
    for row in rows:
        sums, means = [], []
        context = model.text.tokenizer.encode(row["ctx"]).tolist()
        for ending in row["endings"]:
            ids = model.text.tokenizer.encode(" " + ending).tolist()
            nats = model.nats_and_predictions(context + ids)[0][-len(ids) :]
            sums.append(nats.sum())
            means.append(nats.mean())
        right += np.argmin(sums) == row["label"]
        right_norm += np.argmin(means) == row["label"]
    return {"acc": right / len(rows), "acc_norm": right_norm / len(rows), "examples": len(rows)}


def test_both_files_give_the_numbers_of_the_definition(model, tmp_path):
    data = rows(40)
    write_jsonl(tmp_path / "val.jsonl", data)
    questions = hellaswag.read_jsonl(tmp_path / "val.jsonl", model.text)
    write_bin(tmp_path / "val.bin", questions)
    assert hellaswag.read_bin(tmp_path / "val.bin") == questions and len(questions) == 40
    assert hellaswag.evaluate(questions, model.score) == by_definition(model, data)


def test_acc_is_of_sums_and_acc_norm_of_means():
    questions = [hellaswag.Question([1], [[1], [2, 3, 4, 5]], label) for label in (0, 0, 1)]
    scores = [Score(-3.0, False, 1), Score(-4.0, False, 4)] * 3
    assert hellaswag.evaluate(questions, lambda pairs: scores) == {"acc": 2 / 3, "acc_norm": 1 / 3, "examples": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ctx": 5}, "line 2 is not a question with ctx, endings and label: TypeError"),
        ({"label": 4}, "label 4 is not the number of an ending"),
        ({"label": None}, "label None is not"),
        ({"endings": "none"}, "endings is not a list"),
        ({"endings": []}, "is not the number"),
    ],
)
def test_a_wrong_line_is_named(model, tmp_path, change, said):
    data = rows(3)
    data[1] |= change
    write_jsonl(tmp_path / "x.jsonl", data)
    with pytest.raises(DataError, match=said):
        hellaswag.read_jsonl(tmp_path / "x.jsonl", model.text)


def test_an_empty_file_and_one_without_labels_are_errors(model, tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        hellaswag.read_jsonl(tmp_path / "x.jsonl", model.text)
    write_jsonl(tmp_path / "test.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows(2)])
    with pytest.raises(DataError, match=r"line 1 .* KeyError\('label'\)"):
        hellaswag.read_jsonl(tmp_path / "test.jsonl", model.text)


def test_every_damage_to_a_bin_file_is_noticed(model, tmp_path):
    data, path = rows(3), tmp_path / "x.bin"
    write_jsonl(tmp_path / "x.jsonl", data)
    write_bin(path, hellaswag.read_jsonl(tmp_path / "x.jsonl", model.text))
    raw = path.read_bytes()
    lengths = [0, 10, 1023, 1024, 1030, len(raw) - 2, len(raw) - 1]
    damaged = [raw[:n] for n in lengths] + [raw + b"\0\0", raw[:4] + b"\2" + raw[5:], b"x" + raw[1:]]
    damaged += [raw[: 1024 + 2 * i] + b"\xfe\xff" + raw[1026 + 2 * i :] for i in range(6)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.bin"):
            hellaswag.read_bin(path)
