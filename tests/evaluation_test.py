"""Evaluation in microbatches: the same loss for any number of them and any devices, in no more memory than a step."""

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
