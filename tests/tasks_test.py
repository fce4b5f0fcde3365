"""launch.evaluate --tasks as a user starts it: results as a table and as JSON, several processes, mistakes."""

import json
import pathlib
import shutil
import sys

import pytest

from data import tokenizers
from data.preparation.pipeline import prepare_dataset
from tests import runs, task_models
from tests.core_test import bundle
from tests.hellaswag_test import rows, write_bin, write_jsonl

KINDS = ("multiple_choice", "schema", "language_modeling")
COMMAND = (sys.executable, "-m", "launch.evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with a trained run, a file of HellaSwag and an eval_bundle."""
    folder = tmp_path_factory.mktemp("tasks")
    bundle(folder / "eval_bundle", num_fewshot=1)
    write_jsonl(folder / "val.jsonl", rows(6))
    tokenizers.save(task_models.tokenizer(), folder / "tokenizer")
    (folder / "corpus.txt").write_text(runs.text())
    prepare_dataset(
        folder / "dataset", source=str(folder / "corpus.txt"), tokenizer=str(folder / "tokenizer/tokenizer.json")
    )
    runs.train(folder / "run", folder / "dataset", num_train_steps=1, eval__every_steps=0, sample__every_steps=0)
    return folder


def evaluate(folder: pathlib.Path, *flags: str, code: int = 0, devices: int = 1, run: str = "run") -> str:
    return runs.finish(runs.start([*COMMAND, f"--workdir={folder / run}", *flags], devices), code)


def test_a_table_and_json_have_the_same_numbers_on_any_mesh(folder):
    names = f"--tasks={folder / 'val.jsonl'},{folder / 'eval_bundle'}"
    said = evaluate(folder, names, "--limit=4")
    lines = [line.split() for line in said.splitlines()]
    row = json.loads(evaluate(folder, names, "--limit=4", "--json", devices=4).splitlines()[-1])
    assert row["step"] == 1 and list(row["tasks"]) == ["val.jsonl", *(f"my_{kind}" for kind in KINDS), "CORE"]
    centered = [row["tasks"][f"my_{kind}"]["centered"] for kind in KINDS]
    assert row["tasks"]["CORE"]["core_metric"] == pytest.approx(sum(centered) / 3)
    for task, metrics in row["tasks"].items():
        for metric, value in metrics.items():
            assert [task, metric, f"{value:.6g}"] in lines
    assert row["tasks"]["val.jsonl"]["examples"] == 4


def metrics_of_tasks(run: pathlib.Path) -> dict[int, dict[str, float]]:
    """By step, the metrics of tasks in metrics.jsonl."""
    rows = [{k: x for k, x in row.items() if k == "step" or k.startswith("task/")} for row in runs.rows(run)]
    return {row.pop("step"): row for row in rows if len(row) > 1}


def test_a_run_is_evaluated_on_tasks_while_it_trains(folder):
    """After a stop before the tasks of a step are done, the next start does them."""
    tasks = f"{folder / 'val.jsonl'},{folder / 'eval_bundle'}"
    fields = {"eval__tasks": tasks, "eval__tasks_every_steps": 2, "eval__tasks_limit": 4}
    run = folder / "watched"
    runs.train(run, folder / "dataset", num_train_steps=3, sample__every_steps=0, **fields)
    found = metrics_of_tasks(run)
    assert list(found) == [2, 3]
    row = json.loads(evaluate(folder, f"--tasks={tasks}", "--limit=4", "--json", run=run.name).splitlines()[-1])
    by_name = {f"task/{task}/{name}": x for task, results in row["tasks"].items() for name, x in results.items()}
    assert found[3] == pytest.approx(by_name, rel=1e-6)
    path = run / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"task/' not in line))
    runs.train(run, folder / "dataset", num_train_steps=3, sample__every_steps=0, **fields)
    assert metrics_of_tasks(run) == {3: found[3]}


def test_a_mistake_in_the_tasks_of_a_run_is_found_before_it_begins(folder):
    for name in ("none.jsonl", "a.jsonl,a.jsonl"):
        said = runs.train(folder / "never", folder / "dataset", code=2, eval__tasks=name)
        assert said.splitlines()[-1].startswith("error: config.eval.tasks") and not (folder / "never").exists()
    (folder / "more").mkdir()
    shutil.copyfile(folder / "val.jsonl", folder / "more/val.jsonl")
    said = runs.train(
        folder / "twice", folder / "dataset", code=2, eval__tasks=f"{folder}/val.jsonl,{folder}/more/val.jsonl"
    )
    assert "two tasks have the name val.jsonl" in said.splitlines()[-1] and not runs.rows(folder / "twice")
    (folder / "torn.jsonl").write_text("{\n")
    said = runs.train(folder / "torn", folder / "dataset", code=3, eval__tasks=folder / "torn.jsonl")
    assert "torn.jsonl, line 1 is not a question" in said.splitlines()[-1] and not runs.rows(folder / "torn")
    write_bin(folder / "gpt2.bin", [([15496], [[995], [50256]], 0)])
    said = runs.train(folder / "gpt2", folder / "dataset", code=3, eval__tasks=folder / "gpt2.bin")
    assert "outside the model's vocabulary" in said.splitlines()[-1] and not runs.rows(folder / "gpt2")


BAD_IN_TASKS = """
import runpy, sys
import jax, numpy as np
from trainer.tasks.measure import Tasks
whole = Tasks.measure
Tasks.measure = lambda self, params, *rest: whole(self, jax.tree.map(lambda x: x * np.float32("nan"), params), *rest)
sys.argv[0] = "launch.train"
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def test_a_state_whose_answers_are_not_finite_is_set_aside(folder):
    run = folder / "bad"
    fields = {"num_train_steps": 6, "checkpoint__every_steps": 2, "sample__every_steps": 0, "eval__every_steps": 0}
    of_tasks = {"eval__tasks": folder / "val.jsonl", "eval__tasks_every_steps": 4}
    (python, _, _, *flags) = runs.command(run, folder / "dataset", **fields, **of_tasks)
    said = runs.finish(runs.start([python, "-c", BAD_IN_TASKS, *flags]), code=4).splitlines()[-1]
    assert "in tasks after step 4, the model's log-probabilities are not finite; its checkpoint was set aside" in said
    assert "the last good checkpoint is step 2" in said


@pytest.mark.slow
def test_two_processes_print_the_numbers_of_one(folder):
    names = f"--tasks={folder / 'val.jsonl'},{folder / 'eval_bundle'}"
    alone = evaluate(folder, names, "--json").splitlines()[-1]
    address = f"localhost:{runs.free_port()}"
    joining = [f"--coordinator_address={address}", "--num_processes=2"]
    command = [*COMMAND, f"--workdir={folder / 'run'}", names, "--json", *joining]
    processes = [runs.start([*command, f"--process_id={i}"]) for i in range(2)]
    said = [runs.finish(process) for process in processes]
    assert json.loads(said[0].splitlines()[-1]) == json.loads(alone) and "tasks" not in said[1]
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    write_jsonl(folder / "here/val.jsonl", rows(6))
    write_jsonl(folder / "there/val.jsonl", rows(6)[::-1])
    joining[0] = f"--coordinator_address=localhost:{runs.free_port()}"
    command = [*COMMAND, f"--workdir={folder / 'run'}", "--tasks=./val.jsonl", *joining]
    others = [
        runs.start([*command, f"--process_id={i}"], cwd=folder / name, PYTHONPATH=str(runs.ROOT))
        for i, name in enumerate(("here", "there"))
    ]
    assert all("has another questions: sha256" in runs.finish(process, 2) for process in others)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--limit=3",), "--limit is for --tasks"),
        (("--tasks=",), "has an empty name"),
        (("--tasks=a/b.jsonl,a/b.jsonl",), "or a name twice"),
        (("--tasks=none/val.bin",), "none/val.bin does not exist"),
        (("--tasks=./tests",), "tests has no core.yaml; a folder is nanochat's eval_bundle"),
        (("--tasks=./README.md",), "README.md is not a .jsonl or .bin file of HellaSwag"),
        (("--tasks=x.bin", "--data_path=data"), "leave them or --tasks out"),
    ],
)
def test_a_mistake_is_one_line(folder, flags, said):
    (line,) = evaluate(folder, *flags, code=2).splitlines()
    assert line.startswith("error: ") and said in line


def test_a_damaged_file_ends_with_3(folder):
    (folder / "bad.bin").write_bytes(b"")
    assert evaluate(folder, f"--tasks={folder / 'bad.bin'}", code=3).splitlines()[-1].startswith("error: ")
