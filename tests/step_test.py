"""The step: accumulation against the large batch, dropout, documents, evaluation. tests/parallel_test.py checks that
the run is the same on every mesh, tests/loss_test.py the loss."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from data import loader
from data.token_files import formats
from tests import runs
from trainer import sharding
from trainer.config import Config, from_dict
from trainer.state import Program
from trainer.step import document_starts, make_eval_step, make_train_step

MESHES = {  # data, fsdp, context, tensor
    "one": None, "data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "mixed": (2, 2, 1, 2), "context": (1, 2, 4, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


def config(**top) -> Config:
    model = {"vocab_size": 24, "max_seq_len": 32, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2}
    model |= top.pop("model", {})
    optimizer = {"peak_lr": 1e-2, "warmup_steps": 10}
    return from_dict({"global_batch_size": 16, "data": {"seq_len": 32}, "model": model, "optimizer": optimizer, **top})


def mesh_of(name: str) -> jax.sharding.Mesh:
    if MESHES[name] is None:
        return sharding.mesh_of(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    return sharding.mesh_of(dict(zip(sharding.MESH_AXES, MESHES[name], strict=True)), jax.devices())


def batches(dataset, cfg: Config, mesh) -> loader.Loader:
    files = formats.TokenFiles(dataset, formats.read_manifest(dataset), "train")
    windows = loader.TokenWindows(files, seq_len=cfg.data.seq_len, seed=cfg.seed)
    return loader.Loader(windows, global_batch_size=cfg.global_batch_size, sharding=sharding.named(mesh, "batch"))


def train(dataset, cfg: Config, mesh, steps: int, state=None) -> tuple[list[dict], object]:
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        state = program.init() if state is None else state
        step, source, rows = make_train_step(program), batches(dataset, cfg, mesh), []
        for i in range(steps):
            state, metrics = step(state, source.batch(i * cfg.global_batch_size), np.uint32(cfg.seed))
            rows.append({k: float(v) for k, v in metrics.items()})  # also keeps virtual devices in step
    return rows, state


def test_the_same_batches_on_every_mesh(dataset):
    cfg = config()
    seen = {}
    for name in MESHES:
        source = batches(dataset, cfg, mesh_of(name))
        for step in (0, 1, 100):
            raw = np.asarray(source.batch(step * cfg.global_batch_size)).tobytes()
            seen.setdefault(step, set()).add(hashlib.sha256(raw).hexdigest())
    assert all(len(hashes) == 1 for hashes in seen.values())
    assert len(set.union(*seen.values())) == 3


def test_initial_parameters_are_the_same_on_every_mesh():
    """The random bits are the same; jax 0.12 compiles their conversion to normal numbers by the shape of a shard, so
    the last bits may differ (2.7e-7 of the value seen)."""
    cfg, trees = config(), []
    for name in MESHES:
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            trees.append(jax.device_get(Program(cfg, mesh).init().params))
    for tree in trees[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trees[0], tree)


@pytest.mark.parametrize("name", ["one", "mixed", "context"])
def test_accumulation_equals_the_large_batch(dataset, name):
    whole, state = train(dataset, config(z_loss=1e-3), mesh_of(name), 3)
    parts, accumulated = train(dataset, config(z_loss=1e-3, grad_accum_steps=4), mesh_of(name), 3)
    for a, b in zip(whole, parts, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    # Adam divides by the root of a tiny second moment, which magnifies rounding: an update is at most about lr.
    lr = whole[-1]["train/lr"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=0.02 * lr),
        *map(jax.device_get, (state.params, accumulated.params)),
    )


def test_dropout_depends_on_seed_and_step_alone(dataset):
    cfg = config(model={"dropout": 0.3})
    first, state = train(dataset, cfg, mesh_of("one"), 3)
    again, _ = train(dataset, cfg, mesh_of("one"), 3)
    other, _ = train(dataset, dataclasses.replace(cfg, seed=1), mesh_of("one"), 3)
    without, _ = train(dataset, config(), mesh_of("one"), 3)
    assert first == again
    assert first != other and first[0]["train/loss"] != without[0]["train/loss"]
    assert int(state.step) == 3


@pytest.mark.parametrize("name", ["data", "mixed"])
def test_dropout_is_the_same_on_every_mesh(dataset, name):
    """This holds for microbatches, too: each replica drops what the one device drops in its rows."""
    cfg = config(model={"dropout": 0.3}, grad_accum_steps=2)
    one, there = (train(dataset, cfg, mesh_of(where), 2)[0] for where in ("one", name))
    for a, b in zip(one, there, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)


def test_z_loss_is_in_the_gradient_but_not_in_the_reported_loss(dataset):
    plain, _ = train(dataset, config(), mesh_of("one"), 2)
    z, _ = train(dataset, config(z_loss=0.1), mesh_of("one"), 2)
    assert z[0]["train/loss"] == pytest.approx(plain[0]["train/loss"], rel=1e-6)
    assert abs(z[0]["train/grad_norm"] - plain[0]["train/grad_norm"]) > 1e-3


def test_bfloat16_stays_near_float32(dataset):
    # Five steps: later ones measure how training at this rate magnifies rounding, not the rounding.
    rows, state = train(dataset, config(model={"dtype": "bfloat16"}), mesh_of("one"), 5)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))
    for a, b in zip(rows, train(dataset, config(), mesh_of("one"), 5)[0], strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 0.02


@pytest.mark.parametrize("name", ["mixed", "context"])
def test_eval_step_counts_what_it_is_told(dataset, name):
    cfg, mesh = config(), mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        params = program.init().params
        tokens = batches(dataset, cfg, mesh).batch(0)
        step = make_eval_step(program)
        logits, _ = program.model(params)(tokens[:, :-1].astype(jnp.int32))
        targets = np.asarray(tokens[:, 1:], np.int64)[..., None]
        losses = -np.take_along_axis(np.log(reference.softmax(logits)[..., :24]), targets, axis=-1)[..., 0]
        lengths = np.arange(16) * 2 % 33
        expected = sum(losses[i, :n].sum() for i, n in enumerate(lengths))
        assert float(step(params, tokens, lengths)) == pytest.approx(expected, rel=1e-5)
        assert float(step(params, tokens, lengths * 0)) == 0


def test_document_starts():
    """The end of a document belongs to it; a row begins in the middle of one; ends may follow each other."""
    inputs = jnp.array([[5, 9, 3, 3, 9, 1], [9, 9, 1, 2, 3, 9], [1, 2, 3, 4, 5, 6]])
    assert document_starts(inputs, 9).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 2, 2, 2], [0] * 6]


@pytest.mark.parametrize("name", ["one", "mixed", "context"])
def test_masked_documents_are_trained_and_evaluated_as_if_each_were_alone(dataset, name):
    """The loss of a row of several documents is that of the rows that hold them one by one."""
    cfg, mesh, eos = config(data={"seq_len": 32, "mask_documents": True, "eos_id": 7}), mesh_of(name), 7
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        params = program.init().params
        tokens = np.array(batches(dataset, cfg, mesh).batch(0), np.int32)
        tokens[tokens == eos] = 8
        alone = [(row, 0, 32) for row in tokens[8:]]
        for row in tokens[:8]:
            row[[10, 21]] = eos
            alone += [(row, 0, 11), (row, 11, 22), (row, 22, 32)]
        single = np.zeros((len(alone), 33), np.int32)
        for out, (row, first, stop) in zip(single, alone, strict=True):
            out[: stop - first + 1] = row[first : stop + 1]
        lengths = np.array([stop - first for _, first, stop in alone])
        plain = make_eval_step(Program(config(), mesh))
        expected = float(plain(params, single, lengths))
        full = np.full(16, 32)
        assert float(make_eval_step(program)(params, tokens, full)) == pytest.approx(expected, rel=1e-5)
        assert abs(float(plain(params, tokens, full)) - expected) > 1e-3  # without the mask it is another loss
        batch = jax.device_put(tokens, sharding.named(mesh, "batch"))
        _, metrics = make_train_step(program)(program.init(), batch, np.uint32(0))
        assert float(metrics["train/loss"]) == pytest.approx(expected / tokens[:, 1:].size, rel=1e-5)
