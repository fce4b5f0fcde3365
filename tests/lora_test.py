"""Adapters and frozen parameters: what is trained, its gradient, and that nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from data.batch import from_tokens
from model import kernels
from model.config import PROJECTIONS
from model.dropout import Dropout
from model.transformer import merged
from tests import runs
from tests.batches import on_mesh
from tests.step_test import config, mesh_of, train
from trainer.config import Config, from_dict
from trainer.errors import ConfigError
from trainer.interchange.adapters import plain
from trainer.state import Program
from trainer.step import make_eval_step, make_gradient

LORA = {"rank": 3, "alpha": 6.0}
MODEL = {"qkv_bias": True, "norm_at": "both"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


def with_lora(lora: dict | None = None, **top) -> Config:
    return config(model={**MODEL, "lora": LORA if lora is None else lora}, **top)


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(jax.device_get(tree), sep=".").items()}


def random_params(cfg: Config) -> dict:
    """Parameters far from their first values, so that B is not 0."""
    rng = np.random.default_rng(0)
    shapes = Program(cfg, mesh_of("one")).params
    return jax.tree.map(lambda p: (0.2 * rng.standard_normal(p.shape)).astype(np.float32), shapes)


def tokens(rows: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(24, size=(rows, 33), dtype=np.int32)


def gradient(cfg: Config, name: str, params: dict) -> tuple[float, dict[str, np.ndarray]]:
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        there = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        key = jax.random.key(5) if cfg.model.is_random else None
        make = jax.jit(make_gradient(program))
        loss, _, grads = make(there, on_mesh(from_tokens(tokens()), mesh), key, np.zeros((), np.int32))
    return float(loss), flat(grads)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b))


@pytest.mark.parametrize(("name", "accum"), [("one", 1), ("mixed", 2), ("context", 1), ("data", 1)])
@pytest.mark.parametrize("targets", [("layers.*",), ("layers.attention.[qv]*", "layers.mlp.down")])
def test_loss_and_gradient_are_those_of_the_merged_model(name, accum, targets):
    """With W' = W + s A B, the gradient of A is s dW' B^T, and that of B is s A^T dW'."""
    cfg = with_lora(LORA | {"targets": targets}, grad_accum_steps=accum)
    params = random_params(cfg)
    loss, grads = gradient(cfg, name, params)
    whole = merged(params, cfg.model.lora)
    expected_loss, of_whole = gradient(dataclasses.replace(cfg, model=plain(cfg.model)), "one", whole)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    values, scale = flat(params), 2.0
    projections = {path.removesuffix(".lora.a") for path in values if path.endswith(".lora.a")}
    assert grads.keys() == {f"{path}.lora.{x}" for path in projections for x in "ab"}
    assert len(projections) == (7 if targets == ("layers.*",) else 3)
    for path in projections:
        a, b, dw = values[f"{path}.lora.a"], values[f"{path}.lora.b"], of_whole[f"{path}.kernel"]
        assert close(grads[f"{path}.lora.a"], scale * dw @ b.swapaxes(1, 2))
        assert close(grads[f"{path}.lora.b"], scale * a.swapaxes(1, 2) @ dw)


@pytest.mark.parametrize("lora", [LORA, LORA | {"dropout": 0.3}])
def test_a_run_changes_only_its_adapters_and_is_the_same_on_every_mesh(dataset, lora):
    found = {}
    for name in ("one", "mixed", "data"):
        cfg = with_lora(lora, optimizer={"peak_lr": 3e-2, "warmup_steps": 2})
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            before = flat(Program(cfg, mesh).init().params)
        rows, state = train(dataset, cfg, mesh, 6)
        after = flat(state.params)
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        assert changed == {path for path in before if ".lora." in path} and len(changed) == 14
        moments = {path for path, x in flat_state(state.opt_state) if np.ndim(x)}
        assert all(".lora." in path for path in moments) and len(moments) == 28
        found[name] = [row["train/loss"] for row in rows]
    assert found["one"][-1] < found["one"][0] - 0.01
    for name in ("mixed", "data"):
        assert found[name] == pytest.approx(found["one"], rel=2e-5)


def flat_state(tree) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(x)) for path, x in leaves]


def test_dropout_is_of_the_adapters_inputs_and_only_in_training():
    cfg = with_lora(LORA | {"dropout": 0.5})
    params = random_params(cfg)
    without = with_lora()
    assert abs(gradient(cfg, "one", params)[0] - gradient(without, "one", params)[0]) > 1e-3
    zero = {path: 0 * x if path.endswith("lora.b") else x for path, x in flat(params).items()}
    zero = traverse_util.unflatten_dict(zero, sep=".")
    assert gradient(cfg, "one", zero)[0] == gradient(without, "one", zero)[0]  # nothing else is dropped
    mesh = mesh_of("one")
    batch = from_tokens(tokens(), loss_mask=np.ones((16, 32), bool))
    with jax.set_mesh(mesh):
        nats = [make_eval_step(Program(c, mesh))(params, on_mesh(batch, mesh))[0] for c in (cfg, without)]
    assert nats[0] == nats[1]


@pytest.mark.parametrize("name", ["one", "mixed", "zero1"])
def test_frozen_parameters_stay_and_the_others_have_the_gradient_of_full_training(dataset, name):
    patterns = ("embedding", "layers.mlp.*", "*norm.scale")
    mesh_config = {"shard_optimizer": True} if name == "zero1" else {}
    name = "data" if name == "zero1" else name
    cfg = config(frozen=patterns, model=MODEL | {"tie_embeddings": False}, mesh=mesh_config)
    params = random_params(cfg)
    loss, grads = gradient(cfg, name, params)
    whole_loss, of_all = gradient(dataclasses.replace(cfg, frozen=()), "one", params)
    trained = {path for path in of_all if path.startswith("layers.attention.") or path == "head.kernel"}
    assert grads.keys() == trained and loss == pytest.approx(whole_loss, rel=1e-6)
    assert all(close(grads[path], of_all[path]) for path in trained)
    with jax.set_mesh(mesh_of(name)):
        before = flat(Program(cfg, mesh_of(name)).init().params)
    rows, state = train(dataset, cfg, mesh_of(name), 2)
    after = flat(state.params)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == trained
    assert sum(np.ndim(x) > 0 for _, x in flat_state(state.opt_state)) == 2 * len(trained)
    assert rows[0]["train/grad_norm"] > 0


def test_a_run_without_frozen_parameters_is_what_it_was():
    cfg = config()
    program = Program(cfg, mesh_of("one"))
    assert program.trained == set(flat(program.params))
    assert jax.tree.structure(program.part(program.params)) == jax.tree.structure(program.params)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frozen": ["layers.mpl.*"]}, "frozen has 'layers.mpl.*', which matches none of the parameters embedding"),
        ({"frozen": ["*"]}, "leaves no parameter to train"),
        ({"frozen": ["*.lora.*"], "model": {"lora": LORA}}, "leaves no parameter to train"),
        ({"model": {"lora": {"rank": -1}}}, "model.lora.rank is -1"),
        ({"model": {"lora": {"rank": 4, "alpha": 0.0}}}, "model.lora.alpha is 0.0"),
        ({"model": {"lora": {"rank": 4, "dropout": 1.0}}}, "model.lora.dropout is 1.0"),
        ({"model": {"lora": {"rank": 4, "targets": []}}}, "model.lora.targets is empty"),
        ({"model": {"lora": {"rank": 4, "targets": ["head"]}}}, "targets has 'head', which matches none of layers.att"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields, words):
    with pytest.raises(ConfigError) as e:
        base = {"vocab_size": 24, "max_seq_len": 32}
        Program(from_dict({**fields, "model": base | fields.get("model", {})}), mesh_of("one"))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_each_adapter_of_a_layer_drops_its_own_inputs():
    dropout = Dropout(0.5, jax.random.key(0))
    own = [dropout.of_adapter(0.5, number) for number in range(len(PROJECTIONS))]
    dropped = {np.asarray(one(jnp.ones((8, 32)))).tobytes() for one in own + dropout.split(3)}
    assert len(dropped) == len(PROJECTIONS) + 3


def test_dropout_of_adapters_leaves_attention_as_it_is():
    """Flash kernels cannot drop attention weights; the inputs of adapters are another matter."""
    lora = LORA | {"dropout": 0.3}
    for cfg in (with_lora(lora), with_lora()):
        kernel = {"platform": "tpu", "capability": "", "seq_len": 1024, "context": 1, "documents": False}
        model = dataclasses.replace(cfg.model, head_dim=128, max_seq_len=1024)
        assert kernels.choose(model, **kernel)[0] == "splash"
        assert not cfg.model.has_dropout and cfg.model.is_random == (cfg.model.lora.dropout > 0)


def test_a_wrong_pattern_leaves_no_run_behind(dataset, tmp_path):
    run = tmp_path / "run"
    said = runs.train(run, dataset, code=2, frozen="layers.mpl.*", num_train_steps=1)
    assert "matches none of the parameters" in said and not run.exists()
    assert "are trained" in runs.train(run, dataset, frozen="layers.mlp.*", num_train_steps=1)
