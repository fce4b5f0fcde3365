"""Sums of gradients over devices: their dtype, how often they are computed per step, and what the plan says about
them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import from_tokens
from tests.batches import on_mesh
from tests.step_test import config
from trainer import sharding
from trainer.config import Config
from trainer.planning import hlo, search, topology
from trainer.state import Program
from trainer.step import make_train_step

ROWS, LENGTH = 512, 32
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
# These programs take longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BIASED = {"dtype": "bfloat16", "bias": True, "norm": "layernorm"}


def bfloat16_config(rows: int, **optimizer) -> Config:
    cfg = config(global_batch_size=rows, model=BIASED)
    return dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, clip_norm=0.0, **optimizer))


def program(cfg: Config, **axes: int) -> Program:
    sizes = ONE | axes
    return Program(cfg, sharding.mesh_of(sizes, jax.devices()[: math.prod(sizes.values())], cfg.mesh.num_slices))


def compiled(here: Program) -> jax.stages.Compiled:
    with jax.set_mesh(here.mesh):
        return make_train_step(here).lower(here.state, here.abstract_batch(np.int32), np.uint32(0)).compile(QUICK)


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 24, (ROWS, LENGTH + 1)).astype(np.int32)


def gradients(here: Program, batches: list[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """For each batch, the full gradient at the initial state, flat in float64, and the norm that the step reports.

    The first moment after one step is the gradient times 1 - b1.
    """
    step, found, norms = compiled(here), [], []
    with jax.set_mesh(here.mesh):
        initial = jax.device_get(here.init())
        for batch in batches:
            state = jax.device_put(initial, jax.tree.map(lambda s: s.sharding, here.state))
            state, metrics = step(state, on_mesh(from_tokens(batch), here.mesh), np.uint32(0))
            leaves = jax.tree.leaves(jax.device_get(optax.tree.get(state.opt_state, "mu")))
            scale = 1 / (1 - here.config.optimizer.b1)
            found.append(scale * np.concatenate([np.ravel(x) for x in leaves]).astype(np.float64))
            norms.append(float(metrics["train/grad_norm"]))
    return found, norms


@functools.cache
def on_one_device() -> np.ndarray:
    return gradients(program(bfloat16_config(ROWS)), [tokens()])[0][0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
def test_a_bfloat16_gradient_of_eight_devices_is_that_of_one(axes):
    """The gradients are equal up to the rounding of activations, which may differ between programs. Sums are in
    float32, and so is the norm, which clipping uses."""
    (gradient,), (norm,) = gradients(program(bfloat16_config(ROWS), **axes), [tokens()])
    assert difference(gradient, on_one_device()) < 2.0**-9
    assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    lost = np.abs(gradient - gradient.astype(jnp.bfloat16).astype(np.float64))
    assert (lost > 1e-5 * np.abs(gradient)).mean() > 0.95, "the gradient has no more bits than bfloat16"


def test_a_bfloat16_gradient_of_512_devices_is_that_of_one():
    """Each device has one row. The gradients come from the step's code; the test sums them around a ring, in the dtype
    that the step uses for sums."""
    here = program(bfloat16_config(1))
    parts = [g / ROWS for g in gradients(here, list(tokens()[:, None]))[0]]
    differences = {}
    for dtype in ("float32", "bfloat16"):
        sums = program(bfloat16_config(1, gradients_dtype=dtype)).partitioner.sums_dtype(jnp.dtype("bfloat16"))
        total = np.zeros_like(parts[0], sums)
        for part in parts:
            total = (total.astype(np.float32) + part.astype(sums).astype(np.float32)).astype(sums)
        differences[dtype] = difference(total.astype(np.float64), on_one_device())
    assert differences["float32"] < 1e-3
    assert differences["bfloat16"] > 5e-3  # so the test does detect bfloat16 sums


def over_data(here: Program) -> list[hlo.Collective]:
    found = hlo.collectives(compiled(here).as_text(), dict(here.mesh.shape), max(here.config.mesh.num_slices, 1))
    return [c for c in found if "data" in c.axes]


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 4, "context": 2, "num_slices": 2},
        {"data": 4, "fsdp": 2, "num_slices": 2, "shard_optimizer": True},
    ],
    ids=str,
)
def test_replicas_sum_their_gradients_once_a_step(mesh):
    """For any number of microbatches, no loop communicates over `data`. A step sums each gradient of a device (and the
    loss) once; with ZeRO-1 it also all-gathers the updated shards of the parameters."""
    cfg = config(global_batch_size=64, grad_accum_steps=4, mesh=mesh, model={"dtype": "bfloat16"})
    here = program(cfg, **{k: v for k, v in mesh.items() if k in ONE})
    found = over_data(here)
    assert found and all(c.count == 1 and not c.trips for c in found), found
    sums = [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]
    assert {c.dtype for c in sums} == {"f32"}
    of_device = 4 * search.params_of_a_device(here)
    assert of_device <= sum(c.bytes for c in sums) <= of_device + 256


def test_the_search_counts_what_a_step_sends_between_replicas():
    """Each parameter goes around the ring twice, in the dtype of the sums, for any number of microbatches."""
    chip = dataclasses.replace(topology.CHIPS["v5e"], fast=1e-3)  # the network takes the longest
    machine = topology.Topology("v5e:2x4", chip, jax.devices(), 1)
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        for parts in (1, 4):
            cfg = dataclasses.replace(bfloat16_config(64, gradients_dtype=dtype), grad_accum_steps=parts)
            sent = 2 * itemsize * search.params_of_a_device(program(cfg, data=8)) * 7 / 8
            assert search.estimate(cfg, machine) * chip.fast == pytest.approx(sent)


def test_sums_are_never_narrower_than_what_is_summed():
    here = program(dataclasses.replace(config(), optimizer=bfloat16_config(1, gradients_dtype="bfloat16").optimizer))
    assert here.partitioner.sums_dtype(jnp.dtype("float32")) == jnp.float32
