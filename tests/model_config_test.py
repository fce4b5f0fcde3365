"""ModelConfig refuses settings that the transformer does not support, and derives those that are not set."""

import dataclasses
import subprocess
import sys

import pytest

from model.config import DTYPES, MLPS, NORMS, POSITIONS, REMATS, ModelConfig, RopeScaling


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_layers": 0}, ["model.num_layers is 0", "at least 1"]),
        ({"embed_dim": -8}, ["model.embed_dim is -8", "at least 1"]),
        ({"num_heads": 0}, ["model.num_heads is 0", "at least 1"]),
        ({"num_kv_heads": -1}, ["model.num_kv_heads is -1", "positive, or 0"]),
        ({"head_dim": -2}, ["model.head_dim is -2", "positive, or 0"]),
        ({"mlp_dim": -1}, ["model.mlp_dim is -1", "positive, or 0"]),
        ({"vocab_size": -1}, ["model.vocab_size is -1", "positive, or 0"]),
        ({"max_seq_len": -1}, ["model.max_seq_len is -1", "positive, or 0"]),
        ({"mlp": "elu"}, ["model.mlp is 'elu'", *MLPS]),
        ({"position": "alibi"}, ["model.position is 'alibi'", *POSITIONS]),
        ({"norm": "batchnorm"}, ["model.norm is 'batchnorm'", *NORMS]),
        ({"dtype": "float16"}, ["model.dtype is 'float16'", *DTYPES]),
        ({"remat": "some"}, ["model.remat is 'some'", *REMATS]),
        ({"embed_dim": 100, "num_heads": 3}, ["num_heads = 3", "model.embed_dim = 100", "divide", "model.head_dim"]),
        ({"num_heads": 4, "num_kv_heads": 3}, ["model.num_kv_heads = 3", "model.num_heads = 4", "divide"]),
        ({"num_heads": 2, "num_kv_heads": 4}, ["model.num_kv_heads = 4", "model.num_heads = 2", "divide"]),
        ({"head_dim": 7}, ["model.head_dim is 7", "even"]),
        ({"embed_dim": 12, "num_heads": 4}, ["model.head_dim is 3", "even"]),
        ({"dropout": -0.1}, ["model.dropout is -0.1", "at least 0 and below 1"]),
        ({"dropout": 1.0}, ["model.dropout is 1.0", "at least 0 and below 1"]),
        ({"dropout": float("nan")}, ["model.dropout is nan", "at least 0 and below 1"]),
        ({"dropout_end": 1.0}, ["model.dropout_end is 1.0", "at least -1 and below 1"]),
        ({"dropout_end": -1.5}, ["model.dropout_end is -1.5", "at least -1 and below 1"]),
        ({"dropout_scale": 0.0}, ["model.dropout_scale is 0.0", "above 0"]),
        ({"rope_theta": -1.0}, ["model.rope_theta is -1.0", "above 0"]),
        ({"norm_eps": 0.0}, ["model.norm_eps is 0.0", "above 0"]),
        ({"rope_fraction": 1.5}, ["model.rope_fraction is 1.5", "at most 1"]),
        ({"head_dim": 8, "rope_fraction": 0.4}, ["model.head_dim is 8", "0.4", "are 3", "even"]),
        ({"window": 0}, ["model.window is 0", "at least 1, or none"]),
        ({"layer_pattern": ()}, ["model.layer_pattern is empty", "local,global"]),
        ({"norm_plus_one": True, "norm": "layernorm"}, ["model.norm_plus_one", "rmsnorm"]),
        ({"parallel": True, "norm_at": "both"}, ["model.parallel", "model.norm_at is both"]),
        *[
            ({name: 0.0}, [f"model.{name} is 0.0", "above 0"])
            for name in ("attention_scale", "attention_softcap", "logits_softcap", "local_rope_theta", "init_std")
        ],
    ],
    ids=str,
)
def test_an_error_names_the_field_the_value_and_what_would_be_right(fields, said):
    with pytest.raises(ValueError) as error:
        ModelConfig(**fields)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"factor": 0.5}, ["factor is 0.5", "at least 1"]),
        ({"kind": "llama3", "factor": 2.0}, ["original_len is 0", "llama3"]),
        ({"kind": "yarn", "factor": 2.0}, ["original_len is 0", "yarn"]),
        ({"low_freq_factor": 4.0}, ["low_freq_factor is 4.0", "below high_freq_factor = 4.0"]),
        ({"beta_slow": 40.0}, ["beta_slow is 40.0", "below beta_fast = 32.0"]),
        ({"attention_factor": -1.0}, ["attention_factor is -1.0", "above 0, or none"]),
    ],
    ids=str,
)
def test_errors_of_the_scaling_of_rope(fields, said):
    with pytest.raises(ValueError) as error:
        RopeScaling(**fields)
    assert str(error.value).startswith("model.rope_scaling.")
    for part in said:
        assert part in str(error.value)


def test_validation_also_runs_when_a_field_is_replaced():
    """The launcher fills in vocab_size and max_seq_len this way."""
    with pytest.raises(ValueError, match="vocab_size is -5"):
        dataclasses.replace(ModelConfig(), vocab_size=-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"embed_dim": 100, "num_heads": 3, "head_dim": 32},  # heads need not fill embed_dim once head_dim is set
        {"embed_dim": 12, "num_heads": 4, "position": "learned"},  # an odd head_dim matters only to rope
        {"num_heads": 8, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 8},
        {"dropout": 0.0, "dropout_end": 0.0},
        {"dropout": 0.99, "dropout_end": -1.0},
    ],
    ids=str,
)
def test_unusual_shapes_that_work_are_accepted(fields):
    config = ModelConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "expected"), [(4, 0, 4), (8, 2, 2), (8, 1, 1)])
def test_kv_heads_default_to_multi_head_attention(num_heads, num_kv_heads, expected):
    assert ModelConfig(num_heads=num_heads, num_kv_heads=num_kv_heads).kv_heads == expected


def test_head_size_is_the_share_of_embed_dim_unless_set():
    assert ModelConfig(embed_dim=768, num_heads=12).head_size == 64
    assert ModelConfig(embed_dim=768, num_heads=12, head_dim=128).head_size == 128


@pytest.mark.parametrize(
    ("embed_dim", "mlp", "mlp_dim", "expected"),
    [
        (4096, "swiglu", 0, 10944),  # 8/3 · 4096 = 10922.7; Llama 2 rounds to 256 and sets mlp_dim
        (5120, "geglu", 0, 13696),  # 8/3 · 5120 = 13653.3
        (24, "glu", 0, 64),  # 8/3 · 24 = 64 exactly: not rounded up further
        (25, "glu", 0, 128),  # 8/3 · 25 = 66.7
        (128, "swiglu", 0, 384),
        (768, "gelu", 0, 3072),  # GPT-2
        (100, "relu2", 0, 400),
        (128, "swiglu", 77, 77),
        (128, "gelu", 77, 77),
    ],
)
def test_the_size_of_the_mlp(embed_dim, mlp, mlp_dim, expected):
    config = ModelConfig(embed_dim=embed_dim, num_heads=1, mlp=mlp, mlp_dim=mlp_dim, position="learned")
    assert config.mlp_size == expected
    assert config.gated == (mlp in ("swiglu", "geglu", "glu"))


@pytest.mark.parametrize(("vocab_size", "expected"), [(1, 64), (64, 64), (65, 128), (50257, 50304), (32000, 32000)])
def test_padded_vocabulary(vocab_size, expected):
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == expected


@pytest.mark.parametrize(
    ("dropout", "end", "expected"),
    [(0.0, -1.0, False), (0.0, 0.0, False), (0.1, -1.0, True), (0.1, 0.0, True), (0.0, 0.1, True)],
)
def test_has_dropout_if_the_rate_is_ever_above_0(dropout, end, expected):
    assert ModelConfig(dropout=dropout, dropout_end=end).has_dropout is expected


def test_it_is_validated_without_loading_jax():
    """A launcher reports a mistyped field at once, and decides about devices before JAX sees them."""
    code = "import sys, model.config; sys.exit(str(sorted({'jax', 'flax', 'numpy'} & set(sys.modules))))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.strip() == "[]"
