"""Fine-tuning on chats: loss and gradient are those of each chat by itself, on any mesh and with any microbatches; a
run is resumed after a kill bit for bit."""

import itertools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import reference

from data import loader, packing
from data.batch import Batch, from_tokens
from data.token_files import formats
from tests import chat_models, chats_test, runs, tiny_models
from tests.batches import on_mesh
from tests.step_test import config, mesh_of
from trainer import sharding
from trainer.config import Config
from trainer.evaluation import evaluate
from trainer.state import Program
from trainer.step import make_eval_step, make_gradient

pytest.importorskip("jinja2")

T, ROWS = 96, 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("finetuning")
    model = chat_models.folder(folder / "model")
    chats_test.prepare(chat_models.write(folder / "chats.jsonl"), model, folder / "dataset")
    for split in ("train", "val"):
        packing.pack_dataset(folder / "dataset", T, split)
    return folder / "dataset"


def config_of(prepared: pathlib.Path, **top) -> Config:
    vocab_size = formats.read_manifest(prepared).vocab_size
    data = {"seq_len": T, "packed": True, "mask_documents": True}
    model = {"vocab_size": vocab_size, "max_seq_len": T}
    return config(data=data, model=model, **{"global_batch_size": ROWS} | top)


@pytest.fixture(scope="module")
def params(prepared) -> dict:
    return tiny_models.random_params(config_of(prepared).model)


def packed_batch(prepared: pathlib.Path) -> Batch:
    found = chats_test.open_(prepared, seq_len=T)
    windows = loader.MixedWindows(found.files("train"), found.stages, seq_len=T, seed=0, packings=found.packings)
    batch_sharding = sharding.named(mesh_of("one"), "batch")
    batch = loader.Loader(windows, global_batch_size=ROWS, sharding=batch_sharding, document_end=-1).batch(0)
    return jax.device_get(batch)


def chats_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, which of them except the first are targets) of each chat in the rows, without padding."""
    found = []
    fields = (batch.inputs, batch.targets, batch.loss_weights, batch.segment_ids, batch.positions)
    for inputs, targets, counts, segments, positions in zip(*fields, strict=True):
        borders = [0, *np.flatnonzero(np.diff(segments)) + 1, len(segments)]
        for a, b in itertools.pairwise(borders):
            assert np.array_equal(positions[a:b], np.arange(b - a))
            if counts[a:b].any():
                found.append((np.append(inputs[a:b], targets[b - 1]), counts[a:b]))
    return found


def one_a_row(batch: Batch) -> Batch:
    """The same chats, one in each row, and nothing masked except by the loss mask."""
    found = chats_of(batch)
    count = -(-len(found) // 8) * 8  # the same rows for each device of a mesh
    rows, counts = np.zeros((count, T + 1), np.int32), np.zeros((count, T), bool)
    for row, of_row, (tokens, mask) in zip(rows, counts, found, strict=False):
        row[: len(tokens)], of_row[: len(mask)] = tokens, mask
    return from_tokens(rows, loss_mask=counts)


def gradient(cfg: Config, name: str, params: dict, batch: Batch) -> tuple[float, np.ndarray]:
    """The loss and the gradient, flat in float64, on a mesh."""
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        there = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        step = np.zeros((), np.int32)
        loss, _, grads = jax.jit(make_gradient(program), static_argnums=2)(there, on_mesh(batch, mesh), None, step)
    flat = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(grads))]
    return float(loss), np.concatenate(flat).astype(np.float64)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_packed_rows_have_the_loss_and_gradient_of_one_chat_a_row(prepared, params):
    cfg, batch = config_of(prepared), packed_batch(prepared)
    assert len(chats_of(batch)) > 1.5 * ROWS
    loss, grads = gradient(cfg, "one", params, batch)
    plain = config(
        data={"seq_len": T}, model={"vocab_size": cfg.model.vocab_size, "max_seq_len": T}, global_batch_size=ROWS
    )
    other_loss, other = gradient(plain, "one", params, one_a_row(batch))
    assert loss == pytest.approx(other_loss, rel=1e-6) and difference(grads, other) < 1e-5
    unmasked = gradient(plain, "one", params, batch.replace(segment_ids=None))[1]
    on_all = gradient(cfg, "one", params, batch.replace(loss_weights=None))[1]
    assert difference(unmasked, grads) > 0.01 and difference(on_all, grads) > 0.01  # the comparison would see both


def test_they_are_those_of_the_definition(prepared, params):
    """In NumPy and float64: the sum of -log p of the supervised tokens of each chat by itself, divided by their number;
    the gradient along random directions, by differences."""
    cfg, batch = config_of(prepared), packed_batch(prepared)

    def defined(at: dict) -> float:
        nats = count = 0.0
        for tokens, counts in chats_of(batch):
            p = reference.softmax(reference.forward(at, cfg.model, tokens[None, :-1])[0])
            nats -= np.log(p[np.arange(len(counts)), tokens[1:]])[counts].sum()
            count += counts.sum()
        return nats / count

    loss, grads = gradient(cfg, "one", params, batch)
    assert loss == pytest.approx(defined(params), rel=1e-5)
    exact, rng, step = reference.as_float64(params), np.random.default_rng(0), 1e-5
    for _ in range(3):
        along = jax.tree.map(lambda x: rng.standard_normal(x.shape), exact)
        ends = (defined(jax.tree.map(lambda x, d, s=sign: x + s * step * d, exact, along)) for sign in (1, -1))
        slope = np.subtract(*ends) / (2 * step)
        flat = np.concatenate([np.ravel(d) for d in jax.tree.leaves(along)])
        assert slope == pytest.approx(float(flat @ grads), rel=1e-3, abs=1e-3 * np.linalg.norm(grads))


@pytest.mark.parametrize(("name", "accum"), [("one", 4), ("one", 8), ("mixed", 1), ("mixed", 2), ("data", 1)])
def test_microbatches_and_devices_divide_by_the_targets_of_the_whole_batch(prepared, params, name, accum):
    """The fault of 2024: a mean for each microbatch, and the mean of these means."""
    batch = packed_batch(prepared)
    few = batch.loss_weights.copy()
    few[::2] &= np.cumsum(few[::2], 1) <= 2  # every second row has two targets
    batch = batch.replace(loss_weights=few)
    loss, grads = gradient(config_of(prepared), "one", params, batch)
    other_loss, other = gradient(config_of(prepared, grad_accum_steps=accum), name, params, batch)
    assert other_loss == pytest.approx(loss, rel=1e-5) and difference(other, grads) < 1e-5
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in (0, 1)]
    of_each = [gradient(config_of(prepared, global_batch_size=ROWS // 2), "one", params, half)[1] for half in halves]
    assert difference(np.mean(of_each, 0), grads) > 0.05  # the fault would be seen


def test_a_batch_without_a_target_is_not_nan(prepared, params):
    batch = packed_batch(prepared)
    batch = batch.replace(loss_weights=np.zeros_like(batch.loss_weights))
    loss, grads = gradient(config_of(prepared, grad_accum_steps=2), "one", params, batch)
    assert loss == 0 and not grads.any()


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_val_loss_is_the_mean_over_supervised_tokens(prepared, params, name):
    cfg, mesh = config_of(prepared), mesh_of(name)
    files = chats_test.open_(prepared, seq_len=T).files("val")
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        there = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        batch_sharding = sharding.named(mesh, "batch")
        found = evaluate(make_eval_step(program), there, files, cfg, batch_sharding=batch_sharding, num_windows=0)
    nats, count = 0.0, 0
    for ids, mask in chats_test.encoded(None, prepared, "val"):
        ids, counts = np.array(ids[: T + 1]), np.array(mask[1 : T + 1], bool)
        p = reference.softmax(reference.forward(params, cfg.model, ids[None, :-1])[0])
        nats -= np.log(p[np.arange(len(counts)), ids[1:]])[counts].sum()
        count += int(counts.sum())
    assert found["val/loss"] == pytest.approx(nats / count, rel=1e-5) and "val/bits_per_byte" not in found


# The whole path


def call(module: str, *flags: str, code: int = 0, devices: int = 1) -> str:
    return runs.finish(runs.start([sys.executable, "-m", module, *flags], devices), code)


@pytest.fixture(scope="module")
def converted(prepared, tmp_path_factory) -> pathlib.Path:
    """A run that launch.convert made of the folder of a small chat model."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "text.txt").write_text(runs.text(4000))
    model = prepared.parent / "model"
    call("launch.prepare", f"--source={folder / 'text.txt'}", f"--tokenizer={model}", f"--out={folder / 'text'}")
    runs.train(folder / "base", folder / "text", num_train_steps=2)
    call("launch.convert", f"--workdir={folder / 'base'}", f"--to_hf={folder / 'hf'}")
    (folder / "hf/chat_template.jinja").write_text(chat_models.TEMPLATE)
    call("launch.convert", f"--from_hf={folder / 'hf'}", f"--workdir={folder / 'run'}")
    return folder / "run"


def test_a_converted_model_is_fine_tuned_killed_and_resumed_on_any_mesh_and_processes(converted, tmp_path):
    source, dataset = chat_models.write(tmp_path / "chats.jsonl"), tmp_path / "dataset"
    call("launch.prepare", f"--source={source}", f"--tokenizer={converted}", "--format=chat", f"--out={dataset}")
    fields = {
        "init_from": converted, "num_train_steps": 24, "data__packed": "true", "data__mask_documents": "true",
        "data__seq_len": T, "eval__every_steps": 8, "checkpoint__every_steps": 4,
        "grad_accum_steps": 2, "optimizer__peak_lr": 0.01, "optimizer__warmup_steps": 2,
    }  # fmt: skip
    assert f"launch.pack {dataset} --seq_len={T}" in runs.train(tmp_path / "early", dataset, code=3, **fields)
    call("launch.pack", str(dataset), f"--seq_len={T}")
    whole, run, wide = (tmp_path / name for name in ("whole", "run", "wide"))
    said = runs.train(whole, dataset, **fields)
    assert "init_from" in said and "of the rows are tokens" in said
    losses = [row["train/loss"] for row in runs.rows(whole) if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.5
    runs.train_through_a_kill(run, dataset, count=10, **fields)
    assert runs.losses(run) == runs.losses(whole)
    runs.train(wide, dataset, devices=4, mesh__data=2, mesh__fsdp=2, **fields)
    runs.finish_gang(runs.start_gang(tmp_path / "two", dataset, mesh__data=2, **fields))
    for other in (wide, tmp_path / "two"):
        rows = [row["train/loss"] for row in runs.rows(other) if "train/loss" in row]
        np.testing.assert_allclose(rows, losses, rtol=1e-5)
    evaluated = json.loads(call("launch.evaluate", f"--workdir={run}", "--json").splitlines()[-1])
    last = [row["val/loss"] for row in runs.rows(run) if "val/loss" in row][-1]
    assert evaluated["val/loss"] == pytest.approx(last, rel=1e-6) and "val/bits_per_byte" not in evaluated
    call("launch.sample", f"--workdir={run}", "--chat", "--prompt=1: mesh", "--max_new_tokens=8")
