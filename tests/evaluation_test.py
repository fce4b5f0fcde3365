"""Evaluation in microbatches: the loss is the same for any number of microbatches and devices, and memory is at most
that of a step."""

import math

import jax
import numpy as np
import pytest

from data.token_files import formats
from tests.step_test import config, dataset, mesh_of  # noqa: F401
from trainer import sharding
from trainer.evaluation import evaluate, microbatch_rows
from trainer.state import Program
from trainer.step import make_eval_step, make_train_step


@pytest.mark.parametrize(
    ("devices", "batch", "accum", "rows"),
    [(1, 16, 1, 16), (1, 16, 4, 4), (8, 16, 2, 8), (3, 8, 1, 9), (5, 12, 4, 5), (8, 1, 1, 8), (7, 16, 16, 7)],
)
def test_rows_of_a_microbatch_are_rounded_up_to_the_devices(devices, batch, accum, rows):
    mesh = sharding.mesh_of({"data": devices, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:devices])
    cfg = config(global_batch_size=batch, grad_accum_steps=accum)
    assert microbatch_rows(cfg, sharding.named(mesh, "batch")) == rows


def test_the_loss_is_the_same_in_any_microbatches_on_any_number_of_devices(dataset):  # noqa: F811
    files = {"one": formats.TokenFiles(dataset, formats.read_manifest(dataset), "val")}
    found = []
    for axes, accum in (
        ((1, 1, 1, 1), 1),
        ((1, 1, 1, 1), 8),
        ((3, 1, 1, 1), 1),
        ((3, 1, 1, 1), 16),
        ((8, 1, 1, 1), 4),
        ((2, 2, 2, 1), 4),
        ((2, 2, 1, 2), 16),
        ((4, 1, 1, 2), 2),
        ((1, 2, 4, 1), 4),
    ):
        cfg = config(grad_accum_steps=accum)
        sizes = dict(zip(sharding.MESH_AXES, axes, strict=True))
        mesh = sharding.mesh_of(sizes, jax.devices()[: math.prod(axes)])
        with jax.set_mesh(mesh):
            program = Program(cfg, mesh)
            layout = {"batch_sharding": sharding.named(mesh, "batch"), "num_windows": 21}
            result = evaluate(make_eval_step(program), program.init().params, files, cfg, **layout)
            found.append(result["val/loss"])
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def source(dataset, tokens: int, text_bytes: int, length: int | None = None) -> formats.TokenFiles:  # noqa: F811
    """The validation split, or its first `length` tokens, with a claim that `tokens` tokens encode `text_bytes`
    bytes."""
    files = formats.TokenFiles(dataset, formats.read_manifest(dataset), "val")
    files.shards = [files.shards[0][:length]]
    files.tokens = tokens
    files.text_bytes = text_bytes
    return files


def evaluate_with(eval_step, sources: dict, **options) -> dict[str, float] | None:
    layout = {"batch_sharding": sharding.named(mesh_of("one"), "batch"), "num_windows": 0}
    return evaluate(eval_step, {}, sources, config(grad_accum_steps=4), **layout | options)


def test_losses_are_the_means_over_targets(dataset):  # noqa: F811
    """With several sources, the mean is over the targets of all, and bits per byte use the tokens and bytes of all. In
    this test the loss of a target is its token id."""
    sources = {"long": source(dataset, 1000, 2500), "short": source(dataset, 100, 300, length=45)}

    def eval_step(params, batch):
        weights = np.asarray(batch.loss_weights, float)
        return (weights * np.asarray(batch.targets)).sum(), weights.sum()

    one = evaluate_with(eval_step, {"long": sources["long"]})
    both = evaluate_with(eval_step, sources)
    unknown = evaluate_with(eval_step, {"long": source(dataset, 1000, 0)})
    first, second = (np.asarray(files.shards[0][1:], float) for files in sources.values())
    mean = np.concatenate([first, second]).mean()
    assert one == {
        "val/loss": pytest.approx(first.mean()),
        "val/perplexity": pytest.approx(math.exp(first.mean())),
        "val/bits_per_byte": pytest.approx(first.mean() / math.log(2) * 1000 / 2500),
    }
    assert both == {
        "val/loss": pytest.approx(mean),
        "val/perplexity": pytest.approx(math.exp(mean)),
        "val/bits_per_byte": pytest.approx(mean / math.log(2) * 1100 / 2800),
        "val/loss/long": pytest.approx(first.mean()),
        "val/loss/short": pytest.approx(second.mean()),
    }
    assert unknown == {name: one[name] for name in ("val/loss", "val/perplexity")}


def test_an_interrupted_evaluation_has_no_result(dataset):  # noqa: F811
    """The evaluation asks after each batch whether to stop, and computes no batch after a yes."""
    val, batches = formats.TokenFiles(dataset, formats.read_manifest(dataset), "val"), []

    def eval_step(params, batch):
        batches.append(batch)
        return 1.0, 1.0

    assert evaluate_with(eval_step, {"one": val}, interrupted=lambda: len(batches) == 3) is None
    assert len(batches) == 3
    assert evaluate_with(eval_step, {"one": val}) is not None and len(batches) > 6


@pytest.mark.parametrize("accum", [1, 4, 16])
def test_an_evaluation_needs_no_more_memory_than_a_step(accum):
    cfg, mesh = config(grad_accum_steps=accum), mesh_of("one")
    program = Program(cfg, mesh)
    rows = microbatch_rows(cfg, sharding.named(mesh, "batch"))
    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=program.replicated)
    step = make_train_step(program).lower(program.state, program.abstract_batch(np.uint16), seed).compile()
    batch = program.abstract_batch(np.uint16, rows, masked=True)
    evaluation = make_eval_step(program).lower(program.params, batch).compile()
    peaks = [x.memory_analysis().temp_size_in_bytes for x in (evaluation, step)]
    assert peaks[0] <= peaks[1]
