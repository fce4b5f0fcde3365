"""The tasks of CORE have nanochat's prompts and numbers, and damaged files are reported."""

import json
import random

import numpy as np
import pytest

from data.errors import DataError
from tests.hellaswag_test import WORDS
from tests.task_models import CONTEXT, TaskModel
from trainer.tasks import core

jinja2 = pytest.importorskip("jinja2")
# The prompts of nanochat's core_eval.py as Jinja templates, which are their definition.
SHOTS = "{%- for shot in shots -%}\n" + "{{ EXAMPLE }}\n\n{% endfor -%}\n"
EXAMPLE = {
    "multiple_choice": "{{ item.query }}{{ d }}{{ item.choices[item.gold] }}",
    "schema": "{{ item.context_options[item.gold] }}{{ d }}{{ item.continuation }}",
    "language_modeling": "{{ item.context | trim }}{{ d }}{{ item.continuation }}",
}
LAST = {
    "multiple_choice": "{{ item.query }}{{ d }}{{ option }}",
    "schema": "{{ option }}{{ d }}{{ item.continuation }}",
    "language_modeling": "{{ item.context | trim }}{{ d }}{% if option %}{{ item.continuation }}{% endif %}",
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TaskModel:
    return TaskModel.in_folder(tmp_path_factory.mktemp("run"))


def examples(kind: str, count: int = 10) -> list[dict]:
    draw = np.random.default_rng(1)

    def words(longest: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(2, longest)))

    if kind == "language_modeling":
        return [{"context": f" {words(8)} \n", "continuation": words(4)} for _ in range(count)]
    gold = [int(draw.integers(3)) for _ in range(count)]
    if kind == "schema":
        return [{"context_options": [words(6) for _ in range(3)], "continuation": words(5), "gold": g} for g in gold]
    return [{"query": words(8), "choices": [words(4) for _ in range(3)], "gold": g} for g in gold]


def bundle(folder, kinds=tuple(EXAMPLE), num_fewshot: int = 2):
    """The folder as nanochat's eval_bundle has it."""
    (folder / "eval_data/group").mkdir(parents=True)
    tasks, table = [], ["Eval Task,Task Category,Random baseline"]
    for kind in kinds:
        rows = [json.dumps(row) for row in examples(kind)]
        (folder / f"eval_data/group/{kind}.jsonl").write_text("\n".join(rows) + "\n")
        task = {"label": f"my_{kind}", "dataset_uri": f"group/{kind}.jsonl", "num_fewshot": [num_fewshot]}
        tasks.append(task | {"icl_task_type": kind})
        table.append(f"my_{kind},some,{0 if kind == 'language_modeling' else 33.3}")
    tasks[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


def by_definition(model: TaskModel, kind: str, delimiter: str, num_fewshot: int) -> float:
    """The accuracy by nanochat's rules, one prompt at a time."""
    data = examples(kind)
    random.Random(1337).shuffle(data)
    right = 0
    for i, item in enumerate(data):
        shots = [data[k] for k in random.Random(1234 + i).sample([k for k in range(len(data)) if k != i], num_fewshot)]
        environment = jinja2.Environment()
        before = environment.from_string(SHOTS.replace("{{ EXAMPLE }}", EXAMPLE[kind].replace("item", "shot")))
        template = environment.from_string(LAST[kind])
        options = item[OPTIONS[kind]] if kind in OPTIONS else [False, True]
        shown = before.render(shots=shots, d=delimiter)
        texts = [shown + template.render(item=item, option=option, d=delimiter) for option in options]
        if kind == "language_modeling":
            texts[0] = texts[0].strip()
        tokens = [[model.text.eos_id, *model.text.tokenizer.encode(text).tolist()] for text in texts]
        right += is_right(model, kind, item, tokens)
    return right / len(data)


def is_right(model: TaskModel, kind: str, item: dict, tokens: list[list[int]]) -> bool:
    shortest = min(map(len, tokens))
    if kind == "schema":
        same = next(n for n in range(shortest + 1) if n == shortest or len({t[-n - 1] for t in tokens}) > 1)
        begins = [len(t) - same for t in tokens]
    else:
        same = next(n for n in range(shortest + 1) if n == shortest or len({t[n] for t in tokens}) > 1)
        begins = [same] * len(tokens)
    if kind == "language_modeling":
        tokens, begins = tokens[1:], begins[1:]
    means = []
    for ids, begin in zip(tokens, begins, strict=True):
        kept = ids[-CONTEXT:]
        begin -= len(ids) - len(kept)
        nats, predicted = model.nats_and_predictions(kept)
        if kind == "language_modeling":
            return predicted[begin - 1 :].tolist() == kept[begin:]
        means.append(nats[begin - 1 :].mean())
    return int(np.argmin(means)) == item["gold"]


@pytest.mark.parametrize("kind", EXAMPLE)
@pytest.mark.parametrize("num_fewshot", [0, 2, 5])
def test_prompts_and_numbers_are_those_of_the_definition(model, tmp_path, kind, num_fewshot):
    (task,) = core.tasks(bundle(tmp_path, (kind,), num_fewshot))
    expected = by_definition(model, kind, "\nAnswer: ", num_fewshot)
    found = core.evaluate(task, task.items(), model.text, model.score, CONTEXT)
    baseline = 0 if kind == "language_modeling" else 0.333
    assert found == {"acc": expected, "centered": pytest.approx((expected - baseline) / (1 - baseline)), "examples": 10}


def test_the_limit_takes_the_first_of_the_shuffled_examples(model, tmp_path):
    (task,) = core.tasks(bundle(tmp_path, ("schema",)))
    assert task.items(4) == task.items()[:4] != examples("schema")[:4]
    assert core.evaluate(task, task.items(4), model.text, model.score, CONTEXT)["examples"] == 4


def test_a_language_model_must_write_the_whole_continuation(model, tmp_path):
    (task,) = core.tasks(bundle(tmp_path, ("language_modeling",)))
    pairs = task.pairs([[9, 1, 2], [9, 1, 2, 3, 4]], CONTEXT)
    assert pairs == [([9, 1, 2], [3, 4])]
    assert task.pairs([[9, 1, 2], [9, 1, 5, 4]], CONTEXT) == [([9, 1], [5, 4])]  # tokens join across the border
    assert task.pairs([list(range(200)), list(range(203))], 10) == [(list(range(193, 200)), [200, 201, 202])]


def change_core(folder, old: str, new: str) -> None:
    text = (folder / "core.yaml").read_text()
    assert old in text
    (folder / "core.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "core.yaml").unlink(), "core.yaml is missing"),
        (lambda f: (f / "eval_meta_data.csv").unlink(), "eval_meta_data.csv is missing"),
        (lambda f: (f / "core.yaml").write_text(""), "is damaged"),
        (lambda f: (f / "core.yaml").write_text("{icl_tasks: ["), "is damaged"),
        (lambda f: (f / "core.yaml").write_text("icl_tasks: []"), "lists no tasks"),
        (lambda f: change_core(f, '"schema"', '"guess"'), "my_schema is of the unknown kind 'guess'"),
        (lambda f: (f / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n"), "is damaged: KeyError"),
        (lambda f: (f / "eval_data/group/schema.jsonl").unlink(), "the data of my_schema, does not exist"),
        (lambda f: (f / "eval_data/group/schema.jsonl").write_text(""), "has 0 examples, and my_schema needs more"),
        (lambda f: (f / "eval_data/group/schema.jsonl").write_text("{}\n"), "line 1 is not an example of schema"),
        (
            lambda f: (f / "eval_data/group/schema.jsonl").write_text(json.dumps(examples("schema")[0] | {"gold": 3})),
            "gold is 3, and there are 3 options",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_reported(tmp_path, break_it, said):
    break_it(bundle(tmp_path))
    with pytest.raises(DataError, match=said):
        for task in core.tasks(tmp_path):
            task.items()
