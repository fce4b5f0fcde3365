"""The start-up page warns of mistakes."""

import logging
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.step_test import config, mesh_of
from trainer import optimizer
from trainer.config import Config
from trainer.reporting import startup
from trainer.state import Program


def flattened(params: dict) -> dict:
    """An optimizer state with the moments of all parameters in one vector, whose path does not name a parameter."""
    return {"all": jnp.zeros(sum(p.size for p in jax.tree.leaves(params)))}


@pytest.fixture
def warnings(monkeypatch, caplog):
    """A function that returns the page's warnings for a configuration and a mesh."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    monkeypatch.setitem(optimizer.OPTIMIZERS, "flattened", lambda c: optax.GradientTransformation(flattened, None))
    monkeypatch.setitem(optimizer.OPTIMIZERS, "stateless", lambda c: optax.identity())
    monkeypatch.setitem(
        optimizer.OPTIMIZERS, "factored", lambda c: optax.scale_by_factored_rms(min_dim_size_to_factor=32)
    )

    def warnings(cfg: Config, mesh: str) -> list[str]:
        windows = types.SimpleNamespace(mixture=types.SimpleNamespace(consumed=lambda samples: []), sources=[])
        data = types.SimpleNamespace(datasets={}, packings={}, tokenizer_path="x")
        with caplog.at_level(logging.WARNING, "meshlm"):
            startup.log_summary(cfg, Program(cfg, mesh_of(mesh)), windows, data)
        return [record.getMessage() for record in caplog.records if "learning rate" not in record.getMessage()]

    return warnings


@pytest.mark.parametrize("mesh", ["one", "data", "fsdp", "mixed", "context"])
@pytest.mark.parametrize("name", ["adamw", "stateless"])
def test_a_state_that_is_split_is_no_warning(warnings, name, mesh):
    assert warnings(config(optimizer={"name": name}), mesh) == []


def test_optimizer_state_that_every_device_holds_is_a_warning(warnings):
    cfg = config(optimizer={"name": "flattened"})
    assert warnings(cfg, "fsdp") == ["WARNING   50 % of the training state is optimizer state, whole on every device"]


def test_also_on_replicas_that_are_to_share_it(warnings):
    assert warnings(config(optimizer={"name": "flattened"}), "data") == []
    (line,) = warnings(config(optimizer={"name": "flattened"}, mesh={"shard_optimizer": True}), "data")
    assert "optimizer state" in line


def test_factored_moments_are_a_warning_only_if_they_are_large(warnings):
    small = {"embed_dim": 256, "mlp_dim": 1024, "num_heads": 8}
    assert warnings(config(optimizer={"name": "factored"}, model=small), "fsdp") == []
    (line,) = warnings(config(optimizer={"name": "factored"}), "fsdp")
    assert "optimizer state" in line
