"""launch.convert and config.init_from: weights are exported and imported bit for bit, and a run starts from them."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from data import dataset
from data.config import DataConfig
from data.errors import DataError
from data.preparation.pipeline import prepare_dataset
from tests import runs
from tests.gpt2_files_test import params_of
from trainer.errors import ConfigError
from trainer.interchange import initial
from trainer.interchange.source import Source

MODEL = {"model.num_kv_heads": 2, "model.tie_embeddings": False, "model.rope_theta": 500.0}


def convert(*flags: str, code: int = 0, before: str = "") -> str:
    """Returns what launch.convert prints; `before` is a line of shell that is run first."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "launch.convert", *flags))
    return runs.finish(runs.start(["bash", "-c", f"{before}\nexec {words}"]), code)


def train(run: pathlib.Path, data: pathlib.Path, *, devices: int = 1, code: int = 0, **fields) -> str:
    return runs.finish(runs.start(runs.command(run, data, **fields), devices), code)


def rows(run: pathlib.Path, name: str = "train/loss") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in lines if name in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """(run directory, dataset) of a model with the architecture of Llama."""
    folder = tmp_path_factory.mktemp("trained")
    data = runs.dataset(folder)
    train(
        folder / "run",
        data,
        num_train_steps=20,
        optimizer__peak_lr=0.01,
        optimizer__warmup_steps=2,
        **{k.replace(".", "__"): v for k, v in MODEL.items()},
    )
    return folder / "run", data


@pytest.fixture(scope="module")
def exported(trained) -> pathlib.Path:
    target = trained[0].parent / "hf"
    said = convert(f"--workdir={trained[0]}", f"--to_hf={target}")
    assert "step 20 as llama" in said and "read back" in said
    return target


def test_out_in_and_out_again_is_the_same_file(exported, tmp_path):
    said = convert(f"--from_hf={exported}", f"--workdir={tmp_path / 'run'}")
    assert "llama: 21 tensors, 21 of F32" in said and "not used" not in said
    convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'again'}")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (exported / "config.json").read_text()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "run"]  # nothing temporary is left


def test_the_card_says_what_the_weights_are(exported, trained):
    card = (exported / "README.md").read_text()
    assert "after 20 steps" in card and str(trained[1]) in card
    assert f"validation loss: {rows(trained[0], 'val/loss')[-1]:.4f}" in card


def test_bfloat16_is_the_nearest(exported, trained, tmp_path):
    convert(f"--workdir={trained[0]}", f"--to_hf={tmp_path / 'half'}", "--dtype=bfloat16")
    full, half = (safetensors.numpy.load_file(p / "model.safetensors") for p in (exported, tmp_path / "half"))
    for name, value in full.items():
        np.testing.assert_array_equal(half[name], value.astype(half[name].dtype), err_msg=name)
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_run_begins_with_weights_on_any_mesh_and_is_resumed_without_naming_them(exported, trained, tmp_path):
    """The run's configuration has another architecture, which the weights override. The first loss is about that of the
    trained model."""
    run, data = trained
    losses = {}
    for name, source, devices in (("run", f"{run}:20", 1), ("hf", exported, 1), ("fsdp", exported, 4)):
        mesh = {"mesh__data": 1, "mesh__fsdp": -1}
        train(tmp_path / name, data, devices=devices, num_train_steps=3, init_from=source, **mesh)
        losses[name] = rows(tmp_path / name)
    assert losses["run"] == losses["hf"]
    np.testing.assert_allclose(losses["fsdp"], losses["hf"], rtol=1e-6)
    assert losses["hf"][0] == pytest.approx(rows(run)[-1], abs=0.2) and rows(run)[0] > losses["hf"][0] + 1
    shutil.move(exported, exported.with_name("moved"))  # the run does not need the weights any more
    try:
        assert "Resuming after step 3" in train(tmp_path / "hf", data, num_train_steps=5)
    finally:
        shutil.move(exported.with_name("moved"), exported)
    assert len(rows(tmp_path / "hf")) == 5
    assert sorted(p.name for p in (tmp_path / "hf/hf").iterdir()) == ["config.json", "generation_config.json"]
    said = train(tmp_path / "hf", data, num_train_steps=6, init_from=f"{run}:20", code=2)
    assert f"began from {exported}, not from config.init_from = {run}:20" in said


def test_a_converted_run_is_trained_where_it_is(exported, trained, tmp_path):
    hf, template = tmp_path / "hf", "additional_chat_templates/rag.jinja"
    shutil.copytree(exported, hf)
    (hf / template).parent.mkdir()
    (hf / template).write_text("{{ messages }}")
    convert(f"--from_hf={hf}", f"--workdir={tmp_path / 'run'}")
    train(tmp_path / "run", trained[1], num_train_steps=3, optimizer__peak_lr=2e-3)
    train(tmp_path / "other", trained[1], num_train_steps=3, optimizer__peak_lr=2e-3, init_from=hf)
    assert rows(tmp_path / "run") == rows(tmp_path / "other")
    convert(f"--workdir={tmp_path / 'other'}", f"--to_hf={tmp_path / 'out'}")
    for folder in ("run/hf", "other/hf", "out"):
        assert (tmp_path / folder / template).read_text() == "{{ messages }}"
    assert "Resuming after step 3" in train(tmp_path / "run", trained[1], num_train_steps=4, optimizer__peak_lr=2e-3)


def test_a_converted_run_keeps_its_first_weights(exported, trained, tmp_path):
    """They can be evaluated, exported and used as config.init_from, also after training, and after the run was moved;
    a flipped bit in them is found."""

    def loss(run: pathlib.Path, *flags: str, code: int = 0) -> str:
        words = [sys.executable, "-m", "launch.evaluate", f"--workdir={run}", "--json", *flags]
        return runs.finish(runs.start(words), code).splitlines()[-1]

    convert(f"--from_hf={exported}", f"--workdir={tmp_path / 'first'}")
    run = pathlib.Path(shutil.move(tmp_path / "first", tmp_path / "run"))
    before = loss(run, f"--data_path={trained[1]}")
    assert json.loads(before)["step"] == 0
    named = json.loads(before)["val/loss"]
    assert named == pytest.approx(rows(trained[0], "val/loss")[-1], abs=0.1)  # the context is longer here
    train(tmp_path / "tuned", trained[1], num_train_steps=2, init_from=run)
    train(run, trained[1], num_train_steps=2)
    assert rows(tmp_path / "tuned") == rows(run)
    assert json.loads(loss(run))["step"] == 2
    assert json.loads(loss(run, "--step=0"))["val/loss"] == pytest.approx(named, rel=1e-6)
    train(tmp_path / "again", trained[1], num_train_steps=2, init_from=f"{run}:0")
    assert rows(tmp_path / "again") == rows(run)
    # The command that began a run resumes it, although the weights that it names have been trained since.
    assert "Resuming after step 2" in train(tmp_path / "tuned", trained[1], num_train_steps=3, init_from=run)
    convert(f"--workdir={run}", "--step=0", f"--to_hf={tmp_path / 'out'}")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/2")
    for flags in ([], ["--step=2"]):  # a run that lost its steps is not the untrained model
        assert "holds no finished checkpoint" in loss(run, f"--data_path={trained[1]}", *flags, code=3)
    said = train(tmp_path / "lost", trained[1], num_train_steps=2, init_from=run, code=2)
    assert "has no checkpoint at step 0" in said or "holds no finished checkpoint" in said
    weights = run / "hf/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    said = loss(run, "--step=0", f"--data_path={trained[1]}", code=3)
    assert "is not what was converted (checksum); convert the weights again" in said and "Traceback" not in said
    said = convert(f"--from_hf={run / 'hf'}", f"--workdir={tmp_path / 'copy'}", code=3)
    assert "is not what was converted (checksum)" in said and not (tmp_path / "copy").exists()


def test_transformers_computes_the_loss_of_a_run_with_its_bpe_tokenizer(tmp_path):
    """It splits the validation text into the same tokens, and computes the loss that launch.evaluate prints."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(runs.text())
    prepare_dataset(tmp_path / "data", source=str(corpus), tokenizer="bpe:300")
    train(tmp_path / "run", tmp_path / "data", num_train_steps=20, optimizer__peak_lr=0.01, optimizer__warmup_steps=2)
    said = runs.finish(runs.start([sys.executable, "-m", "launch.evaluate", f"--workdir={tmp_path / 'run'}", "--json"]))
    convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = np.concatenate(dataset.open_dataset(DataConfig(path=str(tmp_path / "data"))).files("val").shards).astype(
        np.int64
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["add_bos_token"] is False
    text = tokenizer.decode(tokens)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.tolist() and text[:500] in runs.text()
    length, nats = runs.TINY["data.seq_len"], 0.0
    with torch.no_grad():
        for first in range(0, len(tokens) - 1, length):
            window = torch.as_tensor(tokens[first : first + length + 1])
            logits = model(window[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert json.loads(said.splitlines()[-1])["val/loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)


def test_new_tokens_get_the_mean_and_other_tokenizers_are_refused(exported, trained, tmp_path):
    run, _ = trained
    grown, other = tmp_path / "grown", tmp_path / "other"
    tokenizer = json.loads((run / "tokenizer/meshlm_tokenizer.json").read_text())
    assert tokenizer["kind"] == "char"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(chr(c) for c in range(1000, 1040)) * 200)
    subprocess.run(
        [sys.executable, "-m", "launch.prepare", f"--source={corpus}", "--tokenizer=char", f"--out={other}"],
        cwd=runs.ROOT, check=True, capture_output=True,
    )  # fmt: skip
    said = train(grown, other, num_train_steps=2, init_from=run, code=2)
    assert "was trained with another tokenizer: token 0 is" in said and f"--tokenizer={run}" in said
    assert not grown.exists()
    # The same of weights whose tokenizer was named when they were converted.
    convert(f"--from_hf={exported}", f"--workdir={tmp_path / 'in'}", f"--tokenizer={run}")
    for place, flags in ((grown, {"init_from": tmp_path / "in"}), (tmp_path / "in", {})):
        said = train(place, other, num_train_steps=2, code=2, **flags)
        assert "was trained with another tokenizer: token 0 is" in said
    assert (tmp_path / "in/tokenizer/meshlm_tokenizer.json").read_bytes() == (
        run / "tokenizer/meshlm_tokenizer.json"
    ).read_bytes()
    said = runs.finish(runs.start([sys.executable, "-m", "launch.evaluate", f"--workdir={tmp_path / 'in'}"]), 2)
    assert "was not trained on data; name some with --data_path" in said


# --- bad input ---


def broken(exported: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(exported, folder / "model"))


def edit(folder: pathlib.Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "lama"}, ["'lama'", "gpt2, llama, mistral", "the nearest is llama"]),
        ({"model_type": None}, ["model_type is None", "gpt2, llama"]),
        ({"hidden_act": "relu"}, ["hidden_act is 'relu'", "'silu'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type is 'longrope'", "llama3"]),
        ({"num_attention_heads": 3, "head_dim": None}, ["num_heads"]),
        ({"hidden_size": "32"}, ["hidden_size is '32'", "a number above 0"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
            ["factor of the rope parameters is None; it must be a number"],
        ),
        ({"rope_scaling": "x", "rope_parameters": None}, ["the rope parameters are 'x'"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            ["rope_parameters and rope_scaling disagree"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_parameters and rope_scaling disagree"]),
        ({"rope_theta": None, "rope_parameters": None}, ["rope_theta of the rope parameters is None"]),
        ({"num_hidden_layers": 2.0}, ["num_layers would be 2.0", "a whole number"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "more than any model"]),
        ({"max_position_embeddings": float("inf")}, ["max_position_embeddings is inf"]),
        ({"tie_word_embeddings": None}, ["tie_embeddings would be None", "true or false"]),
        ({"tie_word_embeddings": "false"}, ["tie_embeddings would be 'false'", "true or false"]),
        ({"attention_bias": "no"}, ["qkv_bias would be 'no'", "true or false"]),
        ({"num_key_value_heads": [2]}, ["num_kv_heads would be [2]", "a whole number"]),
        ({"hidden_act": ["silu"]}, ["hidden_act is ['silu']"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_done_is_named(exported, tmp_path, keys, said):
    folder = broken(exported, tmp_path)
    edit(folder, **keys)
    for refused in (Source.open, lambda path: initial.model_of(str(path))):
        with pytest.raises(ConfigError) as e:
            refused(folder)
        assert "\n" not in str(e.value)
        for part in said:
            assert part in str(e.value)


def test_keys_that_mean_nothing_here_are_named(exported, tmp_path):
    folder = broken(exported, tmp_path)
    edit(folder, rope_theta_of_tomorrow=3, use_cache=False)
    assert Source.open(folder).unused == ["rope_theta_of_tomorrow"]


def tensors(folder: pathlib.Path, change) -> None:
    """Rewrites the weights of a folder."""
    path = folder / "model.safetensors"
    content = safetensors.numpy.load_file(path)
    change(content)
    safetensors.numpy.save_file(content, path, metadata={"format": "pt"})


def rename(content) -> None:
    content["model.norm.scale"] = content.pop("model.norm.weight")
    content["model.embed_tokens.weight"] = content["model.embed_tokens.weight"][:-1]


def quantise(content) -> None:
    content["lm_head.weight"] = content["lm_head.weight"].astype(np.int8)


def test_all_that_is_wrong_with_the_tensors_is_listed_at_once(exported, tmp_path):
    folder = broken(exported, tmp_path)
    tensors(folder, rename)
    said = convert(f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}", code=2)
    for part in (
        "model.norm.weight is missing",
        "model.norm.scale is not known",
        "model.embed_tokens.weight is [",
        ", not [",
    ):
        assert part in said
    assert not (tmp_path / "run").exists() and len(list(tmp_path.iterdir())) == 1


def test_files_that_cannot_be_read_are_named(exported, tmp_path):
    def said_of(change) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = broken(exported, tmp_path)
        change(folder)
        with pytest.raises((ConfigError, DataError)) as e:
            Source.open(folder)
        assert "\n" not in str(e.value)
        return str(e.value)

    def index(folder, **content) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    def truncate(folder) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def pickle(folder) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    assert "cannot be read" in said_of(truncate)
    assert "a pickle" in said_of(pickle) and "save_pretrained" in said_of(pickle)
    assert "holds no weights" in said_of(lambda folder: (folder / "model.safetensors").unlink())
    assert "config.json does not exist" in said_of(lambda folder: (folder / "config.json").unlink())
    assert "is not a JSON object" in said_of(lambda folder: (folder / "config.json").write_text("[]"))
    assert "not floating-point" in said_of(lambda folder: tensors(folder, quantise))
    assert "1 of 1 files that are not there, such as b.safetensors" in said_of(
        lambda folder: index(folder, weight_map={"x": "b.safetensors"})
    )
    assert "not a file of its own folder" in said_of(lambda folder: index(folder, weight_map={"x": "../b.safetensors"}))
    assert "lacks x" in said_of(lambda folder: index(folder, weight_map={"x": "model.safetensors"}))


def test_a_head_that_is_tied_and_yet_another_is_refused(exported, tmp_path):
    folder = broken(exported, tmp_path)
    edit(folder, tie_word_embeddings=True)
    said = convert(f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}", code=2)
    assert "lm_head.weight differs from model.embed_tokens.weight" in said and "tie_word_embeddings" in said


def test_files_that_contradict_each_other_are_refused(exported, tmp_path):
    def twice(content) -> None:
        content["norm.weight"] = 5 * content["model.norm.weight"]

    def shorter(content) -> None:
        content["lm_head.weight"] = content["lm_head.weight"][:-1]

    def said_of(change, **keys) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = broken(exported, tmp_path)
        edit(folder, **keys)
        tensors(folder, change)
        with pytest.raises(ConfigError) as e:
            params_of(Source.open(folder))
        return str(e.value)

    assert "holds one tensor twice, as model.norm.weight and as norm.weight" in said_of(twice)
    assert "lm_head.weight is [" in said_of(shorter, tie_word_embeddings=True)
    shutil.copyfile(tmp_path / "model/model.safetensors", tmp_path / "model/b.safetensors")
    index = {"weight_map": {"model.norm.weight": "b.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index\.json names other files"):
        Source.open(tmp_path / "model")


def test_a_full_disk_leaves_nothing(trained, tmp_path):
    said = convert(f"--workdir={trained[0]}", f"--to_hf={tmp_path / 'hf'}", code=3, before="ulimit -f 16")
    assert f"{tmp_path / 'hf'}: File too large" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name one of --from_hf=DIR, --from_gguf=FILE"),
        (["--to_hf=a", "--from_hf=b"], "name one of --from_hf=DIR, --from_gguf=FILE"),
        (["--to_hf=a"], "--workdir is missing"),
        (["--from_hf=nothing", "--workdir=w"], "nothing is not a folder"),
        (["--from_hf={run}", "--workdir=w"], "is a run, not a folder of Hugging Face"),
        (["--from_gguf={hf}", "--workdir=w"], "is not a .gguf file; --from_hf reads a folder"),
        (["--from_hf={hf}", "--workdir=w", "--step=3"], "--step is of an export"),
        (["--to_hf={run}", "--workdir={run}"], "exists; name a folder that does not"),
        (["--from_hf={hf}", "--workdir={run}"], "exists; name a --workdir that does not"),
        (["--to_hf={link}", "--workdir={run}"], "exists; name a folder that does not"),
        (["--from_hf={hf}", "--workdir={link}"], "exists; name a --workdir that does not"),
    ],
    ids=str,
)
def test_flags_that_are_wrong_end_in_one_line(trained, exported, tmp_path, flags, said):
    (link := tmp_path / "link").symlink_to("nothing")
    out = convert(*(flag.format(run=trained[0], hf=exported, link=link) for flag in flags), code=2)
    assert said in out and "Traceback" not in out and link.is_symlink()


def test_a_model_that_no_family_has_is_not_exported(trained, tmp_path):
    train(tmp_path / "run", trained[1], num_train_steps=1, model__mlp="relu2", model__norm="layernorm")
    said = convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}", code=2)
    assert "cannot be exported" in said and "llama: mlp = relu2" in said and not (tmp_path / "hf").exists()
