"""Values that layers report beside their result reach the caller, and a reported loss has a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from tiny_models import CONFIGS

from data.batch import from_tokens
from model import transformer
from model.attention import empty_cache
from model.config import ModelConfig
from model.context import Aux, Context
from model.dropout import Dropout
from model.transformer import Block
from trainer import sharding
from trainer.config import from_dict
from trainer.state import Program
from trainer.step import make_gradient


class Reporting(Block):
    """A block that reports as a layer of experts would: a statistic, and a loss that depends on its parameters."""

    def __call__(self, x, ctx, cache=None):
        y, cache = super().__call__(x, ctx, cache)
        ctx.report_metric("mean_square", jnp.square(y).mean())
        ctx.report_metric("largest", jnp.abs(y).max())
        ctx.report_loss("mean_fourth", (y**4).mean())
        return y, cache


VARIANTS = [
    {"scan_layers": True}, {"scan_layers": False}, {"scan_layers": True, "remat": "full"},
    {"scan_layers": False, "remat": "full"}, {"scan_layers": True, "remat": "dots"},
]  # fmt: skip
BASE = dataclasses.replace(CONFIGS["one_kv_head"], dropout=0.2)  # has three layers
RATE, KEY = 0.2, jax.random.key(5)


def hidden(config: ModelConfig, params: dict, tokens: np.ndarray):
    """(hidden states, reports)."""
    apply = tiny_models.applier(config)
    x, aux, _ = apply(params).hidden(jnp.asarray(tokens), dropout_rate=RATE, dropout_key=KEY)
    return x, aux


def layer_by_layer(config: ModelConfig, params: dict, tokens: np.ndarray) -> list:
    """The stream after each layer of a model that reports nothing, by a loop in Python."""
    model = tiny_models.applier(dataclasses.replace(config, remat="none"))(params)
    graph, stacked = nnx.split(model.layers)
    index = jnp.arange(tokens.shape[1])
    of_embedding, of_layers = Dropout(RATE, KEY).split(2)
    x = of_embedding(model.embedding[...][tokens])
    found = []
    for i, key in enumerate(jax.random.split(of_layers.key, config.num_layers)):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        x, _ = layer(x, Context(index, index[None], dropout=Dropout(RATE, key)))
        found.append(x)
    return found


@functools.cache
def expected():
    """(params, tokens, the streams, the sum over layers of the reported loss, the gradient of that sum)."""
    params, tokens = tiny_models.random_params(BASE), tiny_models.random_tokens(BASE, 2)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        streams = layer_by_layer(BASE, params, tokens)
        return sum((y**4).mean() for y in streams), streams

    (total, streams), gradient = loss(params)
    return params, tokens, [np.asarray(y, np.float64) for y in streams], float(total), gradient


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_reports_are_the_mean_of_metrics_and_the_sum_of_losses_over_layers(monkeypatch, fields):
    """This holds if the layers are scanned or unrolled, and with or without rematerialization."""
    params, tokens, streams, total, gradient = expected()
    monkeypatch.setattr(transformer, "Block", Reporting)
    config = dataclasses.replace(BASE, **fields)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        aux = hidden(config, params, tokens)[1]
        return aux.losses["mean_fourth"], aux

    (found, aux), grads = loss(params)
    assert aux.metrics.keys() == {"mean_square", "largest"} and aux.losses.keys() == {"mean_fourth"}
    assert all(value.shape == () and value.dtype == jnp.float32 for value in jax.tree.leaves(aux))
    assert float(aux.metrics["mean_square"]) == pytest.approx(np.mean([(y**2).mean() for y in streams]), rel=1e-5)
    assert float(aux.metrics["largest"]) == pytest.approx(np.mean([np.abs(y).max() for y in streams]), rel=1e-5)
    assert float(found) == pytest.approx(total, rel=1e-5)
    # The layers must differ, or the value of one layer could pass for the mean.
    assert np.ptp([(y**2).mean() for y in streams]) > 0.1 * (streams[0] ** 2).mean()
    for (path, g), right in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(gradient), strict=True):
        largest = np.abs(right).max()
        np.testing.assert_allclose(g, right, rtol=0, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))
    kernel = np.asarray(grads["layers"]["mlp"]["up"]["kernel"])
    assert (np.abs(kernel).max(axis=(1, 2)) > 0).all()  # the gradient flows into every layer


def test_a_reported_metric_has_no_gradient_and_changes_no_result(monkeypatch):
    params, tokens, streams, _, _ = expected()
    monkeypatch.setattr(transformer, "Block", Reporting)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def metric(params):
        x, aux = hidden(BASE, params, tokens)
        return aux.metrics["mean_square"], x

    grads, x = metric(params)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    norm = np.asarray(tiny_models.applier(BASE)(params).norm(jnp.asarray(streams[-1], jnp.float32)))
    np.testing.assert_allclose(x, norm, rtol=0, atol=2e-5)


def test_reports_of_bfloat16_are_float32(monkeypatch):
    monkeypatch.setattr(transformer, "Block", Reporting)
    config = dataclasses.replace(BASE, dtype="bfloat16")
    params, tokens = tiny_models.random_params(config), tiny_models.random_tokens(config, 2)
    aux = jax.eval_shape(lambda: hidden(config, params, tokens)[1])
    assert [value.dtype for value in jax.tree.leaves(aux)] == [jnp.float32] * 3


def test_reports_with_a_cache_are_those_without(monkeypatch):
    monkeypatch.setattr(transformer, "Block", Reporting)
    params, tokens = tiny_models.make(BASE)[1], tiny_models.random_tokens(BASE, 2)
    model = tiny_models.applier(BASE)(params)
    _, plain, _ = model.hidden(tokens)
    index = jnp.tile(jnp.arange(tokens.shape[1]), (2, 1))
    _, cached, _ = model.hidden(tokens, cache=empty_cache(BASE, 2, BASE.max_seq_len), index=index)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_without_reports_there_are_none():
    params, tokens = tiny_models.make(BASE)[1], tiny_models.random_tokens(BASE, 2)
    assert hidden(BASE, params, tokens)[1] == Aux({}, {})


def test_parts_of_a_layer_report_to_the_layer_and_other_layers_do_not():
    index = jnp.arange(3)
    ctx = Context(index, index[None])
    one, other = ctx.of_layer(None, local=False), ctx.of_layer(None, local=True)
    one.with_dropout(Dropout(0.5, KEY)).report_metric("x", jnp.float32(1))
    other.report_loss("x", jnp.float32(2))
    assert (one.aux, other.aux, ctx.aux) == (Aux({}, {"x": 1}), Aux({"x": 2}, {}), Aux({}, {}))
    assert Context(index, index[None]).aux == Aux({}, {})


# In a train step


MESHES = {  # sizes of data, fsdp, context, tensor
    "one": (1, 1, 1, 1), "mixed": (2, 2, 1, 2), "context": (1, 2, 4, 1),
}  # fmt: skip
ROWS, LENGTH = 16, 32


def gradient_of(mesh: str, accum: int) -> tuple[float, dict, dict]:
    """(loss, reports, gradients) of one batch with weights, on a mesh and in microbatches."""
    model = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 24}
    config = from_dict(
        {
            "global_batch_size": ROWS, "grad_accum_steps": accum, "data": {"seq_len": LENGTH},
            "model": model | {"max_seq_len": LENGTH},
        }
    )  # fmt: skip
    sizes = dict(zip(sharding.MESH_AXES, MESHES[mesh], strict=True))
    where = sharding.mesh_of(sizes, jax.devices()[: int(np.prod(MESHES[mesh]))])
    tokens = np.random.default_rng(0).integers(0, 24, (ROWS, LENGTH + 1), dtype=np.uint16)
    batch = from_tokens(tokens, loss_mask=np.ones((ROWS, LENGTH), bool))
    with jax.set_mesh(where):
        program = Program(config, where)
        # The parameters are far from their initial values, at which the streams, and so the reports, are near 0.
        draw = np.random.default_rng(1)
        params = jax.tree.map(lambda p: 0.3 * draw.standard_normal(p.shape, np.float32), program.params)
        run = jax.jit(lambda params, batch: make_gradient(program)(params, batch, None, 0))
        shardings = jax.tree.map(lambda p: p.sharding, program.params), sharding.named(where, "batch")
        return jax.device_get(run(*jax.device_put((params, batch), shardings)))


@pytest.fixture(scope="module")
def of_one_device():
    """The results of one device without reports, and with reports."""
    plain = gradient_of("one", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "Block", Reporting)
        return plain, gradient_of("one", 1)


def test_a_step_trains_on_a_reported_loss_and_shows_all_reports(of_one_device):
    """The loss that is shown is the cross-entropy, without the reported loss."""
    (loss, nothing, gradients), (with_reports, reported, others) = of_one_device
    assert nothing == {} and reported.keys() == {"mean_square", "largest", "mean_fourth"}
    assert with_reports == pytest.approx(loss, rel=1e-6)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), gradients, others)
    assert differences["layers"]["mlp"]["down"]["kernel"] > 0.01
    assert differences["norm"]["scale"] < 1e-5  # this norm comes after all layers


@pytest.mark.parametrize(("mesh", "accum"), [("one", 4), ("mixed", 2), ("context", 2)])
def test_reports_of_a_step_are_the_same_in_microbatches_and_on_every_mesh(monkeypatch, of_one_device, mesh, accum):
    _, (loss, reported, gradients) = of_one_device
    monkeypatch.setattr(transformer, "Block", Reporting)
    found_loss, found, found_gradients = gradient_of(mesh, accum)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name in ("mean_square", "mean_fourth"):  # not `largest`, which differs between microbatches
        assert found[name] == pytest.approx(reported[name], rel=1e-5), name
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
