"""The step: accumulation against the large batch, dropout, documents, evaluation. tests/parallel_test.py checks that
the run is the same on every mesh, and tests/loss_test.py checks the loss."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from data import loader
from data.batch import from_tokens
from data.token_files import formats
from tests import runs
from tests.batches import on_mesh, tokens_of
from trainer import sharding
from trainer.config import Config, from_dict
from trainer.parallel.partitioner import MeshPartitioner
from trainer.state import Program
from trainer.step import make_eval_step, make_train_step

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
            raw = tokens_of(source.batch(step * cfg.global_batch_size)).tobytes()
            seen.setdefault(step, set()).add(hashlib.sha256(raw).hexdigest())
    assert all(len(hashes) == 1 for hashes in seen.values())
    assert len(set.union(*seen.values())) == 3


def test_initial_parameters_are_the_same_on_every_mesh():
    """The random bits are the same, but JAX 0.12 compiles their conversion to normal numbers for the shape of a shard,
    so the last bits may differ (a difference of 2.7e-7 of the value was seen)."""
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


class Recording(MeshPartitioner):
    """Keeps every dropout mask that a step draws, on meshes with only the axis `data`.

    Attributes:
      rows: for each row of each mask, (its shape, its number in the microbatch, its bits).
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        super().__init__(config, mesh)
        self.rows: list[tuple[tuple[int, ...], int, bytes]] = []

    def bernoulli(self, key, p, shape):
        def keep(mask):
            replica = jax.lax.axis_index("data") if self.mesh.shape["data"] > 1 else 0
            jax.debug.callback(self._keep, replica, mask)
            return mask

        same = jax.sharding.PartitionSpec()
        return sharding.by_device(keep, self.mesh, same, same)(super().bernoulli(key, p, shape))

    def _keep(self, replica, mask) -> None:
        first = int(replica) * len(mask)
        self.rows += [(mask.shape[1:], first + i, np.asarray(row).tobytes()) for i, row in enumerate(mask)]


ACCUM, LAYERS = 2, 2
ROWS_OF_A_STEP = 16 * (1 + 3 * LAYERS)  # masks: embedding; in each layer, attention weights and both results


def masks_of_steps(dataset, name: str, steps: list[tuple[int, int]]) -> list[list]:
    """`Recording.rows` of each step of `steps`, pairs (number of the step, seed), all with the same batch."""
    cfg, mesh = config(model={"dropout": 0.3, "num_layers": LAYERS}, grad_accum_steps=ACCUM), mesh_of(name)
    recording, found = Recording(cfg, mesh), []
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh, recording)
        state, batch = jax.device_get(program.init()), batches(dataset, cfg, mesh).batch(0)
        shardings = jax.tree.map(lambda s: s.sharding, program.state)
        train_step, eval_step = make_train_step(program), make_eval_step(program)
        for step, seed in steps:
            before = jax.device_put(dataclasses.replace(state, step=np.int32(step)), shardings)
            jax.block_until_ready(train_step(before, batch, np.uint32(seed)))
            jax.effects_barrier()
            found.append(sorted(recording.rows))
            recording.rows.clear()
        eval_step(state.params, batch.replace(loss_weights=np.ones(batch.targets.shape, bool)))
        jax.effects_barrier()
        assert not recording.rows, "an evaluation drops nothing"
    return found


def test_no_two_rows_are_dropped_alike(dataset):
    """Every step, seed, microbatch, layer, row and place in a layer has its own mask, the same on any mesh."""
    steps = [(0, 0), (1, 0), (7, 0), (0, 1), (0, 0)]
    one, data = (masks_of_steps(dataset, name, steps) for name in ("one", "data"))
    assert one == data, "each row is dropped as on one device"
    assert one[0] == one[-1], "the step and the seed decide"
    bits = [row for of_step in one[:-1] for _, _, row in of_step]
    assert len(bits) == (len(steps) - 1) * ROWS_OF_A_STEP
    assert len(set(bits)) == len(bits)


def test_z_loss_is_in_the_gradient_but_not_in_the_reported_loss(dataset):
    plain, _ = train(dataset, config(), mesh_of("one"), 2)
    z, _ = train(dataset, config(z_loss=0.1), mesh_of("one"), 2)
    assert z[0]["train/loss"] == pytest.approx(plain[0]["train/loss"], rel=1e-6)
    assert abs(z[0]["train/grad_norm"] - plain[0]["train/grad_norm"]) > 1e-3


def test_bfloat16_stays_near_float32(dataset):
    # After more than five steps, losses would show how training at this rate magnifies rounding.
    rows, state = train(dataset, config(model={"dtype": "bfloat16"}), mesh_of("one"), 5)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))
    for a, b in zip(rows, train(dataset, config(), mesh_of("one"), 5)[0], strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 0.02


@pytest.mark.parametrize("name", ["mixed", "context"])
def test_eval_step_counts_what_it_is_told(dataset, name):
    """The step returns the sum of each target's loss times its weight, and the sum of the weights."""
    cfg, mesh = config(), mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        params = program.init().params
        batch = batches(dataset, cfg, mesh).batch(0)
        step = make_eval_step(program)
        logits, _ = program.model_of_compiler(params)(batch.inputs.astype(jnp.int32))
        targets = np.asarray(batch.targets, np.int64)[..., None]
        nats = -np.take_along_axis(np.log(reference.softmax(logits)[..., :24]), targets, axis=-1)[..., 0]
        lengths = np.arange(16)[:, None] * 2 % 33
        for weights in (np.arange(32) < lengths, np.random.default_rng(0).random((16, 32)), np.zeros((16, 32), bool)):
            found = step(params, batch.replace(loss_weights=weights))
            np.testing.assert_allclose(found, ((weights * nats).sum(), weights.sum()), rtol=1e-5)


@pytest.mark.parametrize("name", ["one", "mixed", "context"])
def test_masked_documents_are_trained_and_evaluated_as_if_each_were_alone(dataset, name):
    """The loss of a row of several documents equals that of rows that hold one document each."""
    cfg, mesh, eos = config(data={"seq_len": 32, "mask_documents": True, "eos_id": 7}), mesh_of(name), 7
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        params = program.init().params
        tokens = tokens_of(batches(dataset, cfg, mesh).batch(0)).astype(np.int32)
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
        expected, _ = plain(params, from_tokens(single, loss_mask=np.arange(32) < lengths[:, None]))
        full = np.ones((16, 32), bool)
        masked = from_tokens(tokens, loss_mask=full, document_end=eos)
        nats, count = make_eval_step(program)(params, masked)
        assert nats == pytest.approx(float(expected), rel=1e-5) and count == full.size
        unmasked, _ = plain(params, from_tokens(tokens, loss_mask=full))
        assert abs(unmasked - expected) > 1e-3  # without the mask the loss differs
        batch = on_mesh(from_tokens(tokens, document_end=eos), mesh)
        _, metrics = make_train_step(program)(program.init(), batch, np.uint32(0))
        assert metrics["train/loss"] == pytest.approx(float(expected) / full.size, rel=1e-5)
