"""Adapters of PEFT's folders: PEFT's own models compute the same, in both directions; a whole run with adapters."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from flax import traverse_util

from data.errors import DataError
from model.transformer import merged
from tests import runs
from tests.gpt2_files_test import params_of
from trainer.errors import ConfigError
from trainer.interchange import peft
from trainer.interchange.source import Source

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # threads of PyTorch and of XLA would wait for each other
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("peft")

VOCAB = 131
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 12}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {  # class, sizes, and the arguments of PEFT's LoraConfig
    "llama": ("Llama", SIZES | HEADS, {"r": 4, "lora_alpha": 10, "target_modules": LLAMA_ALL}),
    "some": ("Llama", SIZES | HEADS, {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}),
    "ranks": (
        "Qwen3",
        SIZES | HEADS,
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"self_attn.q_proj": 5},
        },
    ),
    "rslora": ("Llama", SIZES | HEADS, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LLAMA_ALL}),
    "gpt2": (
        "GPT2", GPT2,
        {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
}  # fmt: skip


def made(name: str, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of a random model of transformers, and of random adapters that PEFT has saved."""
    kind, sizes, lora = MODELS[name]
    torch.manual_seed(0)
    name_of_class = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    base = getattr(transformers, name_of_class)(getattr(transformers, f"{kind}Config")(**sizes))
    base.save_pretrained(folder / "base")
    adapted = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapters")
    return folder / "base", folder / "adapters"


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, 40)).astype(np.int32)


def logits_of_peft(base: pathlib.Path, adapters: pathlib.Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = library.PeftModel.from_pretrained(model, adapters).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens().astype(np.int64))).logits.numpy()


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_pefts_adapters_compute_the_same_here_and_go_out_as_they_came(name, tmp_path):
    base, adapters = made(name, tmp_path)
    source = Source.open(base)
    lora, arrays = peft.read(adapters, source.model)
    model = source.model.__class__(**{**vars(source.model), "lora": lora})
    expected = logits_of_peft(base, adapters)
    flat = traverse_util.flatten_dict(params_of(source), sep=".") | arrays
    params = traverse_util.unflatten_dict(flat, sep=".")
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(tiny_models.jitted_forward(model)(params, tokens()))[..., :VOCAB]
        plain = np.asarray(tiny_models.jitted_forward(source.model)(merged(params, lora), tokens()))[..., :VOCAB]
        without = np.asarray(tiny_models.jitted_forward(source.model)(params_of(source), tokens()))[..., :VOCAB]
    assert close(ours, expected) and close(plain, expected) and not close(without, expected)
    peft.write(tmp_path / "out", arrays, model, "base")
    assert close(logits_of_peft(base, tmp_path / "out"), expected)
    again, there = peft.read(tmp_path / "out", source.model)
    if name == "gpt2":  # the adapter of queries, keys and values has come back with three times the rank
        assert again.rank == 3 * lora.rank
        return
    assert again == lora and there.keys() == arrays.keys()
    assert all(np.array_equal(there[path], arrays[path]) for path in arrays)


def test_adapters_of_joined_projections_that_differ_go_out(tmp_path):
    """Adapters that came from PEFT share the A of queries, keys and values; those that were trained here do not."""
    base, adapters = made("gpt2", tmp_path)
    source = Source.open(base)
    lora, arrays = peft.read(adapters, source.model)
    draw = np.random.default_rng(0)
    arrays = {path: draw.normal(0, 0.3, array.shape).astype(np.float32) for path, array in arrays.items()}
    model = source.model.__class__(**{**vars(source.model), "lora": lora})
    flat = traverse_util.flatten_dict(params_of(source), sep=".") | arrays
    with jax.default_matmul_precision("highest"):
        ours = tiny_models.jitted_forward(model)(traverse_util.unflatten_dict(flat, sep="."), tokens())
    peft.write(tmp_path / "out", arrays, model, "base")
    assert close(np.asarray(ours)[..., :VOCAB], logits_of_peft(base, tmp_path / "out"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no config", "adapter_config.json"),
        ("prompt tuning", "peft_type is 'PROMPT_TUNING'"),
        ("dora", "use_dora is True, which is not supported"),
        ("pissa", "init_lora_weights is 'pissa', which is not supported"),
        ("alora", "alora_invocation_tokens is [5], which is not supported"),
        ("later", "use_magic is True, which is not supported"),
        ("bias", "bias is 'all', which is not supported"),
        ("one layer", "model.layers.1.self_attn.q_proj has no adapter, other layers have"),
        ("more layers", "is of another model: this one has no model.layers.7.self_attn.q_proj"),
        ("wider", "model.layers.0.self_attn.q_proj maps 32 to 50 values, 32 to 48 here"),
        ("half", "A and B of model.layers.2.self_attn.q_proj do not fit together"),
        ("another rank", "says rank 8 and lora_alpha 3 of"),
        ("a full matrix", "holds base_model.model.lm_head.weight, which is not an adapter"),
        ("empty", "holds no adapters"),
        ("truncated", "cannot be read"),
    ],
)
def test_other_adapters_are_refused_in_one_line(fault, words, tmp_path):
    base, adapters = made("some", tmp_path)
    config = json.loads((adapters / peft.CONFIG).read_text())
    tensors = safetensors.numpy.load_file(adapters / peft.TENSORS)
    query = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    config |= {
        "prompt tuning": {"peft_type": "PROMPT_TUNING"}, "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"}, "alora": {"alora_invocation_tokens": [5]},
        "later": {"use_magic": True}, "bias": {"bias": "all"},
        "another rank": {"r": 8},
    }.get(fault, {})  # fmt: skip
    if fault == "one layer":
        tensors = {name: x for name, x in tensors.items() if ".layers.1.self_attn" not in name}
    elif fault == "more layers":
        tensors |= {query.format(7, x): tensors[query.format(0, x)] for x in "AB"}
    elif fault == "wider":
        tensors[query.format(0, "B")] = np.zeros((50, 2), np.float32)
    elif fault == "half":
        del tensors[query.format(2, "B")]
    elif fault == "a full matrix":
        tensors["base_model.model.lm_head.weight"] = np.zeros((VOCAB, 32), np.float32)
    elif fault == "empty":
        tensors = {}
    (adapters / peft.CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, adapters / peft.TENSORS)
    if fault == "no config":
        (adapters / peft.CONFIG).unlink()
    elif fault == "truncated":
        (adapters / peft.TENSORS).write_bytes((adapters / peft.TENSORS).read_bytes()[:-9])
    with pytest.raises((ConfigError, DataError)) as e:
        peft.read(adapters, Source.open(base).model)
    assert words in str(e.value) and "\n" not in str(e.value)


# The whole path


def convert(*flags: str, code: int = 0) -> str:
    return runs.finish(runs.start([runs.sys.executable, "-m", "launch.convert", *flags]), code)


def test_a_run_with_adapters_is_resumed_exported_and_begun_with(tmp_path):
    data = runs.dataset(tmp_path)
    base, run, whole, more = (tmp_path / name for name in ("base", "run", "whole", "more"))
    torch.manual_seed(0)
    vocab_size = json.loads((data / "manifest.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(**SIZES | HEADS | {"vocab_size": vocab_size})
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    fields = {
        "init_from": base, "model__lora__rank": 4, "model__lora__targets": "layers.attention.*,layers.mlp.down",
        "model__lora__dropout": 0.1, "num_train_steps": 20, "checkpoint__every_steps": 4, "optimizer__peak_lr": 0.02,
        "optimizer__warmup_steps": 2, "sample__prompt": "a", "sample__max_new_tokens": 8,
    }  # fmt: skip
    said = runs.train(whole, data, **fields)
    assert "of which" in said and "are trained" in said
    runs.train_through_a_kill(run, data, count=12, **fields)
    assert runs.losses(run) == runs.losses(whole)
    losses = [row["train/loss"] for row in runs.rows(run) if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.05
    refused = runs.train(run, data, code=2, **fields | {"model__lora__rank": 8})
    assert "config.model.lora.rank: 4 -> 8" in refused

    convert(f"--workdir={run}", f"--to_hf={tmp_path / 'merged'}")
    convert(f"--workdir={run}", f"--to_peft={tmp_path / 'adapters'}")
    ids = torch.arange(40)[None] % vocab_size
    with torch.no_grad():
        whole_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits.numpy()
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        before = model(ids).logits.numpy()
        with_adapters = library.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()(ids).logits.numpy()
    assert close(with_adapters, whole_model) and not close(before, whole_model)

    # A run that begins with the adapters of the folder has the loss of one that begins with the merged weights.
    del fields["model__lora__rank"], fields["model__lora__targets"], fields["model__lora__dropout"]
    one = {**fields, "num_train_steps": 1}
    runs.train(more, data, init_adapters=tmp_path / "adapters", **one)
    runs.train(tmp_path / "full", data, **one | {"init_from": run})
    first = [runs.rows(path)[0]["train/loss"] for path in (more, tmp_path / "full")]
    assert first[0] == pytest.approx(first[1], rel=1e-5) and abs(first[0] - losses[0]) > 0.05
    assert "began with" in runs.train(more, data, code=2, init_adapters=base, **one)
    assert "did not begin from other weights" in runs.train(tmp_path / "new", data, num_train_steps=1) + runs.train(
        tmp_path / "new", data, code=2, num_train_steps=2, init_from=base
    )
    assert "has no adapters" in convert(f"--workdir={tmp_path / 'full'}", f"--to_peft={tmp_path / 'none'}", code=2)
    shutil.rmtree(tmp_path / "adapters")  # it is read at the first start only
    assert "Resuming after step 1" in runs.train(more, data, **one | {"num_train_steps": 2})
