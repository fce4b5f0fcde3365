"""Files of llama.cpp: its own package writes them here, in its own order, and they are read back slice by slice."""

import json
import pathlib

import numpy as np
import pytest
import tiny_models

from data.errors import DataError
from model import families
from model.config import ModelConfig
from model.families.layout import Layout
from trainer.errors import ConfigError
from trainer.interchange.gguf_file import GPT2_NAMES, LLAMA_NAMES, GgufFile

gguf = pytest.importorskip("gguf")

SHAPE = {"num_layers": 2, "num_heads": 4, "vocab_size": 70, "max_seq_len": 24, "init_depth_scale": False}
MODELS = {
    "llama": ModelConfig(
        **SHAPE, embed_dim=32, num_kv_heads=2, head_dim=16, mlp_dim=64, tie_embeddings=False, rope_theta=500.0,
        qkv_bias=True, out_bias=True, mlp_bias=False, norm_eps=1e-6,
    ),
    "gpt2": ModelConfig(
        **SHAPE | {"init_depth_scale": True}, embed_dim=32, mlp="gelu", mlp_dim=96, norm="layernorm", bias=True,
        position="learned",
    ),
}  # fmt: skip
PREFIX = {"llama": "model.", "gpt2": "transformer."}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """An exact copy of LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def random_tensors(kind: str) -> dict[str, np.ndarray]:
    """Random tensors by their Hugging Face names."""
    family, model = families.BY_TYPE[kind], MODELS[kind]
    shapes = {".".join(p): v.get_value().shape for p, v in tiny_models.abstract(model)[1].items()}
    layout = Layout(family, model, shapes)
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in layout.shapes.items()}


def write(path: pathlib.Path, kind: str, tensors: dict[str, np.ndarray], *, quantised: bool = False, **extra) -> None:
    model = MODELS[kind]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.embed_dim)
    writer.add_feed_forward_length(model.mlp_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.kv_heads)
    if kind == "llama":
        writer.add_key_length(model.head_size)
        writer.add_layer_norm_rms_eps(model.norm_eps)
        writer.add_rope_freq_base(model.rope_theta)
    else:
        writer.add_layer_norm_eps(model.norm_eps)
    for name, value in extra.items():
        writer.add_string(name.replace("__", "."), value)
    names = {"llama": LLAMA_NAMES, "gpt2": GPT2_NAMES}[kind]
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        theirs = next(gg.format(i) for gg, hf in names.items() for i in range(model.num_layers) if hf.format(i) == stem)
        if stem.endswith("q_proj"):
            tensor = permuted(tensor, model.num_heads)
        if stem.endswith("k_proj"):
            tensor = permuted(tensor, model.kv_heads)
        if kind == "gpt2" and ".c_" in name and end == "weight":
            tensor = tensor.T
        tensor = np.ascontiguousarray(tensor)
        if quantised and tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{theirs}.{end}", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{theirs}.{end}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("quantised", [False, True])
def test_every_slice_is_that_of_the_tensor_and_the_config_is_the_models(kind, quantised, tmp_path):
    tensors = random_tensors(kind)
    write(tmp_path / "model.gguf", kind, tensors, quantised=quantised)
    opened = GgufFile(tmp_path / "model.gguf")
    _, model, unused = families.loaded(opened.config)
    assert unused == [] and families.differences(model, MODELS[kind]) == []
    assert opened.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    draw = np.random.default_rng(1)
    for name, tensor in tensors.items():
        for _ in range(3):
            bounds = [sorted(draw.choice(n + 1, 2, replace=False)) for n in tensor.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            atol = np.abs(tensor).max() / 127 if quantised else 0
            np.testing.assert_allclose(opened.read(name, index), tensor[index], rtol=0, atol=atol, err_msg=name)


def test_what_a_file_does_not_describe_in_full_is_refused(tmp_path):
    def said_of(kind: str = "llama", tensors=None, **extra) -> str:
        write(tmp_path / "model.gguf", kind, random_tensors(kind) if tensors is None else tensors, **extra)
        with pytest.raises(ConfigError) as e:
            GgufFile(tmp_path / "model.gguf")
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "scales rope" in said_of(llama__rope__scaling__type="yarn")
    assert "sliding window" in said_of(llama__attention__sliding_window="64")
    assert "lacks model.embed_tokens.weight" in said_of(tensors={})
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        GgufFile(tmp_path / "model.gguf")


def test_a_byte_level_bpe_becomes_a_tokenizer_json(tmp_path):
    letters = ["<|end|>", *gguf.vocab.bytes_to_unicode().values()] if hasattr(gguf.vocab, "bytes_to_unicode") else None
    if letters is None:
        from data.tokenizers.hf_json import BYTE_OF

        letters = ["<|end|>", *BYTE_OF]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in (("block_count", 0), ("context_length", 8), ("embedding_length", 4), ("feed_forward_length", 8)):
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, "th"])
    writer.add_token_types([3] + [1] * len(letters))
    writer.add_token_merges(["t h"])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_tensor("token_embd.weight", np.zeros((len(letters) + 1, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = GgufFile(tmp_path / "model.gguf").companions()
    assert files["chat_template.jinja"] == b"{{ messages[0]['content'] }}"
    assert json.loads(files["config.json"])["vocab_size"] == len(letters) + 1
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = made.encode("thé 12<|end|>").ids
    assert ids[0] == len(letters) and ids[-1] == 0 and made.decode(ids, skip_special_tokens=False) == "thé 12<|end|>"
