"""GPT-2 in the files of nanoGPT and llm.c: a plain PyTorch model is written in both formats, and read back exactly."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from data.errors import DataError
from model.families.layout import Layout
from model.transformer import parameter_shapes
from trainer.errors import ConfigError
from trainer.interchange import exporting, importing
from trainer.interchange.llmc_file import LlmcFile
from trainer.interchange.nanogpt_file import NanoGptFile
from trainer.interchange.source import Source

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
nn, functional = torch.nn, torch.nn.functional

LAYERS, HEADS, WIDTH, VOCAB, LONGEST = 2, 3, 24, 70, 40


class Plain(nn.Module):
    """GPT-2 with the parameter names of nanoGPT and llm.c's train_gpt2.py."""

    def __init__(self, bias: bool, gelu: str):
        super().__init__()
        self.gelu = gelu

        def norm():
            return nn.LayerNorm(WIDTH, eps=1e-5, bias=bias)

        def linear(n, m):
            return nn.Linear(n, m, bias=bias)

        blocks = [
            nn.ModuleDict({
                "ln_1": norm(), "ln_2": norm(),
                "attn": nn.ModuleDict({"c_attn": linear(WIDTH, 3 * WIDTH), "c_proj": linear(WIDTH, WIDTH)}),
                "mlp": nn.ModuleDict({"c_fc": linear(WIDTH, 4 * WIDTH), "c_proj": linear(4 * WIDTH, WIDTH)}),
            })
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(VOCAB, WIDTH), "wpe": nn.Embedding(LONGEST, WIDTH), "h": nn.ModuleList(blocks),
            "ln_f": norm(),
        })  # fmt: skip
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                around = 1 if ".ln_" in name and name.endswith("weight") else 0
                parameter.copy_(around + 0.4 * torch.randn_like(parameter))

    def forward(self, ids):
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(ids.shape[1]))
        for block in t.h:
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            )
            scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
            scores = scores.masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -math.inf)
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(functional.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=self.gelu))
        return self.lm_head(t.ln_f(x))


def nanogpt(path: pathlib.Path, model: Plain, *, bias: bool, **changes) -> None:
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    arguments = {
        "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LONGEST, "bias": bias, "vocab_size": VOCAB,
        "dropout": 0.1,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    content = {"model": state, "optimizer": optimizer, "model_args": arguments, "iter_num": 7,
               "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x", "compile": True}}  # fmt: skip
    torch.save(content | changes, path)


def llmc(path: pathlib.Path, model: Plain, version: int) -> None:
    """As write_model and write_tensors of llm.c's train_gpt2.py."""
    state = model.state_dict()
    dtype = torch.bfloat16 if version == 5 else torch.float32
    padded = VOCAB if version == 1 else 128
    header = np.zeros(256, "<i4")
    header[:8] = (20240326, version, LONGEST, VOCAB, LAYERS, HEADS, WIDTH, 0 if version == 1 else padded)
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{i}.{part}.{kind}" for i in range(LAYERS)]
    with path.open("wb") as f:
        f.write(header.tobytes())
        for name in [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]:
            tensor = state[name]
            if name == names[0]:
                tensor = functional.pad(tensor, (0, 0, 0, padded - VOCAB), value=9.0)  # rows that must not be read
            f.write(tensor.to(dtype).contiguous().view(torch.int16 if version == 5 else torch.int32).numpy().tobytes())


def params_of(source: Source) -> dict:
    shapes = parameter_shapes(source.model)
    layout = Layout(source.family, source.model, shapes)
    read = source.reader(layout)
    flat = {path: layout.parameter(read, path, (slice(None),) * len(shape)) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict({path: jnp.asarray(p) for path, p in flat.items()}, sep=".")


def largest_difference(source: Source, model: Plain) -> float:
    """Of logits, as a fraction of the largest logit."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, LONGEST))
    with torch.no_grad():
        expected = model(torch.as_tensor(ids)).numpy()
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(tiny_models.jitted_forward(source.model)(params_of(source), ids.astype(np.int32)))
    return np.abs(actual[..., :VOCAB] - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_of_nanogpt_computes_the_same(bias, tmp_path):
    model = Plain(bias, "none")
    nanogpt(tmp_path / "ckpt.pt", model, bias=bias)
    source = Source.open(tmp_path / "ckpt.pt")
    assert source.unused == [] and source.model.bias is bias
    assert largest_difference(source, model) < 1e-5


@pytest.mark.parametrize("version", [1, 3, 5])
def test_a_model_of_llmc_computes_the_same(version, tmp_path):
    model = Plain(True, "tanh")
    if version == 5:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
    llmc(tmp_path / "model.bin", model, version)
    source = Source.open(tmp_path / "model.bin")
    assert source.unused == [] and source.model.vocab_size == VOCAB
    assert largest_difference(source, model) < 1e-5


def test_any_slice_is_that_of_the_tensor(tmp_path):
    model = Plain(True, "tanh")
    nanogpt(tmp_path / "ckpt.pt", model, bias=True)
    llmc(tmp_path / "model.bin", model, 3)
    state, draw = model.state_dict(), np.random.default_rng(0)
    for opened in (NanoGptFile(tmp_path / "ckpt.pt"), LlmcFile(tmp_path / "model.bin")):
        for name, shape in opened.shapes.items():
            whole = state[name].numpy()
            whole = whole.T if ".c_" in name and name.endswith("weight") else whole
            assert whole.shape == shape
            bounds = [sorted(draw.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(opened.read(name, index), whole[index], err_msg=name)


def test_without_biases_it_goes_out_with_zeros(tmp_path):
    """Hugging Face's GPT-2 always has biases; transformers computes the same logits."""
    transformers = pytest.importorskip("transformers")
    model = Plain(False, "none")
    nanogpt(tmp_path / "ckpt.pt", model, bias=False)
    source = Source.open(tmp_path / "ckpt.pt")
    importing.as_run(source, tmp_path / "run", ["x"])
    copied = Source.open(tmp_path / "run/hf")
    params = params_of(copied)
    exporting.export(
        tmp_path / "out",
        exporting.of_arrays(lambda _: params, copied.model),
        copied.model,
        None,
        dtype="float32",
        card="",
    )
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(LONGEST)[None]
    with torch.no_grad():
        ours, got = model(ids), theirs(ids).logits
    assert (ours - got).abs().max() < 1e-5 * ours.abs().max()


class Harmful:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("harmed"),)


def test_files_that_are_not_such_models_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Plain(True, "tanh")

    def refused(kind, name: str, *parts: str) -> None:
        with pytest.raises((ConfigError, DataError)) as e:
            kind(tmp_path / name)
        assert "\n" not in str(e.value) and name in str(e.value)
        for part in parts:
            assert part in str(e.value)

    nanogpt(tmp_path / "code.pt", model, bias=True, config=Harmful())
    refused(NanoGptFile, "code.pt", "more than tensors")
    assert not (tmp_path / "harmed").exists()
    nanogpt(tmp_path / "fork.pt", model, bias=True, model_args={"use_rmsnorm": True, **dict.fromkeys((
        "n_layer", "n_head", "n_embd", "block_size", "vocab_size"), 8)})  # fmt: skip
    refused(NanoGptFile, "fork.pt", "use_rmsnorm = True, which nanoGPT does not have")
    nanogpt(tmp_path / "lacks.pt", model, bias=True, model_args={"n_layer": 2})
    refused(NanoGptFile, "lacks.pt", "lacks n_head")
    torch.save({"state": 1}, tmp_path / "other.pt")
    refused(NanoGptFile, "other.pt", "not a checkpoint of nanoGPT")
    torch.save({"model": {"a": 1}, "model_args": {"n_layer": 1}}, tmp_path / "number.pt")
    refused(NanoGptFile, "number.pt", "'a' of its model is not a tensor of floating-point numbers")
    torch.save({"model": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(NanoGptFile, "old.pt", "PyTorch 1.6 or later")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(NanoGptFile, "tensor.pt", "not a checkpoint of nanoGPT")
    whole = (tmp_path / "lacks.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    refused(NanoGptFile, "half.pt", "is damaged")
    refused(NanoGptFile, "nothing.pt", "does not exist")

    llmc(tmp_path / "whole.bin", model, 3)
    whole = (tmp_path / "whole.bin").read_bytes()
    for name, content, said in (
        ("short.bin", whole[:-4], "copy it again"),
        ("long.bin", whole + b"1234", "copy it again"),
        ("token.bin", np.array([20240520, 1, 5], "<i4").tobytes() + whole[12:], "is not a model of llm.c"),
        ("empty.bin", b"", "is not a model of llm.c"),
        ("new.bin", whole[:4] + b"\7\0\0\0" + whole[8:], "version 7"),
        ("zero.bin", whole[:16] + bytes(4) + whole[20:], "which no model has"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(LlmcFile, name, said)
    refused(LlmcFile, "nothing.bin", "does not exist")
