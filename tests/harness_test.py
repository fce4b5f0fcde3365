"""The answers to lm-evaluation-harness, example by example, are those of its own model for transformers."""

import json
import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from data.errors import DataError
from tests import runs, task_models
from trainer import sharding
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.interchange import importing, initial
from trainer.interchange.folder import KEPT
from trainer.interchange.source import Source
from trainer.reliability import run_directory
from trainer.state import Program
from trainer.tasks.asked import Asked
from trainer.tasks.scorer import Score, Scorer
from trainer.tasks.text import Text

# These are read when the libraries are imported: no library asks for a file that is not here.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "meshlm-datasets-cache"))
pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # threads of PyTorch and of XLA would wait for each other
transformers = pytest.importorskip("transformers")

CONTEXT = 96
# No bos, as GPT-2; a bos that is not put before texts, as SmolLM2; one that is, as Llama 3.
TOKENIZERS = {
    "eos": (task_models.tokenizer, {}),
    "bos": (task_models.tokenizer, {"bos_token": "<|endoftext|>"}),
    "added bos": (lambda: task_models.tokenizer_that_adds("<s>"), {"bos_token": "<s>"}),
}
TASKS = {  # output type: the rest of the task's file
    "multiple_choice": """
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
num_fewshot: 1
fewshot_split: test
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "loglikelihood": """
doc_to_text: "{{empty}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "generate_until": """
doc_to_text: "{{long}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["e", "zz"]
  max_gen_toks: 20
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder of tasks, one of each kind."""
    draw = np.random.default_rng(0)
    words = runs.text(3000).split()

    def text(longest: int) -> str:
        return " ".join(draw.choice(words, draw.integers(1, longest)))

    rows = [
        {
            "text": text(20), "choices": [f" {text(6)}" for _ in range(3)], "label": i % 3, "long": text(150),
            "empty": "" if i % 2 else text(4),
        }
        for i in range(8)
    ]  # fmt: skip
    rows[0]["text"] += " <|endoftext|> x "  # the name of a special token, and a space at the end
    rows[1]["text"] = "<s> and text"
    return write_tasks(tmp_path_factory.mktemp("tasks"), rows)


def write_tasks(folder: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """A folder of tasks, one of each kind, with these examples."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, rest in TASKS.items():
        write_task(folder / f"{kind}.yaml", f"tiny_{kind}", kind, rest, folder / "data.jsonl")
    return folder


def write_task(path: pathlib.Path, name: str, kind: str, rest: str, data: pathlib.Path) -> None:
    where = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    path.write_text(f"task: {name}\n{where}output_type: {kind}{rest}")


def original(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The folder of a tiny Llama with random weights, and a tokenizer."""
    make, names = TOKENIZERS[kind]
    own = make()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes, vocab_size=own.vocab_size, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=None, eos_token_id=own.eos_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(own.file()[1])
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys | names))
    return folder


def program_of(run: pathlib.Path) -> tuple[Program, dict]:
    """The program of a converted run on one device, and its parameters."""
    config: Config = run_directory.read_config(run)
    program = Program(config, sharding.mesh_of(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1]))
    return program, initial.read(Source.open(run / KEPT), program)


def of_run(run: pathlib.Path, asked: Asked):
    """Tasks of the harness for a converted run, and its parameters."""
    from trainer.tasks.harness import Harness

    program, params = program_of(run)
    return Harness(asked, Text(run), Scorer(program)), params


def ask(run: pathlib.Path, asked: Asked) -> dict:
    tasks, params = of_run(run, asked)
    return tasks.run(params)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    importing.as_run(Source.open(original(folder / "hf", "eos")), folder / "run", [])
    return folder / "run"


def assert_answers_are_those_of_transformers(run: pathlib.Path, hf: pathlib.Path, folder: pathlib.Path) -> dict:
    """Compares all answers and metrics of the tasks in `folder`; returns ours."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trainer.tasks import harness

    names = [f"tiny_{name}" for name in TASKS]
    ours = ask(run, Asked(["tiny_*"], folder))
    theirs = evaluator.simple_evaluate(
        HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=1), tasks=names, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    for name in names:
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (answer,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                is_text = isinstance(expected, str)
                assert answer == (expected if is_text else pytest.approx(expected, rel=1e-4)), (name, one["doc_id"])
        for metric, value in harness.numbers(theirs)[name].items():
            if "stderr" not in metric:  # a perplexity is the exponential of a mean, which magnifies rounding
                assert harness.numbers(ours)[name][metric] == pytest.approx(value, rel=1e-3), (name, metric)
    return ours


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_answer_is_that_of_transformers(folder, tmp_path, kind):
    hf = original(tmp_path / "hf", kind)
    importing.as_run(Source.open(hf), tmp_path / "run", [])
    ours = assert_answers_are_those_of_transformers(tmp_path / "run", hf, folder)
    texts = [answer for sample in ours["samples"]["tiny_generate_until"] for ((answer,),) in [sample["resps"]]]
    assert len(set(texts)) > 3 and any(texts)


def test_a_limit_takes_the_first_examples(folder, run):
    from trainer.tasks import harness

    found = ask(run, Asked(["tiny_multiple_choice"], folder, limit=3, num_fewshot=0))
    assert len(found["samples"]["tiny_multiple_choice"]) == 3
    assert "long" not in found["samples"]["tiny_multiple_choice"][0]["arguments"][0][0]
    assert set(harness.numbers(found)["tiny_multiple_choice"]) == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}


def test_an_answer_stops_soon_after_a_text_that_ends_it(run):
    from trainer.tasks.harness import CHUNK, make_generate

    program, params = program_of(run)
    text = Text(run)
    generate = make_generate(Scorer(program), text)
    prompts = [[5, 6, 7], [8], [9, 10]]
    whole = generate(params, prompts, until=[], max_new_tokens=5 * CHUNK, temperature=0.0)
    end = text.decode(whole[1][3:8])
    ended = generate(params, prompts, until=["never in a text", end], max_new_tokens=5 * CHUNK, temperature=0.0)
    for answer, expected in zip(ended, whole, strict=True):
        assert answer == expected[: len(answer)]
        assert len(answer) == len(expected) or end in text.decode(answer)
    assert len(ended[1]) <= 1 + CHUNK < len(whole[1])


def test_a_check_or_an_earlier_evaluation_changes_nothing(folder, run):
    tasks, params = of_run(run, Asked(["tiny_*"], folder, num_fewshot=2))
    found = tasks.run(params)
    tasks.check(lambda pairs: [Score(0.0, False, 1) for _ in pairs], print)
    again, other = tasks.run(params), ask(run, Asked(["tiny_*"], folder, num_fewshot=2))
    assert found["samples"] == again["samples"] == other["samples"] and found["results"] == again["results"]


def test_what_is_missing_or_damaged_is_reported_in_one_line(folder, run, tmp_path):
    def said(error, name: str, path=tmp_path) -> str:
        with pytest.raises(error) as e:
            of_run(run, Asked([name], path))[0].check(lambda pairs: [Score(0.0, False, 1) for _ in pairs], print)
        return str(e.value)

    assert "is not a folder with .yaml files" in said(ConfigError, "x", tmp_path / "none")
    assert "no task 'tiny_multiple_choise' among the 4 of" in said(ConfigError, "tiny_multiple_choise", folder)
    assert "such as tiny_multiple_choice" in said(ConfigError, "tiny_multiple_choise", folder)
    for name, content in {"gone": None, "empty": "", "broken": "{\n", "other": '{"a": 1}\n'}.items():
        data = tmp_path / f"{name}.jsonl"
        if content is not None:
            data.write_text(content)
        write_task(tmp_path / f"{name}.yaml", name, "multiple_choice", TASKS["multiple_choice"], data)
        assert f"--tasks={name}: " in (line := said(DataError, name)) and "\n" not in line
    (tmp_path / "wrong.yaml").write_text("task: wrong\noutput_type: multiple_choice\ndataset_path: [\n")
    assert "wrong" in said(Exception, "wrong")
    long = TASKS["generate_until"].replace("20", "96")
    write_task(tmp_path / "long.yaml", "long", "generate_until", long, folder / "data.jsonl")
    assert "asks for 96 new tokens, and the model's context has 96" in said(ConfigError, "long")
