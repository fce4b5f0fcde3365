"""Configuration: errors name the field, its value and what is allowed; changes at a resume are sorted as documented."""

import dataclasses
import json
import math
import types

import pytest

from trainer.config import Config, changes, from_dict, to_json
from trainer.errors import ConfigError
from trainer.reliability import identity, run_directory
from trainer.reliability.mirror import Mirror


def test_round_trip_through_json():
    config = from_dict({"seed": 3, "model": {"num_layers": 2}, "optimizer": {"peak_lr": 1}})
    assert config.optimizer.peak_lr == 1.0 and isinstance(config.optimizer.peak_lr, float)
    assert from_dict(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"num_train_steps": 0}, ["num_train_steps is 0", "at least 1"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"global_batch_size": 12, "grad_accum_steps": 5}, ["grad_accum_steps = 5", "global_batch_size = 12"]),
        ({"global_batch_size": 12, "mesh": {"data": 8}}, ["global_batch_size = 12", "= 8"]),
        ({"model": {"num_heads": 4}, "mesh": {"tensor": 3}}, ["model.num_heads = 4", "mesh.tensor = 3"]),
        ({"model": {"num_kv_heads": 2}, "mesh": {"tensor": 4}}, ["model.num_kv_heads = 2", "mesh.tensor = 4"]),
        ({"model": {"mlp_dim": 90}, "mesh": {"tensor": 4}}, ["model.mlp_dim = 90", "mesh.tensor = 4"]),
        ({"global_batch_size": 3, "mesh": {"fsdp": 3}}, ["model.embed_dim = 128", "mesh.fsdp = 3"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["data, fsdp", "-1"]),
        ({"mesh": {"context": -1}}, ["data, context", "-1"]),
        ({"data": {"seq_len": 40}, "mesh": {"context": 8}}, ["data.seq_len = 40", "2 x mesh.context = 16", "change"]),
        (
            {"global_batch_size": 6, "model": {"embed_dim": 128, "num_heads": 4}, "mesh": {"fsdp": 2, "context": 3}},
            ["model.embed_dim = 128", "mesh.fsdp x mesh.context = 6", "change"],
        ),
        (
            {"global_batch_size": 24, "mesh": {"data": 3, "fsdp": 2, "shard_optimizer": True}},
            ["model.embed_dim (its optimizer state) = 128", "mesh.data x mesh.fsdp = 6", "change"],
        ),
        ({"global_batch_size": 12, "grad_accum_steps": 3, "mesh": {"fsdp": 8}}, ["= 12 / 3 = 4", "= 8", "change"]),
        ({"model": {"num_heads": 6, "embed_dim": 96, "mlp_dim": 66}, "mesh": {"tensor": 6}}, ["64", "mesh.tensor = 6"]),
        ({"mesh": {"num_slices": -1}}, ["mesh.num_slices is -1"]),
        ({"loss_chunk_tokens": -1}, ["loss_chunk_tokens is -1", "negative"]),
        ({"model": {"attention": "flash"}}, ["model.attention is 'flash'", "auto, xla, cudnn, splash"]),
        ({"optimizer": {"moments_dtype": "bfloat16"}}, ["optimizer.b2 is 0.99", "0.95", "float32"]),
        (
            {"optimizer": {"gradients_dtype": "float16"}},
            ["optimizer.gradients_dtype is 'float16'", "float32, bfloat16"],
        ),
        ({"mesh": {"data": 0}}, ["mesh.data is 0"]),
        ({"optimizer": {"schedule": "cosin"}}, ["optimizer.schedule is 'cosin'", "cosine"]),
        ({"optimizer": {"b2": 1.0}}, ["optimizer.b2 is 1.0", "below 1"]),
        ({"optimizer": {"peak_lr": "x"}}, ["optimizer.peak_lr is 'x'", "must be a number"]),
        ({"model": {"num_layers": 1.5}}, ["model.num_layers is 1.5", "a whole number"]),
        ({"model": {"layers": 2}}, ["model.layers", "num_layers"]),
        ({"sample": {"top_p": 0.0}}, ["sample.top_p is 0.0"]),
        ({"checkpoint": {"keep_last": 0}}, ["checkpoint.keep_last is 0"]),
        ({"metrics": {"every_steps": 0}}, ["metrics.every_steps is 0"]),
        ({"eval": {"num_windows": -1}}, ["eval.num_windows is -1"]),
        ({"data": {"seq_len": 0}}, ["data.seq_len is 0"]),
        ({"data": {"seq_len": 1}}, ["data.seq_len is 1", "at least 2"]),
        ({"optimizer": {"decay_steps": 3_000_000_000}}, ["optimizer.decay_steps is 3000000000", "below 2**31"]),
        ({"optimizer": {"warmup_steps": 2**31}}, ["optimizer.warmup_steps", "below 2**31"]),
        ({"num_train_steps": 2**40}, ["num_train_steps", "below 2**31"]),
        ({"divergence": {"window": 2**31}}, ["divergence.window", "below 2**31"]),
        ({"optimizer": {"peak_lr": float("inf")}}, ["optimizer.peak_lr is inf", "finite"]),
        ({"model": {"rope_theta": float("inf")}}, ["model.rope_theta is inf", "finite"]),
        ({"sample": {"temperature": float("inf")}}, ["sample.temperature is inf", "finite"]),
        ({"sample": {"temperature": float("nan")}}, ["sample.temperature is nan", "finite"]),
        ({"z_loss": float("nan")}, ["z_loss is nan", "finite"]),
    ],
)
def test_errors_say_what_is_wrong(tree, parts):
    with pytest.raises(ConfigError) as error:
        from_dict(tree)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    for part in ["config.", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"optimizer": {"clip_norm": math.inf}},
        {"checkpoint": {"every_steps": 10**12, "keep_last": 2**31}},
        {"eval": {"every_steps": 2**40}},
        {"num_train_steps": 2**31, "z_loss": math.inf},
    ],
)
def test_what_a_run_recorded_is_read_although_it_is_refused_now(tree, tmp_path, monkeypatch):
    """Ranges apply only to new values: a run of an earlier version can be resumed, also from its mirror."""
    with pytest.raises(ConfigError):
        from_dict(tree)
    recorded = from_dict(tree, recorded=True)
    (tmp_path / "config.json").write_text(to_json(recorded))
    assert run_directory.read_config(tmp_path) == recorded
    run_directory.check_changes(tmp_path, Config(), run_directory.config_of_run(tmp_path), allow=True)
    Mirror(str(tmp_path), tmp_path, Config())
    data = types.SimpleNamespace(fingerprint=lambda: "x", load_tokenizer=lambda: None, datasets=[], stages=[])
    monkeypatch.setattr(
        identity, "mixture", types.SimpleNamespace(parse_stages=lambda *_: [], check_change=lambda *_: None)
    )
    identity.check({"config": json.loads(to_json(recorded)), "data_fingerprint": "x", "samples": 0}, Config(), data, "")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"num_train_steps": 7}, "harmless"),
        ({"mesh": {"fsdp": 2}}, "harmless"),
        ({"model": {"remat": "full"}}, "harmless"),
        ({"data": {"path": "elsewhere"}}, "harmless"),  # the fingerprint decides whether it is the same dataset
        ({"mesh": {"context": 2}}, "harmless"),
        ({"mesh": {"shard_optimizer": True}}, "harmless"),
        ({"model": {"attention": "xla"}}, "harmless"),
        ({"loss_chunk_tokens": 0}, "harmless"),
        ({"z_loss": 0.5}, "flag"),
        ({"optimizer": {"peak_lr": 0.5}}, "flag"),
        ({"global_batch_size": 32}, "flag"),
        ({"model": {"dropout": 0.5}}, "flag"),
        ({"model": {"num_layers": 2}}, "refused"),
        ({"seed": 1}, "refused"),
        ({"data": {"seq_len": 32}}, "refused"),
    ],
)
def test_changes_at_a_resume(change, kind):
    found = changes(Config(), from_dict(change))
    assert {k for k, lines in found.items() if lines} == {kind}
    (line,) = found[kind]
    ((name, value),) = change.items()
    if isinstance(value, dict):
        ((field, value),) = value.items()
        name = f"{name}.{field}"
    assert line.startswith(f"config.{name}: ") and line.endswith(f"-> {value!r}")


def test_the_optimizer_cannot_change_at_a_resume():
    """Another optimizer cannot read the state. A run of an earlier version, which named no optimizer, has AdamW."""
    fields = dataclasses.asdict(Config())
    del fields["optimizer"]["name"]
    before = from_dict(fields, recorded=True)
    assert changes(before, Config()) == {"harmless": [], "flag": [], "refused": []}
    found = changes(before, from_dict({"optimizer": {"name": "another", "peak_lr": 0.5}}))
    assert found["refused"] == ["config.optimizer.name: 'adamw' -> 'another'"]
    assert found["flag"] == ["config.optimizer.peak_lr: 0.001 -> 0.5"] and not found["harmless"]


def test_the_type_of_the_moments_cannot_change_at_a_resume():
    """The rest of the optimizer section may change with the flag, but saved moments have the other type."""
    found = changes(Config(), from_dict({"optimizer": {"moments_dtype": "bfloat16", "b2": 0.95}}))
    assert found["refused"] == ["config.optimizer.moments_dtype: 'float32' -> 'bfloat16'"]
    assert found["flag"] == ["config.optimizer.b2: 0.99 -> 0.95"] and not found["harmless"]
