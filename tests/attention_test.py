"""Tests rotary positions, masking, grouped queries and the cache, on arrays small enough to check by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from model import kernels
from model.attention import Attention, empty_cache
from model.config import ModelConfig
from model.context import Context
from model.dropout import Dropout
from model.kernels import AttentionSpec, Mask
from model.layers import Build
from model.rope import Rope

DRAW = np.random.default_rng


@functools.partial(jax.jit, static_argnums=2)
def rotate(x, positions, theta):
    return Rope(theta, x.shape[-1])(x, positions)


@jax.jit
def attend(q, k, v, index, segment_ids=None, *, key_segment_ids=None, scale=None, rate=0.0, key=None):
    """Calls the plain kernel. Without key_segment_ids the keys have the segment_ids of the queries."""
    spec = AttentionSpec(scale=q.shape[-1] ** -0.5 if scale is None else scale)
    mask = Mask(index, segment_ids, segment_ids if key_segment_ids is None else key_segment_ids)
    return kernels.xla(q, k, v, mask, spec, dropout=Dropout(rate, key))


def noise(*shape, seed=0):
    return DRAW(seed).standard_normal(shape).astype(np.float32)


def attend_by_hand(q, k, v, index, scale=None, *, window=None, softcap=None, segment_ids=None):
    """softmax(scale q k^T) v, one head and one query at a time, in float64; the default scale is 1 / sqrt(d)."""
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[2]
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t, last in enumerate(index):
                visible = np.arange(max(0, last + 1 - (window or last + 1)), last + 1)
                if segment_ids is not None:
                    visible = visible[segment_ids[b][visible] == segment_ids[b][last]]
                keys, values = (np.asarray(a, np.float64)[b, visible, h // share] for a in (k, v))
                scores = scale * (keys @ np.asarray(q, np.float64)[b, t, h])
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                out[b, t, h] = reference.softmax(scores) @ values
    return out


def test_rotation_of_one_pair_is_by_the_position_in_radians():
    x = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, 4, 1, 2))
    y = rotate(x, jnp.arange(4)[None], 10_000.0)[0, :, 0]
    np.testing.assert_allclose(y, [[np.cos(p), np.sin(p)] for p in range(4)], atol=1e-6)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
@pytest.mark.parametrize("positions", [[[0, 1, 7, 100, 300]], [[0, 1, 7, 100, 300], [5, 0, 1, 2, 299]]], ids=len)
def test_rotation_is_the_complex_one_of_the_halves(theta, positions):
    """Pairs are (i, i + d/2) as in Hugging Face's Llama, not (2i, 2i + 1): the layout of imported weights.

    The positions are either one array for each row or a single array for all rows.
    """
    x = noise(2, 5, 3, 8)
    y = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), theta))
    for b in range(2):
        for h in range(3):
            # float32 angles of up to 300 rad are off by up to 300 · 2^-24 = 2e-5; rounded frequencies add as much
            # again.
            expected = reference.rotate(x[b, :, h], positions[b % len(positions)], theta)
            np.testing.assert_allclose(y[b, :, h], expected, atol=2e-4)


def test_rotated_scores_depend_on_the_distance_alone():
    q, k = (jnp.broadcast_to(jnp.asarray(noise(8, seed=s)), (1, 20, 1, 8)) for s in (1, 2))
    positions = jnp.arange(20)[None]
    scores = np.einsum("td,sd->ts", *(np.asarray(rotate(x, positions, 10_000.0))[0, :, 0] for x in (q, k)))
    for distance in range(-19, 20):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(scores[0]) > 1  # the scores do depend on the distance


def test_rotation_angles_are_float32_whatever_the_dtype():
    """Position 257 is not a bfloat16 number; its angle must not become that of 256 or 258."""
    x = jnp.asarray(noise(1, 1, 1, 8), jnp.bfloat16)
    y = rotate(x, jnp.asarray([[257]]), 10_000.0)
    expected = reference.rotate(np.asarray(x, np.float64)[0, :, 0], [257], 10_000.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64)[0, :, 0], expected, rtol=2.0**-8, atol=2e-4)


def test_equal_scores_average_the_values_seen_so_far():
    v = noise(1, 6, 1, 4)
    y = attend(jnp.zeros((1, 6, 1, 4)), jnp.asarray(noise(1, 6, 1, 4)), jnp.asarray(v), jnp.arange(6))
    np.testing.assert_allclose(y[0, :, 0], np.cumsum(v[0, :, 0], 0) / np.arange(1, 7)[:, None], atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attend_is_its_definition(heads, kv_heads):
    """The scale is 1/sqrt(d), the mask is causal, and query head i uses key-value head i // (heads / kv_heads)."""
    q, k, v = 2 * noise(2, 7, heads, 5, seed=1), noise(2, 7, kv_heads, 5, seed=2), noise(2, 7, kv_heads, 5, seed=3)
    y = attend(*map(jnp.asarray, (q, k, v)), jnp.arange(7))
    np.testing.assert_allclose(y, attend_by_hand(q, k, v, range(7)), atol=2e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "t"), [(1, 9), (3, 9), (9, 9), (40, 9), (5, 140), (64, 200), (70, 256), (100, 201)])
def test_a_window_is_so_many_keys_with_its_own(window, t, documents):
    """The window may have any length; some cases are computed in blocks, of which the last may not be full."""
    q, k, v = 2 * noise(2, t, 4, 5, seed=1), noise(2, t, 2, 5, seed=2), noise(2, t, 2, 5, seed=3)
    ids = np.sort(DRAW(4).integers(0, 1 + t // 20, (2, t)), axis=1).astype(np.int32) if documents else None
    spec = AttentionSpec(0.3, window, softcap=2.0)
    mask = Mask(jnp.arange(t), ids, ids)
    expected = attend_by_hand(q, k, v, range(t), 0.3, window=window, softcap=2.0, segment_ids=ids)
    for in_order in (False, True):
        y = kernels.xla(*map(jnp.asarray, (q, k, v)), mask._replace(in_order=in_order), spec)
        np.testing.assert_allclose(y, expected, atol=3e-6)


def test_a_window_is_not_computed_as_a_full_square():
    """With 4,096 queries and a window of 128, each query is multiplied with 256 keys (in blocks), not with 4,096."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def flops(window):
        mask = Mask(jnp.arange(4096), in_order=True)
        attend = jax.jit(lambda q, k, v: kernels.xla(q, k, v, mask, AttentionSpec(1.0, window)))
        return attend.lower(x, x, x).compile().cost_analysis()["flops"]

    assert flops(128) < flops(None) / 12


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_scores_have_the_scale_of_the_spec(scale):
    q, k, v = noise(1, 5, 2, 4, seed=1), noise(1, 5, 2, 4, seed=2), noise(1, 5, 2, 4, seed=3)
    y = attend(*map(jnp.asarray, (q, k, v)), jnp.arange(5), scale=scale)
    np.testing.assert_allclose(y, attend_by_hand(q, k, v, range(5), scale), atol=2e-6)


def test_the_scale_of_a_model_is_that_of_its_heads():
    assert kernels.spec_of(ModelConfig(embed_dim=12, num_heads=4, head_dim=6)) == AttentionSpec(scale=6**-0.5)


def test_queries_see_the_keys_up_to_their_index():
    """Query indices need not start at 0, be consecutive, or increase; keys past the index may hold anything."""
    q, k, v = noise(1, 3, 2, 4, seed=1), noise(1, 9, 2, 4, seed=2), noise(1, 9, 2, 4, seed=3)
    for index in ([0, 3, 6], [6, 0, 3]):
        y = attend(*map(jnp.asarray, (q, k, v)), jnp.asarray(index))
        np.testing.assert_allclose(y, attend_by_hand(q, k, v, index), atol=2e-6)
        beyond = k.copy(), v.copy()
        beyond[0][:, 7:], beyond[1][:, 7:] = 1e4, -1e30
        np.testing.assert_array_equal(attend(*map(jnp.asarray, (q, *beyond)), jnp.asarray(index)), y)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_queries_see_the_keys_of_their_document(heads, kv_heads):
    """Each row has its own documents, and their ids need not increase."""
    q, k, v = noise(2, 7, heads, 4, seed=1), noise(2, 7, kv_heads, 4, seed=2), noise(2, 7, kv_heads, 4, seed=3)
    documents = np.array([[0, 0, 1, 1, 1, 2, 2], [4, 0, 3, 3, 3, 3, 3]], np.int32)
    y = np.asarray(attend(*map(jnp.asarray, (q, k, v)), jnp.arange(7), jnp.asarray(documents)))
    for b in range(2):
        for document in np.unique(documents[b]):
            own = documents[b] == document
            alone = attend_by_hand(*(a[b : b + 1, own] for a in (q, k, v)), range(own.sum()))
            np.testing.assert_allclose(y[b, own], alone[0], atol=2e-6)


def test_a_shard_of_the_queries_sees_the_keys_of_their_documents():
    """If there are fewer queries than keys, in another order, the queries have their own segment_ids."""
    q, k, v = noise(2, 8, 2, 4, seed=1), noise(2, 8, 2, 4, seed=2), noise(2, 8, 2, 4, seed=3)
    documents = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]], np.int32)
    whole = np.asarray(attend(*map(jnp.asarray, (q, k, v)), jnp.arange(8), jnp.asarray(documents)))
    mine = np.array([6, 7, 0, 1])
    shard = attend(
        *map(jnp.asarray, (q[:, mine], k, v, mine, documents[:, mine])), key_segment_ids=jnp.asarray(documents)
    )
    np.testing.assert_allclose(shard, whole[:, mine], atol=1e-6)


def test_scores_and_softmax_of_bfloat16_are_float32():
    """There are 512 equal weights of 1/512, and scores near 100: if bfloat16 held the sums, both would be far off."""
    q = jnp.full((1, 1, 1, 16), 5.0, jnp.bfloat16)
    k = jnp.asarray(5 + noise(1, 512, 1, 16) / 16, jnp.bfloat16)
    v = jnp.asarray(1 + noise(1, 512, 1, 16, seed=1), jnp.bfloat16)
    y = attend(q, k, v, jnp.asarray([511]))
    expected = attend_by_hand(*(np.asarray(a, np.float64) for a in (q, k, v)), [511])
    assert y.dtype == jnp.bfloat16
    # Weights are rounded to bfloat16 once (2^-8 each, which averages out over 512); the result is rounded once more.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=2e-3)


def test_dropout_acts_on_the_attention_weights():
    """If v is the identity matrix, the result is the weights: each is 0 or 1 / (1 - rate) times the plain one."""
    size, heads, rate = 64, 8, 0.25
    q, k = (jnp.asarray(noise(2, size, heads, size, seed=s)) / 4 for s in (1, 2))
    v = jnp.broadcast_to(jnp.eye(size)[None, :, None], (2, size, heads, size))
    plain, dropped, other = (
        np.asarray(attend(q, k, v, jnp.arange(size), rate=rate, key=key))
        for key in (None, jax.random.key(1), jax.random.key(2))
    )
    visible = np.broadcast_to(np.tril(np.ones((size, size), bool))[:, None], plain.shape)
    assert (plain[visible] > 0).all() and (plain[~visible] == 0).all() and (dropped[~visible] == 0).all()
    ratio = dropped[visible] / plain[visible]
    kept = ratio > 0
    np.testing.assert_allclose(ratio[kept], 1 / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    # Each row, head and query has its own mask: masks of two heads, rows or keys agree in 1 - 2 · 0.25 · 0.75 = 62.5 %.
    mask = dropped[:, 32:, :, :32] > 0
    other_mask = other[:, 32:, :, :32] > 0
    for a, b in [(mask, other_mask), (mask[0], mask[1]), (mask[:, :, 0], mask[:, :, 1]), (mask[:, 0], mask[:, 1])]:
        agree = (a == b).mean()
        assert abs(agree - 0.625) < 5 * np.sqrt(0.625 * 0.375 / a.size)


def make_attention(**fields) -> Attention:
    config = ModelConfig(num_layers=1, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, **fields)
    return Attention(Build(dataclasses.replace(config, init_std=0.6), nnx.Rngs(params=0)))


def apply(attention, x, start=0, cache=None, rate=0.0, key=None):
    """Maps x [b, t, embed] to (y [b, t, embed], the cache)."""
    index = start + jnp.arange(x.shape[1])
    if cache is not None:
        index = jnp.tile(index, (len(x), 1))
    return attention(x, Context(index, jnp.atleast_2d(index), dropout=Dropout(rate, key)), cache)


def test_attention_drops_weights_only_with_a_key():
    attention = make_attention()
    x = jnp.asarray(noise(2, 8, 12))
    run = jax.jit(lambda rate, key: apply(attention, x, 0, None, rate, key)[0])
    plain = run(0.5, None)
    np.testing.assert_array_equal(run(0.0, None), plain)
    assert np.abs(run(0.5, jax.random.key(1)) - plain).max() > 0.01
    np.testing.assert_allclose(run(0.0, jax.random.key(1)), plain, atol=1e-6)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rotary_positions_turn_keys_and_queries_but_not_values(position):
    """The input is the same everywhere: all values are equal, so the result is that value at any positions."""
    attention = make_attention(position=position)
    x = jnp.broadcast_to(jnp.asarray(noise(12)), (1, 5, 12))
    y = apply(attention, x)[0]
    value = np.asarray(attention.value(x)).reshape(1, 5, 2, 1, 6).repeat(2, axis=3).reshape(1, 5, 24)
    np.testing.assert_allclose(y, attention.out(jnp.asarray(value)), atol=1e-6)


def test_keys_and_queries_turn_by_their_position_and_see_by_their_index():
    """Two documents in one row have the same results as each of them in its own row."""
    attention = make_attention()
    x, documents = jnp.asarray(noise(1, 8, 12)), jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]])
    index = jnp.arange(8)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4]])
    together, _ = attention(x, Context(index, positions, documents))
    for own in (slice(0, 3), slice(3, 8)):
        np.testing.assert_allclose(together[:, own], apply(attention, x[:, own])[0], atol=2e-6)
    # A gap between the positions of a document changes the scores past the gap; the indices stay the same.
    gap, _ = attention(x, Context(index, positions.at[0, 5:].add(3), documents))
    np.testing.assert_array_equal(gap[:, :5], together[:, :5])
    assert np.abs(gap[:, 5:] - together[:, 5:]).max() > 1e-3


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_cache_gains_the_new_rows_and_keeps_the_others(position):
    attention = make_attention(position=position)
    x = jnp.asarray(noise(3, 8, 12))
    whole, none = apply(attention, x)
    assert none is None
    # Rows of the cache that nothing has written yet hold garbage.
    cache = {name: jnp.asarray(9 * noise(3, 10, 2, 6, seed=i)) for i, name in enumerate(("k", "v"), 1)}
    run = jax.jit(lambda x, start, cache: apply(attention, x, start, cache))
    for start, end in ((0, 4), (4, 7), (7, 8)):
        before = cache
        y, cache = run(x[:, start:end], jnp.int32(start), cache)
        np.testing.assert_allclose(y, whole[:, start:end], atol=2e-6)
        for name in ("k", "v"):
            changed = np.any(np.asarray(cache[name] != before[name]), axis=(0, 2, 3))
            np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(start, end))


def test_empty_cache_of_each_layer_is_as_long_as_what_it_sees():
    config = ModelConfig(
        num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, dtype="bfloat16", window=4,
        layer_pattern=("global", "local"),
    )  # fmt: skip
    cache = empty_cache(config, 5, 7)
    assert [layer["k"].shape for layer in cache] == [(5, 7, 2, 6), (5, 4, 2, 6), (5, 7, 2, 6)]
    for array in jax.tree.leaves(cache):
        assert array.dtype == jnp.bfloat16 and not np.any(array)
    assert [layer.keys() for layer in cache] == [{"k", "v"}] * 3
    one_head_each = dataclasses.replace(config, num_kv_heads=0)
    assert [layer["v"].shape for layer in empty_cache(one_head_each, 5, 3)] == [(5, 3, 4, 6)] * 3
