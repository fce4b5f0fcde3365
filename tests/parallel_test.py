"""Compares losses, gradients, checkpoints and layouts on every mesh with those of one device, in float32 on text."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from data.batch import from_tokens
from model import transformer
from model.sampling import Sampling
from tests import runs
from tests.batches import on_mesh
from trainer import sharding
from trainer.config import CheckpointConfig, Config, from_dict
from trainer.planning import hlo
from trainer.reliability.checkpoint import Checkpoints
from trainer.sampling import make_generator
from trainer.state import Program, TrainState
from trainer.step import make_train_step

STEPS, ROWS, LENGTH, VOCAB = 100, 16, 32, 150  # the vocabulary is padded to 192
# These programs take longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOSSES_ATOL, GRADIENT_RTOL = 1e-4, 1e-5

FAST = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "context": {"context": 8},
    "zero1 data x fsdp x context": {"data": 2, "fsdp": 2, "context": 2, "shard_optimizer": True},
    "slices of data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2, "num_slices": 2},
}
SLOW = {
    "tensor": {"tensor": 8},
    "data x fsdp": {"data": 4, "fsdp": 2},
    "data x context": {"data": 2, "context": 4},
    "data x tensor": {"data": 2, "tensor": 4},
    "fsdp x context": {"fsdp": 4, "context": 2},
    "fsdp x tensor": {"fsdp": 2, "tensor": 4},
    "context x tensor": {"context": 4, "tensor": 2},
    "data x fsdp x context": {"data": 2, "fsdp": 2, "context": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data x context x tensor": {"data": 2, "context": 2, "tensor": 2},
    "fsdp x context x tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "zero1 data": {"data": 8, "shard_optimizer": True},
    "zero1 data x fsdp": {"data": 4, "fsdp": 2, "shard_optimizer": True},
    "zero1 data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2, "shard_optimizer": True},
    "zero1 slices of data x context": {"data": 4, "context": 2, "num_slices": 2, "shard_optimizer": True},
}
MESHES = FAST | SLOW
every_mesh = pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])

MODELS = {
    "llama": {},
    "bfloat16": {"dtype": "bfloat16"},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "tie_embeddings": False},
    "gemma": {
        "num_layers": 3,
        "norm_at": "both",
        "norm_plus_one": True,
        "qk_norm": "head",
        "mlp": "geglu",
        "window": 9,
        "layer_pattern": ("local", "local", "global"),
        "local_rope_theta": 100.0,
        "attention_softcap": 5.0,
        "logits_softcap": 4.0,
        "embedding_scale": 5.0,
        "head_dim": 6,
    },
    "olmo": {"norm_at": "after", "qk_norm": "projection", "window": 9, "layer_pattern": ("local", "global")},
}


def config(name: str, model: str = "llama", remat: str = "none") -> Config:
    """The configuration for `name` of MESHES, or for one device ('one'), which computes all logits at the same time.

    A tensor axis of 8 needs 8 key-value heads. On all other meshes there are 4, so that shards have grouped queries.
    """
    mesh = {"data": 1} | MESHES.get(name.removesuffix(" of 8 heads"), {})
    eight = mesh.get("tensor") == 8 or name.endswith(" of 8 heads")
    shape = {
        "vocab_size": VOCAB, "max_seq_len": LENGTH, "num_layers": 2, "embed_dim": 32, "mlp_dim": 48, "num_heads": 8,
        "num_kv_heads": 8 if eight else 4,
    }  # fmt: skip
    return from_dict(
        {
            "global_batch_size": ROWS,
            "loss_chunk_tokens": 24 if name in MESHES else 0,
            "data": {"seq_len": LENGTH, "mask_documents": model in ("gpt2", "gemma"), "eos_id": 0},
            "model": shape | MODELS[model] | {"remat": remat},
            "optimizer": {"peak_lr": 3e-3, "warmup_steps": 10},
            "mesh": mesh,
        }
    )


def one_device(name: str) -> str:
    """The name of the run on one device that has the model of the run `name`."""
    return "one of 8 heads" if MESHES[name].get("tensor") == 8 else "one"


@functools.cache
def batches() -> np.ndarray:
    """Windows of text, int32 [STEPS, ROWS, LENGTH + 1]; the end of a line is token 0."""
    ids = np.unique(list(runs.text()), return_inverse=True)[1]
    starts = np.random.default_rng(0).integers(0, len(ids) - LENGTH - 1, (STEPS, ROWS, 1))
    return ids[starts + np.arange(LENGTH + 1)].astype(np.int32)


@functools.cache
def program(name: str, model: str = "llama", remat: str = "none") -> Program:
    cfg = config(name, model, remat)
    return Program(cfg, sharding.make_mesh(cfg, jax.devices()[: math.prod(cfg.mesh.sizes().values())]))


@functools.cache
def compiled(name: str, model: str = "llama", remat: str = "none") -> jax.stages.Compiled:
    return compile_step(program(name, model, remat))


def compile_step(here: Program) -> jax.stages.Compiled:
    with jax.set_mesh(here.mesh):
        return make_train_step(here).lower(here.state, here.abstract_batch(np.int32), np.uint32(0)).compile(QUICK)


@functools.cache
def initial(name: str, model: str) -> TrainState:
    """An initial state, drawn on the host without a compilation; tests/step_test.py checks that of Program.init."""
    draw = np.random.default_rng(0)

    def one(path, leaf):
        mean = 1 if path[-1].key == "scale" else 0
        return np.asarray(mean + 0.02 * draw.standard_normal(leaf.shape), leaf.dtype)

    state = program(name, model).state
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state)
    return dataclasses.replace(zeros, params=jax.tree_util.tree_map_with_path(one, state.params))


def start(name: str, model: str = "llama", remat: str = "none") -> TrainState:
    one = one_device(name) if name in MESHES else name
    return jax.device_put(initial(one, model), jax.tree.map(lambda s: s.sharding, program(name, model, remat).state))


def advance(step, here: Program, state: TrainState, first: int, stop: int) -> tuple[list[dict], TrainState]:
    """Metrics of the steps `first` to `stop` - 1, and the state after them."""
    rows = []
    with jax.set_mesh(here.mesh):
        for tokens in batches()[first:stop]:
            batch = from_tokens(tokens, document_end=here.config.data.document_end)
            state, metrics = step(state, on_mesh(batch, here.mesh), np.uint32(0))
            rows.append({k: float(v) for k, v in metrics.items()})  # also keeps virtual devices in step
    return rows, state


def first_step(name: str, model: str = "llama", remat: str = "none"):
    """(metrics, gradient by path, state) of one step. The first moment is then 1 - b1 times the clipped gradient."""
    here = program(name, model, remat)
    (row,), state = advance(compiled(name, model, remat), here, start(name, model, remat), 0, 1)
    rule = here.config.optimizer
    scale = max(row["train/grad_norm"] / rule.clip_norm, 1) / (1 - rule.b1)
    mu = traverse_util.flatten_dict(jax.device_get(optax.tree.get(state.opt_state, "mu")))
    return row, {path: scale * leaf.astype(np.float64) for path, leaf in mu.items()}, state


@functools.cache
def run(name: str):
    """(metrics of each of 100 steps, gradient of the first, shard shapes of parameters and of moments at the end)."""
    row, gradient, state = first_step(name)
    rows, state = advance(compiled(name), program(name), state, 1, STEPS)
    mu = optax.tree.get(state.opt_state, "mu")
    shapes = [jax.tree.map(lambda x: x.addressable_shards[-1].data.shape, tree) for tree in (state.params, mu)]
    return [row, *rows], gradient, shapes


def losses(rows: list[dict]) -> np.ndarray:
    return np.array([row["train/loss"] for row in rows])


def assert_same_gradient(gradient: dict, expected: dict) -> None:
    assert gradient.keys() == expected.keys()
    for path, leaf in expected.items():
        difference = np.linalg.norm(gradient[path] - leaf) / np.linalg.norm(leaf)
        assert difference < GRADIENT_RTOL, (path, difference)


@every_mesh
def test_the_same_run_on_every_mesh(name):
    """100 losses are within 1e-4 of those of one device, where training halves the loss."""
    rows, one = run(name)[0], run(one_device(name))[0]
    assert one[0]["train/loss"] == pytest.approx(np.log(VOCAB), rel=0.02)
    assert one[-1]["train/loss"] < 0.5 * one[0]["train/loss"]
    np.testing.assert_allclose(losses(rows), losses(one), rtol=0, atol=LOSSES_ATOL)
    for key in ("train/grad_norm", "train/param_norm", "train/lr"):
        assert rows[0][key] == pytest.approx(one[0][key], rel=1e-6), key
        assert rows[-1][key] == pytest.approx(one[-1][key], rel=5e-3), key


@every_mesh
def test_the_same_gradient_on_every_mesh(name):
    """Each parameter's gradient differs from that of one device by at most 1e-5 of its norm."""
    gradient, expected = run(name)[1], run(one_device(name))[1]
    assert all(np.abs(leaf).max() > 1e-6 for leaf in expected.values())
    assert_same_gradient(gradient, expected)


@pytest.mark.parametrize(
    "name", ["zero1 data x fsdp x context", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW if n != "tensor")]
)
def test_the_same_gradient_with_biases_documents_and_two_tables(name):
    """The model has learned positions, biases, layernorm and a separate output table, and documents are masked."""
    row, gradient, _ = first_step(name, "gpt2")
    one, expected, _ = first_step("one", "gpt2")
    assert row["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)
    # Adding the same vector to all keys does not change the softmax: the gradient of this bias is only rounding.
    no_gradient = ("layers", "attention", "key", "bias")
    assert np.abs(gradient.pop(no_gradient)).max() < 1e-6 and np.abs(expected.pop(no_gradient)).max() < 1e-6
    assert_same_gradient(gradient, expected)


@pytest.mark.parametrize("model", ["gemma", "olmo"])
@pytest.mark.parametrize(
    "name",
    [
        "slices of data x fsdp x tensor",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("context x tensor", "fsdp")),
    ],
)
def test_the_same_gradient_with_windows_caps_and_norms_of_queries_and_keys(name, model):
    """A norm over all heads as one vector spans devices if each device has only some of the heads."""
    row, gradient, _ = first_step(name, model)
    one, expected, _ = first_step("one", model)
    assert row["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)
    assert_same_gradient(gradient, expected)


# Checkpoints


def assert_chain_is_the_run(folder, names: list[str], stops: list[int]) -> None:
    """Trains on each mesh up to its stop, from the checkpoint of the previous mesh; the losses are those of one run."""
    checkpoints, state, first, rows = Checkpoints(folder, CheckpointConfig(keep_last=2)), None, 0, []
    for name, stop in zip(names, stops, strict=True):
        state = start(name) if state is None else checkpoints.restore(program(name), first)[0]
        some, state = advance(compiled(name), program(name), state, first, stop)
        checkpoints.save(stop, state, {})
        assert checkpoints.wait()
        rows, first = rows + some, stop
    np.testing.assert_allclose(losses(rows), losses(run("one")[0][:first]), rtol=0, atol=LOSSES_ATOL)


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    names = ["slices of data x fsdp x tensor", "zero1 data x fsdp x context", "context"]
    assert_chain_is_the_run(tmp_path, names, [50, 75, STEPS])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_goes_from_mesh_to_mesh(tmp_path, seed):
    """The checkpoint goes through all meshes that have the same model, in random order."""
    names = [name for name in MESHES if one_device(name) == "one"]
    names = [str(name) for name in np.random.default_rng(seed).permutation(["one", *names])]
    assert_chain_is_the_run(tmp_path, names, [STEPS * (i + 1) // len(names) for i in range(len(names))])


# Layouts and memory


@every_mesh
def test_a_device_holds_its_part_and_no_more(name):
    """Matrices are split over fsdp · context, and over tensor if an axis can be; with ZeRO-1, moments over data."""
    here = program(name)
    axes = traverse_util.flatten_dict(here.axes)
    sizes, split = here.mesh.shape, here.config.mesh.shard_optimizer
    of_params, of_moments = (traverse_util.flatten_dict(tree) for tree in run(name)[2])
    matrices = 0
    for path, leaf in traverse_util.flatten_dict(here.params).items():
        names = [axis for axis in axes[path] if axis != "layers"]
        if len(names) < 2:
            continue
        matrices += 1
        parts = sizes["fsdp"] * sizes["context"]
        if {"heads", "kv_heads", "mlp", "vocab"} & set(names):
            parts *= sizes["tensor"]
        assert math.prod(of_params[path]) * parts == leaf.size, path
        assert math.prod(of_moments[path]) * parts * (sizes["data"] if split else 1) == leaf.size, path
    assert matrices == 8  # the table, four of attention, three of the mlp


def bytes_on_a_device(tree) -> int:
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["one", *FAST])
def test_the_state_is_updated_in_its_place(name):
    """The new state reuses every byte of the old state's memory."""
    memory = compiled(name).memory_analysis()
    assert memory.alias_size_in_bytes == bytes_on_a_device(program(name).state)


def shapes_in(hlo: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a compiled program, as one device has them."""
    found = re.findall(r"\b(?:pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]+)\]", hlo)
    return {tuple(map(int, dims.split(","))) for dims in found}


@pytest.mark.parametrize("name", ["one", *FAST])
def test_logits_exist_a_chunk_at_a_time(name):
    """No array has both the tokens of a device and an axis of the vocabulary, or of a device's shard of it."""
    here = program(name)
    padded, sizes = here.config.model.padded_vocab_size, here.mesh.shape
    vocabulary = {padded, padded // sizes["tensor"]}
    tokens = ROWS * LENGTH // (here.mesh.size // sizes["tensor"])
    widest = 0
    for shape in shapes_in(compiled(name).as_text()):
        for axis in vocabulary & set(shape):
            widest = max(widest, math.prod(shape) // axis)
    if name == "one":  # without chunks: the test does find logits
        assert widest == tokens == 512
    else:
        assert widest == 32 < tokens  # the embedding table: [vocabulary, embed]


def whole_weights(hlo: str) -> set[tuple[int, ...]]:
    """Arrays that hold the weights of all layers, each complete along embed."""
    return {(2, 32, 48), (2, 48, 32), (2, 32, 16), (2, 16, 32)} & shapes_in(hlo)


@pytest.mark.parametrize("model", ["llama", "bfloat16"])
def test_weights_are_gathered_again_for_the_backward_pass(monkeypatch, model):
    """If weights were kept from the forward pass, each device would hold all weights, and fsdp would save no memory."""
    # A device has four rows: with two, the number of layers, activations would have the shapes of weights.
    cfg = dataclasses.replace(config("fsdp", model), global_batch_size=32)
    here = Program(cfg, sharding.make_mesh(cfg))
    assert not whole_weights(compile_step(here).as_text())
    monkeypatch.setattr(transformer, "_remat", lambda config, layer, partitioner: layer)
    assert whole_weights(compile_step(here).as_text())  # the test does find such weights


@pytest.mark.parametrize(
    "remat", ["attention", "offload", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("dots", "full"))]
)
def test_what_is_recomputed_changes_nothing(remat):
    """The parameters are sharded, so even `none` recomputes something: the backward pass gathers weights again."""
    name = "slices of data x fsdp x tensor"
    row, gradient, _ = first_step(name, remat=remat)
    assert row["train/loss"] == pytest.approx(run(name)[0][0]["train/loss"], rel=1e-6)
    for path, expected in run(name)[1].items():
        difference = np.linalg.norm(gradient[path] - expected) / np.linalg.norm(expected)
        assert difference < 1e-6, (path, difference)


def test_a_slice_is_one_step_along_data():
    """Only the axis `data` crosses the slow network between slices; the other axes stay within a slice."""
    ids = np.vectorize(lambda d: d.id)(program("slices of data x fsdp x tensor").mesh.devices)
    assert [sorted(part.ravel().tolist()) for part in ids] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    ids = np.vectorize(lambda d: d.id)(program("zero1 slices of data x context").mesh.devices)
    assert [sorted(part.ravel().tolist()) for part in np.split(ids, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("model", ["gemma", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_texts_are_the_same_on_every_mesh(model):
    """Greedy and sampled continuations of prompts of different lengths, some longer than the context."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCAB, n).astype(np.int32) for n in (1, 3, 7, 12, 31, 32)]

    def texts(name: str, temperature: float) -> list[list[int]]:
        here = program(name, model)
        with jax.set_mesh(here.mesh):
            found = make_generator(here, slots=4).continue_all(
                here.init().params, prompts, max_new_tokens=10, seed=1, sampling=Sampling(temperature=temperature)
            )
            return [text.tolist() for text in found]

    greedy, sampled = texts("one", 0.0), texts("one", 1.0)
    assert greedy != sampled
    name = "slices of data x fsdp x tensor"
    assert texts(name, 0.0) == greedy and texts(name, 1.0) == sampled


def test_replicas_share_the_texts_of_a_batch():
    """Each replica computes an equal part of the texts, with its own part of the cache; no key or value is sent."""
    flops = {}
    for name in ("one", "data"):
        here = program(name)
        with jax.set_mesh(here.mesh):
            compiled = make_generator(here).lower(here.params, rows=16, wanted=LENGTH).compile()
        flops[name] = compiled.cost_analysis()["flops"]
    assert flops["data"] < 1.1 * flops["one"] / 8
    in_loop = [one for one in hlo.collectives(compiled.as_text(), here.mesh.shape) if one.trips]
    assert in_loop and all(one.bytes <= 8 for one in in_loop)  # only whether any replica has more to do
