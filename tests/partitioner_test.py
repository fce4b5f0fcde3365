"""Attention on a mesh, the order of a sequence's shards, and what the start-up page says about them."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kernels
from model.context import Context
from model.kernels import AttentionSpec
from model.layers import Build, Linear
from tests.step_test import config
from tests.tiny_models import random_documents
from trainer import sharding
from trainer.errors import ConfigError
from trainer.parallel.partitioner import MeshPartitioner, zigzag_order
from trainer.reporting import startup
from trainer.state import Program


def mesh_of(**axes: int):
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | axes
    return sharding.mesh_of(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


# The order


SHAPES = [(4, 1), (8, 2), (32, 2), (32, 4), (32, 8), (256, 4), (48, 3)]


@pytest.mark.parametrize(("seq_len", "shards"), SHAPES)
def test_shards_have_equal_work(seq_len, shards):
    """Each index occurs once, and under the causal mask each shard attends to exactly the same number of keys."""
    order = zigzag_order(seq_len, shards)
    assert order.dtype == np.int32 and sorted(order) == list(range(seq_len))
    of_shards = order.reshape(shards, -1)
    assert {int((shard + 1).sum()) for shard in of_shards} == {seq_len * (seq_len + 1) // 2 // shards}
    block = seq_len // (2 * shards)
    for i, shard in enumerate(of_shards):
        late = 2 * shards - 1 - i
        assert shard.tolist() == [*range(i * block, (i + 1) * block), *range(late * block, (late + 1) * block)]


def test_the_order_of_a_partitioner_is_for_its_context_axis():
    whole = MeshPartitioner(config(), mesh_of(fsdp=8))
    assert whole.order is None and not whole.context_parallel and whole.gathers_params
    split = MeshPartitioner(config(), mesh_of(fsdp=2, context=4))
    np.testing.assert_array_equal(split.order, zigzag_order(32, 4))
    assert split.context_parallel and split.gathers_params


def test_a_partitioner_gathers_as_its_mesh_says_or_as_its_caller_says():
    """A plan measures activations on one device, but gathers weights as the real mesh does (planning/plan.py)."""
    assert not MeshPartitioner(config(), mesh_of(data=4, tensor=2)).gathers_params
    assert not MeshPartitioner(config(), mesh_of(fsdp=8), gathers_params=False).gathers_params
    assert MeshPartitioner(config(), mesh_of(data=8), gathers_params=True).gathers_params


def test_batch_and_sequence_are_one_axis_unless_the_sequence_is_split():
    x = jnp.zeros((4, 8, 3))
    assert MeshPartitioner(config(), mesh_of(fsdp=8)).flatten(x).shape == (32, 3)
    assert MeshPartitioner(config(), mesh_of(context=2)).flatten(x).shape == (4, 8, 3)


# Projections


@pytest.mark.parametrize(
    ("axes", "dtype"),
    [
        ({}, "float32"),
        ({}, "bfloat16"),
        ({"fsdp": 4}, "float32"),
        ({"fsdp": 4}, "bfloat16"),
        ({"tensor": 4}, "bfloat16"),
        ({"fsdp": 2, "context": 2}, "float32"),  # XLA's CPU backend has no such product of bfloat16
    ],
    ids=str,
)
def test_a_projection_and_its_gradients_are_their_definition(axes, dtype):
    """x W + b of small integers, which bfloat16 adds and multiplies without rounding, so every sum is exact."""
    partitioner = MeshPartitioner(config(model={"dtype": dtype}), mesh_of(**axes))
    build = Build(config().model, nnx.Rngs(params=0), partitioner)
    graph, _ = nnx.split(Linear(build, 8, 16, ("embed", "mlp"), bias=True))
    draw = np.random.default_rng(0)
    x, w, b, g = (draw.integers(-2, 3, shape) for shape in ((4, 8, 8), (8, 16), (16,), (4, 8, 16)))

    @jax.jit
    def run(x, w, b, g):
        y, pull = jax.vjp(lambda x, w, b: nnx.merge(graph, {"kernel": w, "bias": b})(x), x, w, b)
        return y, *pull(g)

    with jax.set_mesh(partitioner.mesh):
        found = run(x.astype(dtype), w.astype(np.float32), b.astype(np.float32), g.astype(dtype))
    expected = (x @ w + b, g @ w.T, np.einsum("bti,bto->io", x, g), g.sum((0, 1)))
    assert [a.dtype for a in found] == [dtype, dtype, np.float32, np.float32]
    for actual, right in zip(found, expected, strict=True):
        assert np.abs(right).max() > 8
        np.testing.assert_array_equal(np.asarray(actual, np.float64), right)


# Attention


SCALE = 0.37  # not 1 / sqrt(head size), which a kernel might use by default


def by_definition(q, k, v, segment_ids, g):
    """softmax(SCALE q k^T) v, and the gradients of its product with g with respect to q, k and v, in float64."""
    b, t, h, _ = q.shape
    share = h // k.shape[2]
    y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row in range(b):
        visible = np.tril(np.ones((t, t), bool)) & (segment_ids[row] == segment_ids[row, :, None])
        for head in range(h):
            kv = head // share
            scores = np.where(visible, SCALE * q[row, :, head] @ k[row, :, kv].T, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            y[row, :, head] = p @ v[row, :, kv]
            dv[row, :, kv] += p.T @ g[row, :, head]
            dp = g[row, :, head] @ v[row, :, kv].T
            ds = SCALE * p * (dp - (dp * p).sum(-1, keepdims=True))
            dq[row, :, head] = ds @ k[row, :, kv]
            dk[row, :, kv] += ds.T @ q[row, :, head]
    return y, dq, dk, dv


@functools.cache
def problem(heads: int, kv_heads: int, length: int, *, size: int, documents: bool):
    """(q, k, v, segment_ids or None, g) and the expected results, in float64 and in the order of the sequence."""
    draw = np.random.default_rng(0)
    q, k, v, g = (draw.standard_normal((2, length, n, size)) for n in (heads, kv_heads, kv_heads, heads))
    ids = random_documents(2, length) if documents else None
    return (q, k, v, ids, g), by_definition(q, k, v, np.zeros((2, length), int) if ids is None else ids, g)


def on_mesh(partitioner: MeshPartitioner, q, k, v, segment_ids, g):
    """The result and gradients of the partitioner's attention; inputs and outputs are in the order of the sequence."""
    order = np.arange(q.shape[1]) if partitioner.order is None else partitioner.order
    q, k, v, g = (jnp.asarray(x[:, order]) for x in (q, k, v, g))
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids[:, order])

    @jax.jit
    def run(q, k, v, segment_ids, g):
        index = jnp.asarray(order, jnp.int32)
        ctx = Context(index, index[None], segment_ids)
        y, pull = jax.vjp(lambda q, k, v: partitioner.attention(q, k, v, ctx, AttentionSpec(SCALE)), q, k, v)
        return y, *pull(g)

    with jax.set_mesh(partitioner.mesh):
        return [np.asarray(x)[:, np.argsort(order)] for x in run(q, k, v, segment_ids, g)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("axes", "kv_heads"),
    [
        ({"context": 2}, 4),
        ({"context": 2, "tensor": 2, "data": 2}, 2),
        ({"context": 4, "fsdp": 2}, 1),
        ({"context": 8}, 2),
    ],
    ids=str,
)
def test_attention_on_a_split_sequence_is_its_definition(axes, kv_heads, documents):
    """The results agree to 1e-12 in float64: no key is left out, counted twice or out of order."""
    given, expected = problem(4, kv_heads, 32, size=6, documents=documents)
    cfg = config(model={"num_kv_heads": kv_heads}, data={"seq_len": 32, "mask_documents": documents, "eos_id": 0})
    with jax.enable_x64(True):
        for actual, right in zip(on_mesh(MeshPartitioner(cfg, mesh_of(**axes)), *given), expected, strict=True):
            assert actual.dtype == np.float64
            np.testing.assert_allclose(actual, right, rtol=0, atol=1e-12)


class Interpreted(MeshPartitioner):
    """Runs the TPU's kernel on CPUs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kernel = "splash"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_splash_on_a_split_sequence(monkeypatch, axes, documents):
    """The kernel's masks follow the order of the shards: the result and gradients are as accurate as float32."""
    monkeypatch.setattr(kernels, "splash_kernel", functools.partial(kernels.splash_kernel, interpret=True))
    given, expected = problem(4, 2, 256, size=64, documents=documents)
    given = [None if x is None else x.astype(np.float32) if x.dtype == np.float64 else x for x in given]
    cfg = config(
        data={"seq_len": 256, "mask_documents": documents, "eos_id": 0}, model={"max_seq_len": 256, "head_dim": 64}
    )
    for actual, right in zip(on_mesh(Interpreted(cfg, mesh_of(**axes)), *given), expected, strict=True):
        np.testing.assert_allclose(actual, right, rtol=0, atol=2e-5 * np.abs(right).max())


# Messages


def test_a_kernel_that_refuses_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError) as e:
        MeshPartitioner(config(model={"attention": "cudnn"}), mesh_of(data=8))
    assert str(e.value).startswith("config.model.attention is 'cudnn', which refuses: ")
    assert "NVIDIA GPUs, and this is cpu" in str(e.value) and "auto" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match=r"^config.model.attention: no kernel .* dropout .*mesh.context to 1$"):
        MeshPartitioner(config(model={"dropout": 0.1}), mesh_of(context=8))
    assert MeshPartitioner(config(model={"dropout": 0.1}), mesh_of(data=8)).kernel == "xla"


@pytest.mark.parametrize(("attention", "said"), [("auto", "xla (the best on cpu)"), ("xla", "xla (as configured)")])
def test_the_start_up_page_names_the_kernel_and_why(monkeypatch, caplog, attention, said):
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    cfg = config(model={"attention": attention})
    windows = types.SimpleNamespace(mixture=types.SimpleNamespace(consumed=lambda samples: []), sources=[])
    data = types.SimpleNamespace(datasets={}, packings={}, tokenizer_path="x")
    with caplog.at_level(logging.INFO, "meshlm"):
        startup.log_summary(cfg, Program(cfg, mesh_of(fsdp=2, context=2, tensor=2)), windows, data)
    assert f"attention {said}" in caplog.text.replace("  ", " ")
    assert "mesh data 1 x fsdp 2 x context 2 x tensor 2" in caplog.text
    assert "WARNING" not in caplog.text  # no parameter is replicated by accident
