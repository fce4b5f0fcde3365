"""The fused cross-entropy, on shards and in chunks, is compared with its definition in float64, and with autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.step_test import config
from trainer import sharding
from trainer.config import Config
from trainer.loss import make_loss
from trainer.state import Program

ROWS, LENGTH, EMBED, VOCAB, PADDED = 8, 20, 32, 50, 64
Z_LOSS = 0.01
MESHES = {  # sizes of data, fsdp, context, tensor
    "one": (1, 1, 1, 1), "tensor": (1, 1, 1, 8), "data x fsdp": (4, 2, 1, 1), "fsdp x context": (1, 4, 2, 1),
    "fsdp x context x tensor": (1, 2, 2, 2), "data x context x tensor": (2, 1, 2, 2),
}  # fmt: skip


def loss_config(chunk: int = 0, tied: bool = True, z_loss: float = Z_LOSS, cap: float | None = None) -> Config:
    model = {"vocab_size": VOCAB, "max_seq_len": LENGTH, "num_heads": 8, "num_kv_heads": 8, "tie_embeddings": tied}
    model["logits_softcap"] = cap
    return config(data={"seq_len": LENGTH}, model=model, loss_chunk_tokens=chunk, z_loss=z_loss)


def program(mesh: str, **fields) -> Program:
    sizes = dict(zip(sharding.MESH_AXES, MESHES[mesh], strict=True))
    return Program(loss_config(**fields), sharding.mesh_of(sizes, jax.devices()[: int(np.prod(MESHES[mesh]))]))


@functools.cache
def arguments(tied: bool) -> tuple[np.ndarray, ...]:
    """x [rows, length, embed], table, targets, weights; every fourth token and the whole first row have weight 0."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, LENGTH, EMBED))
    table = 0.7 * draw.standard_normal((PADDED, EMBED) if tied else (EMBED, PADDED))
    targets = draw.integers(0, VOCAB, (ROWS, LENGTH))
    weights = draw.uniform(0.1, 2, (ROWS, LENGTH)) * (np.arange(LENGTH) % 4 != 0)
    weights[0] = 0
    rounded = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, table))  # exact in both dtypes
    return *rounded, targets.astype(np.int32), weights.astype(np.float32)


@functools.cache
def by_definition(tied: bool, z_loss: float = Z_LOSS, cap: float | None = None):
    """The total loss, the cross-entropy, and the gradients of the total loss for x and table, in float64."""
    x, table, targets, weights = (
        np.asarray(a, np.int64 if a.dtype == np.int32 else np.float64) for a in arguments(tied)
    )
    w = (table.T if tied else table)[:, :VOCAB]
    logits, slope = x @ w, 1.0
    if cap is not None:
        slope = np.cosh(logits / cap) ** -2.0
        logits = cap * np.tanh(logits / cap)
    log_z = np.log(np.exp(logits).sum(-1))
    loss = (weights * (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0])).sum()
    probability = np.exp(logits - log_z[..., None])
    dlogits = weights[..., None] * (probability * (1 + 2 * z_loss * log_z[..., None]) - np.eye(VOCAB)[targets])
    dlogits *= slope
    dw = np.zeros((EMBED, PADDED))  # rows that pad the vocabulary have gradient 0
    dw[:, :VOCAB] = np.einsum("bte,btv->ev", x, dlogits)
    return loss + z_loss * (weights * log_z**2).sum(), loss, dlogits @ w.T, dw.T if tied else dw


def evaluate(here: Program, tied: bool, dtype: str = "float32", times: float = 1.0):
    """[total loss, cross-entropy] computed without gradients, the same computed with gradients, and the gradients of x
    and table."""
    x, table, targets, weights = arguments(tied)
    loss = make_loss(here)

    @jax.jit
    def run(x, table, targets, weights):
        def scaled(x, table):
            total, loss_ = loss(x, table, targets, weights)
            return times * total, (total, loss_)

        (_, values), gradients = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(x, table)
        return loss(x, table, targets, weights), values, gradients

    with jax.set_mesh(here.mesh):
        plain, values, (dx, dtable) = run(jnp.asarray(x, dtype), table, targets, weights)
    assert dx.dtype == dtype and dtable.dtype == np.float32
    return [*map(float, plain)], [*map(float, values)], np.asarray(dx, np.float64), dtable


def assert_close(actual, expected, rtol):
    """Compares the norm of the difference with the norm of `expected`, because single elements may be near 0."""
    assert np.linalg.norm(actual - expected) < rtol * np.linalg.norm(expected)


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 8, 1000])
def test_every_size_of_chunk_gives_the_loss_and_gradients_of_its_definition(chunk):
    """There are 160 tokens on one device: 1 and 8 divide this number, 3 and 7 do not, so the last chunk is padded."""
    plain, values, dx, dtable = evaluate(program("one", chunk=chunk), tied=True)
    total, loss, expected_dx, expected_dtable = by_definition(True)
    assert plain == values == pytest.approx([total, loss], rel=1e-6)
    assert_close(dx, expected_dx, 2e-6)
    assert_close(dtable, expected_dtable, 2e-6)
    assert not dtable[VOCAB:].any() and not dx[:, ::4].any() and not dx[0].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_every_mesh_gives_the_loss_and_gradients_of_its_definition(mesh, tied):
    """If tensor is 8, all columns of the last shard pad the vocabulary."""
    plain, values, dx, dtable = evaluate(program(mesh, tied=tied, chunk=7), tied)
    total, loss, expected_dx, expected_dtable = by_definition(tied)
    assert plain == values == pytest.approx([total, loss], rel=1e-6)
    assert_close(dx, expected_dx, 2e-6)
    assert_close(dtable, expected_dtable, 2e-6)


@pytest.mark.parametrize("mesh", ["one", "fsdp x context x tensor"])
def test_a_cap_of_logits_is_in_the_loss_and_in_its_gradients(mesh):
    """Logits reach 15, and the cap is 3, so it changes most of them."""
    plain, values, dx, dtable = evaluate(program(mesh, chunk=7, cap=3.0), tied=True)
    total, loss, expected_dx, expected_dtable = by_definition(True, cap=3.0)
    assert plain == values == pytest.approx([total, loss], rel=1e-6) and loss < 0.6 * by_definition(True)[1]
    assert_close(dx, expected_dx, 2e-6)
    assert_close(dtable, expected_dtable, 2e-6)
    assert np.isfinite(dtable).all() and not dtable[VOCAB:].any()


@pytest.mark.parametrize("mesh", ["one", "fsdp x context x tensor"])
def test_bfloat16_is_rounded_in_the_gradients_alone(mesh):
    """Products of bfloat16 are exact in float32, and all sums are float32; the gradients of logits and dx are rounded
    once each."""
    plain, values, dx, dtable = evaluate(program(mesh, tied=False, chunk=8), False, "bfloat16")
    total, loss, expected_dx, expected_dtable = by_definition(False)
    assert plain == values == pytest.approx([total, loss], rel=1e-5)
    # dx has two roundings, each of at most 2^-9, up or down; the gradient of the table has only the first.
    assert_close(dx, expected_dx, 2.0**-8)
    assert_close(dtable, expected_dtable, 2.0**-9)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_autodiff(tied):
    """Compares with autodiff of a plain loss, whose gradients are not written by hand."""
    x, table, targets, weights = arguments(tied)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def plain(x, table):
        logits = jnp.where(jnp.arange(PADDED) < VOCAB, x @ (table.T if tied else table), -jnp.inf)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * (nats + Z_LOSS * log_z**2))

    dx, dtable = evaluate(program("one", tied=tied, chunk=8), tied)[2:]
    expected_dx, expected_dtable = plain(x, table)
    assert_close(dx, expected_dx, 2e-6)
    assert_close(dtable, expected_dtable, 2e-6)


def test_without_z_loss_the_total_loss_is_the_cross_entropy():
    plain, values, dx, _ = evaluate(program("one", z_loss=0.0, chunk=8), True)
    assert plain == values and values[0] == values[1]
    assert_close(dx, by_definition(True, 0.0)[2], 2e-6)


def test_the_gradient_is_that_of_the_total_loss_times_what_is_made_of_it():
    _, _, dx, dtable = evaluate(program("data x fsdp", chunk=7), True, times=-3.0)
    _, _, expected_dx, expected_dtable = by_definition(True)
    assert_close(dx, -3 * expected_dx, 2e-6)
    assert_close(dtable, -3 * expected_dtable, 2e-6)


def test_the_cross_entropy_is_for_reading():
    """The cross-entropy has no gradient, because training uses the total loss."""
    x, table, targets, weights = arguments(True)
    here = program("one", chunk=8)
    loss = make_loss(here)
    with jax.set_mesh(here.mesh):
        grads = jax.jit(jax.grad(lambda x, t: loss(x, t, targets, weights)[1], (0, 1)))(x, table)
    assert not any(np.asarray(g).any() for g in grads)


def test_large_logits_do_not_overflow():
    """exp(200) overflows float32."""
    here = program("fsdp x context x tensor", chunk=7)
    x, table, targets, weights = arguments(True)
    with jax.set_mesh(here.mesh):
        total, loss = jax.jit(make_loss(here))(x, 100 * table, targets, weights)
    logits = x.astype(np.float64) @ (100 * table.astype(np.float64)[:VOCAB]).T
    assert logits.max() > 200
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    expected = (weights * (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0])).sum()
    assert float(loss) == pytest.approx(expected, rel=1e-6) and np.isfinite(float(total))


@pytest.mark.parametrize(
    ("tokens", "most", "chunks", "size"),
    [
        (160, 0, 1, 160), (160, 1000, 1, 160), (160, 80, 2, 80), (160, 79, 3, 54), (160, 7, 23, 7), (160, 1, 160, 1),
        (509, 256, 2, 255), (8191, 4096, 2, 4096), (8209, 4096, 3, 2737), (1, 4096, 1, 1), (2, 1, 2, 1), (7, 6, 2, 4),
    ],
)  # fmt: skip
def test_chunks_are_equal_and_as_few_as_the_largest_size_allows(tokens, most, chunks, size):
    """The number of tokens may be prime; logits are [chunk, vocabulary]."""
    x, targets, weights = (
        np.zeros((1, tokens, EMBED), np.float32),
        np.zeros((1, tokens), np.int32),
        np.ones((1, tokens)),
    )
    loss = make_loss(program("one", chunk=most))
    jaxpr = jax.make_jaxpr(loss)(x, arguments(True)[1], targets, weights.astype(np.float32))
    shapes = shapes_of(jaxpr.jaxpr)
    assert max(shape[0] for shape in shapes if shape[1:] == (PADDED,)) == size
    assert (chunks, size, EMBED) in shapes and chunks * size - tokens < chunks


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars}
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= shapes_of(inner)
    return found
