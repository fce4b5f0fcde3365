"""Compares the whole transformer with a NumPy reference in float64, and its own switches with each other."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_models
from flax import nnx, traverse_util
from tiny_models import CONFIGS, CONTEXT, every_config

from model import kernels
from model.attention import empty_cache
from model.config import ModelConfig
from model.dropout import dropout_rate
from model.kernels import Mask
from model.partitioner import Partitioner
from model.transformer import Transformer, turns
from trainer.parallel.partitioner import zigzag_order

# Rounding of float32 (6e-8) over sums of up to 100 terms and a few layers, at logits of up to 10: about 1e-5 at worst.
LOGITS_ATOL = 2e-5


def mean_cross_entropy(logits, targets):
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.mean(log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0])


@functools.cache
def loss_and_gradient(config: ModelConfig):
    """(params, tokens [b, t + 1], key or None) -> ((loss, logits), gradient), compiled."""
    apply = tiny_models.applier(config)

    def loss(params, tokens, key):
        logits, _ = apply(params)(tokens[:, :-1], dropout_rate=dropout_rate(config, 0), dropout_key=key)
        return mean_cross_entropy(logits, tokens[:, 1:]), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def evaluated(config: ModelConfig):
    """tokens [3, max_seq_len + 1], loss, logits, gradient by path."""
    tokens = tiny_models.random_tokens(config, 3, config.max_seq_len + 1)
    with jax.default_matmul_precision("highest"):
        (loss, logits), gradient = loss_and_gradient(config)(tiny_models.make(config)[1], tokens, None)
    return tokens, float(loss), np.asarray(logits), traverse_util.flatten_dict(jax.tree.map(np.asarray, gradient))


@pytest.mark.parametrize("config", **every_config)
def test_logits_and_loss_are_those_of_the_reference(config):
    """Covers every option of the forward pass, and the logits of the vocabulary's padding, which are -inf."""
    tokens, loss, logits, _ = evaluated(config)
    expected, attention = reference.forward_and_attention(tiny_models.make(config)[1], config, tokens[:, :-1])
    assert logits.dtype == np.float32 and logits.shape == (3, config.max_seq_len, 64)
    np.testing.assert_allclose(logits[..., : config.vocab_size], expected, rtol=0, atol=LOGITS_ATOL)
    assert (logits[..., config.vocab_size :] == -np.inf).all()
    assert loss == pytest.approx(reference.cross_entropy(expected, tokens[:, 1:]), abs=5e-6)
    # The comparison is meaningful: logits vary, and attention is neither uniform nor stuck on one token.
    assert expected.std() > 0.5
    assert len(attention) == config.num_layers * config.num_heads
    for weights in attention:
        assert 0.15 < weights[:, -1].max(-1).mean() < 0.95  # uniform attention would be 1/16 or 1/12


@pytest.mark.parametrize("config", **every_config)
def test_gradients_are_the_slopes_of_the_reference(config):
    """Checks central differences of the float64 loss along single coordinates and a random direction of every leaf."""
    tokens, _, _, gradient = evaluated(config)
    params = traverse_util.flatten_dict(reference.as_float64(tiny_models.make(config)[1]))
    assert gradient.keys() == params.keys()
    draw = np.random.default_rng(1)

    def loss_at(path, leaf):
        moved = traverse_util.unflatten_dict(params | {path: leaf})
        return reference.cross_entropy(reference.forward(moved, config, tokens[:, :-1]), tokens[:, 1:])

    for path, leaf in params.items():
        g = gradient[path].astype(np.float64)
        assert g.shape == leaf.shape and gradient[path].dtype == np.float32
        directions = [draw.standard_normal(leaf.shape) / np.sqrt(leaf.size)]
        for index in (draw.integers(leaf.size), np.abs(g).argmax()):
            directions.append(np.zeros(leaf.shape))
            directions[-1].flat[index] = 1
        for direction in directions:
            h = 1e-4 * leaf.std()
            slope = (loss_at(path, leaf + h * direction) - loss_at(path, leaf - h * direction)) / (2 * h)
            # float32 was off by up to 3e-7 when this was written.
            np.testing.assert_allclose((g * direction).sum(), slope, rtol=2e-5, atol=5e-7, err_msg="/".join(path))
        # Every parameter matters, except the keys' bias: adding the same vector to all keys does not change the
        # softmax, unless rope rotates the vector.
        if path[-2:] != ("key", "bias") or config.position == "rope":
            assert np.abs(g).max() > 1e-4, path


BASE = dataclasses.replace(CONFIGS["llama"], dropout=0.2)
VARIANTS = [
    {"remat": "dots"},
    {"remat": "full"},
    {"scan_layers": False, "remat": "dots"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_scanning_and_rematerialisation_change_nothing(fields):
    """The same parameters and dropout key give the same loss, logits and gradients: a checkpoint fits all variants."""
    params, tokens = tiny_models.random_params(BASE), tiny_models.random_tokens(BASE, 2, BASE.max_seq_len + 1)
    key = jax.random.key(5, impl="unsafe_rbg")  # this compiles faster than threefry, and also depends only on the key
    (loss, logits), gradient = loss_and_gradient(BASE)(params, tokens, key)
    other = dataclasses.replace(BASE, **fields)
    assert jax.tree.map(np.shape, tiny_models.random_params(other)) == jax.tree.map(np.shape, params)
    (other_loss, other_logits), other_gradient = loss_and_gradient(other)(params, tokens, key)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(other_logits[..., :50], logits[..., :50], rtol=0, atol=LOGITS_ATOL)
    for path, g in traverse_util.flatten_dict(gradient).items():
        g_other = traverse_util.flatten_dict(other_gradient)[path]
        # The order of sums may differ, so rounding is allowed, relative to the leaf's largest gradient.
        np.testing.assert_allclose(g_other, g, rtol=0, atol=1e-5 * np.abs(g).max(), err_msg="/".join(path))


def count_of(primitive: str, jaxpr) -> int:
    n = 0
    for equation in jaxpr.eqns:
        n += equation.primitive.name == primitive
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    n += count_of(primitive, inner)
    return n


def test_each_remat_policy_recomputes_what_it_says():
    """In the backward pass, `none` recomputes no matrix product, `dots` attention's two, `full` those of a layer."""
    counts = {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(BASE, remat=remat)
        tokens = np.zeros((2, config.max_seq_len + 1), np.int32)
        params = tiny_models.random_params(config)
        counts[remat] = count_of("dot_general", jax.make_jaxpr(loss_and_gradient(config))(params, tokens, None).jaxpr)
    # Of a layer's 7 weight products and 2 of attention, the backward pass does not need the result of the last.
    assert counts["dots"] == counts["none"] + 2
    assert counts["full"] == counts["none"] + 8


def test_scan_compiles_one_layer_and_unroll_all():
    def while_loops(config):
        params, tokens = tiny_models.make(config)[1], tiny_models.random_tokens(config, 1)
        return tiny_models.jitted_forward(config).lower(params, tokens).as_text().count("stablehlo.while")

    assert while_loops(CONFIGS["llama"]) == 1
    assert while_loops(dataclasses.replace(CONFIGS["llama"], scan_layers=False)) == 0


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("GGGG", [("G", 4)]),
        ("G", [("G", 1)]),
        ("LGLG", [("LG", 2)]),
        ("LGLGL", [("LG", 2), ("L", 1)]),
        ("LLGLLGLL", [("LLG", 2), ("LL", 1)]),
        ("GGGGLLL", [("G", 4), ("L", 3)]),
        ("GLLL", [("G", 1), ("L", 3)]),
        ("LG", [("L", 1), ("G", 1)]),
    ],
)
def test_layers_are_looped_over_in_turns_or_runs(kinds, expected):
    local = {"L": True, "G": False}
    found = turns(tuple(local[kind] for kind in kinds))
    assert found == [(tuple(local[kind] for kind in turn), count) for turn, count in expected]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_profile_says_which_part_of_the_model_an_operation_is_of(remat):
    """The lowered program has named scopes: attention has q, k, v, out and its two products, the MLP has three."""
    config = dataclasses.replace(CONFIGS["llama"], remat=remat)
    params, tokens = tiny_models.make(config)[1], tiny_models.random_tokens(config, 1)
    text = tiny_models.jitted_forward(config).lower(params, tokens).as_text(debug_info=True)
    names = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    products = [names[loc] for loc in re.findall(r"stablehlo\.dot_general.*loc\((#loc\d+)\)$", text, re.MULTILINE)]
    for scope, count in {"attention": 6, "mlp": 3}.items():
        assert len([name for name in products if scope in name.split("/")]) == count
    assert len(products) == 10  # these nine and the head
    assert {"embedding", "norm"} <= {scope for name in names.values() for scope in name.split("/")}


@pytest.mark.parametrize("config", **every_config)
def test_every_parameter_names_one_logical_axis_per_dimension(config):
    """trainer/sharding.py places each array by these names; a wrong name gives a wrong layout or needless copies."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.embed_dim,
        "heads": config.num_heads * config.head_size,
        "kv_heads": config.kv_heads * config.head_size,
        "mlp": config.mlp_size,
        "vocab": config.padded_vocab_size,
        "position": config.max_seq_len,
        None: config.head_size,  # norms of single heads
    }
    for path, variable in tiny_models.abstract(config)[1].items():
        value, axes = variable.get_value(), variable.get_metadata("axes")
        assert value.dtype == jnp.float32, path
        assert value.shape == tuple(sizes[axis] for axis in axes), path
        assert (path[0] == "layers") == (axes[0] == "layers"), path
        assert len(set(axes)) == len(axes), path


EXPECTED_AXES = {  # the axes of parameters that are easily confused
    ("layers", "attention", "query", "kernel"): ("layers", "embed", "heads"),
    ("layers", "attention", "key", "kernel"): ("layers", "embed", "kv_heads"),
    ("layers", "attention", "out", "kernel"): ("layers", "heads", "embed"),
    ("layers", "mlp", "up", "kernel"): ("layers", "embed", "mlp"),
    ("layers", "mlp", "down", "kernel"): ("layers", "mlp", "embed"),
    ("layers", "mlp", "down", "bias"): ("layers", "embed"),
    ("layers", "mlp", "up", "bias"): ("layers", "mlp"),
    ("embedding",): ("vocab", "embed"),
    ("norm", "scale"): ("embed",),
}


def test_axes_of_the_usual_parameters():
    parameters = tiny_models.abstract(CONFIGS["gpt2"])[1]
    assert {path: parameters[path].get_metadata("axes") for path in EXPECTED_AXES} == EXPECTED_AXES


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp": "gelu", "position": "learned",
                "norm": "layernorm", "bias": True, "vocab_size": 50257, "max_seq_len": 1024,
            },
            124_439_808,
        ),
        (
            {
                "num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 14336,
                "tie_embeddings": False, "vocab_size": 128256, "max_seq_len": 8192,
            },
            8_030_261_248,
        ),
    ],
    ids=["GPT-2", "Llama 3 8B"],
)  # fmt: skip
def test_published_models_have_their_published_number_of_parameters(fields, expected):
    config = ModelConfig(**fields)
    shapes = [variable.get_value().shape for variable in tiny_models.abstract(config)[1].values()]
    padding = (config.padded_vocab_size - config.vocab_size) * config.embed_dim
    assert sum(int(np.prod(shape)) for shape in shapes) - padding == expected


UNTRAINED = dataclasses.replace(CONFIGS["gpt2"], mlp="swiglu", tie_embeddings=False)  # has every kind of parameter


@pytest.fixture(scope="module")
def initial_params() -> dict:
    init = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Transformer(UNTRAINED, nnx.Rngs(params=key)), nnx.Param)))
    return init(jax.random.key(0))


def test_initial_parameters(initial_params):
    """As in GPT-2: deviation 0.02, less for weights into the residual stream; scales 1, biases 0; layers differ."""
    kinds = set()
    for path, leaf in traverse_util.flatten_dict(initial_params).items():
        assert leaf.dtype == jnp.float32
        kinds.add(path[-1])
        if path[-1] in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, 1.0 if path[-1] == "scale" else 0.0)
            continue
        std = UNTRAINED.init_std
        if path[-2:-1] in (("out",), ("down",)):
            std /= np.sqrt(2 * UNTRAINED.num_layers)
        # The tolerance is five standard errors of the deviation of n draws: std / sqrt(2n).
        assert abs(leaf.std() - std) < 5 * std / np.sqrt(2 * leaf.size), path
        if path[0] == "layers":
            assert np.abs(np.corrcoef(leaf[0].ravel(), leaf[1].ravel())[0, 1]) < 5 / np.sqrt(leaf[0].size), path
    assert kinds == {"embedding", "position", "kernel", "scale", "bias"}


@pytest.mark.parametrize("tied", [False, True])
def test_an_untrained_model_knows_nothing(initial_params, tied):
    """The loss is that of guessing among vocab_size tokens; guessing among the padded 64 would be 6 % more."""
    config = dataclasses.replace(UNTRAINED, tie_embeddings=tied)
    params = {name: leaf for name, leaf in initial_params.items() if not (tied and name == "head")}
    tokens = tiny_models.random_tokens(config, 8, config.max_seq_len + 1)
    logits = tiny_models.jitted_forward(config)(params, tokens[:, :-1])
    loss = float(mean_cross_entropy(logits, tokens[:, 1:]))
    assert loss == pytest.approx(np.log(config.vocab_size), rel=0.03)


def test_a_model_without_a_vocabulary_or_context_is_refused():
    for missing in ("vocab_size", "max_seq_len"):
        config = dataclasses.replace(CONFIGS["llama"], **{missing: 0})
        with pytest.raises(ValueError, match=missing):
            Transformer(config, nnx.Rngs(params=0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_stays_close_to_float32(name):
    """Activations are in bfloat16; parameters and logits stay in float32."""
    config = CONFIGS[name]
    half = dataclasses.replace(config, dtype="bfloat16")
    params, tokens = tiny_models.make(config)[1], tiny_models.random_tokens(config, 4)
    exact = tiny_models.jitted_forward(config)(params, tokens)[..., : config.vocab_size]
    logits = tiny_models.jitted_forward(half)(params, tokens)[..., : config.vocab_size]
    assert logits.dtype == jnp.float32
    for variable in tiny_models.abstract(half)[1].values():
        assert variable.get_value().dtype == jnp.float32
    # The error of rounding only the parameters, in float64. The model also rounds the activations before and after a
    # product. Rounding is as likely up as down, so three times as many give sqrt(3) times the error; 3 leaves a margin.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    unavoidable = reference.forward(rounded, config, tokens) - reference.forward(params, config, tokens)
    error = np.asarray(logits - exact)
    for measure in (np.std, np.ptp):
        assert 0.5 * measure(unavoidable) < measure(error) < 3 * measure(unavoidable)


def test_bfloat16_is_the_type_of_every_weight_product():
    """Matrix units are fast only in bfloat16: one operand in float32 would make the whole product float32."""
    config = dataclasses.replace(CONFIGS["gpt2"], dtype="bfloat16", scan_layers=True)
    apply, params = tiny_models.make(config)
    jaxpr = jax.make_jaxpr(lambda params, tokens: apply(params)(tokens)[0])(params, np.zeros((2, 16), np.int32)).jaxpr
    operands: list = []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                operands.extend(str(v.aval.dtype) for v in equation.invars)
            for value in equation.params.values():
                if hasattr(getattr(value, "jaxpr", None), "eqns"):
                    collect(value.jaxpr)

    collect(jaxpr)
    assert operands == ["bfloat16"] * 18  # q, k, v, out, up, down, two of attention, head


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_logit_depends_on_a_later_token(name):
    config = CONFIGS[name]
    forward, params = tiny_models.jitted_forward(config), tiny_models.make(config)[1]
    tokens = tiny_models.random_tokens(config, 4)
    logits = np.asarray(forward(params, tokens))[..., : config.vocab_size]
    for t in range(config.max_seq_len):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % config.vocab_size
        other = np.asarray(forward(params, changed))[..., : config.vocab_size]
        np.testing.assert_array_equal(other[:, :t], logits[:, :t])
        # Every later position must see the change, or the check above proves nothing.
        assert (np.abs(other - logits)[:, t:].max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_documents_of_a_row_are_as_if_each_had_a_row_of_its_own(name):
    """With rotary or learned positions, each document has the logits of the reference for only that document."""
    config = CONFIGS[name]
    params = tiny_models.make(config)[1]
    tokens, documents = tiny_models.random_tokens(config, 2), documents_of([3, 4, 9], [6])
    with jax.default_matmul_precision("highest"):
        logits = tiny_models.jitted_forward(config)(params, tokens, **documents)
    for row in range(2):
        for document in np.unique(documents["segment_ids"][row]):
            own = documents["segment_ids"][row] == document
            alone = reference.forward(params, config, tokens[row : row + 1, own])
            np.testing.assert_allclose(logits[row, own, : config.vocab_size], alone[0], rtol=0, atol=LOGITS_ATOL)


def documents_of(*borders: list[int]) -> dict[str, np.ndarray]:
    """positions and segment_ids of rows of CONTEXT tokens in which documents begin at 0 and at these places."""
    positions = np.zeros((len(borders), CONTEXT), np.int32)
    segment_ids = np.zeros_like(positions)
    for row, begins in enumerate(borders):
        for document, (first, stop) in enumerate(itertools.pairwise([0, *begins, CONTEXT])):
            positions[row, first:stop] = range(stop - first)
            segment_ids[row, first:stop] = document
    return {"positions": positions, "segment_ids": segment_ids}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("documents", [False, True])
def test_tokens_in_another_order_have_the_same_logits_at_their_index(name, documents):
    """This holds for the order of a sequence that is split over devices, and for any other order."""
    config = CONFIGS[name]
    forward, params = tiny_models.jitted_forward(config), tiny_models.make(config)[1]
    tokens = tiny_models.random_tokens(config, 2)
    arrays = documents_of([3, 4, 9], [6]) if documents else {}
    in_order = np.asarray(forward(params, tokens, **arrays))
    for order in (zigzag_order(CONTEXT, 2), zigzag_order(CONTEXT, 4), np.random.default_rng(0).permutation(CONTEXT)):
        moved = InOrder(order)
        apply = tiny_models.applier(config, moved)

        @jax.jit
        def run(params, tokens, index, arrays, apply=apply):
            return apply(params)(tokens, index=index, **arrays)[0]

        of_order = {name: array[:, order] for name, array in arrays.items()}
        logits = run(params, tokens[:, order], np.asarray(order, np.int32), of_order)
        np.testing.assert_allclose(logits[..., :50], in_order[:, order, :50], rtol=0, atol=LOGITS_ATOL)
        assert np.abs(in_order[:, order, :50] - in_order[..., :50]).max() > 0.1
        assert moved.calls


class InOrder(Partitioner):
    """Computes attention of tokens in `order`, as MeshPartitioner does: keys are put back in sequence order."""

    def __init__(self, order):
        self.order = order
        self.calls = 0

    def attention(self, q, k, v, ctx, spec):
        self.calls += 1
        back = np.argsort(self.order)
        ids = ctx.segment_ids
        mask = Mask(ctx.index, ids, None if ids is None else ids[:, back])
        return kernels.xla(q, k[:, back], v[:, back], mask, spec, dropout=ctx.dropout)


def test_a_cache_and_several_documents_are_refused():
    config = CONFIGS["llama"]
    tokens = tiny_models.random_tokens(config, 1, 4)
    with pytest.raises(ValueError, match="one document a row"):
        tiny_models.applier(config)(tiny_models.make(config)[1])(
            tokens, segment_ids=jnp.zeros_like(tokens), cache=empty_cache(config, 1, 8)
        )


def test_rows_of_a_batch_do_not_see_each_other():
    config = CONFIGS["llama"]
    forward, params = tiny_models.jitted_forward(config), tiny_models.make(config)[1]
    tokens = tiny_models.random_tokens(config, 4)
    changed = tokens.copy()
    changed[1] = (changed[1] + 1) % config.vocab_size
    np.testing.assert_array_equal(forward(params, changed)[0], forward(params, tokens)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_prefill_and_decoding_with_a_cache_give_the_logits_of_a_full_pass(name):
    """Passes prompts of different lengths with padding after them, then three tokens, then single ones, each row at its
    own index."""
    config = CONFIGS[name]
    apply, params = tiny_models.make(config)
    tokens = tiny_models.random_tokens(config, 4)
    full = np.asarray(tiny_models.jitted_forward(config)(params, tokens))[..., : config.vocab_size]
    run = jax.jit(lambda params, tokens, cache, **index: apply(params)(tokens, cache=cache, **index))
    at = np.array([5, 1, 8, 3], np.int32)
    buffer = np.where(np.arange(config.max_seq_len) < at[:, None], tokens, 7)
    logits, cache = jax.jit(lambda params, tokens: apply(params)(tokens, keep=True))(params, buffer)
    for row, length in enumerate(at):
        actual = logits[row, :length, : config.vocab_size]
        np.testing.assert_allclose(actual, full[row, :length], rtol=0, atol=LOGITS_ATOL)
    for size in (3, *[1] * (config.max_seq_len - 8 - 3)):
        index = at[:, None] + np.arange(size, dtype=np.int32)
        logits, cache = run(params, np.take_along_axis(tokens, index, 1), cache, index=index)
        assert logits.shape == (4, size, 64) and np.all(logits[..., config.vocab_size :] == -np.inf)
        expected = np.take_along_axis(full, index[..., None], 1)
        np.testing.assert_allclose(logits[..., : config.vocab_size], expected, rtol=0, atol=LOGITS_ATOL)
        at += size
    assert at.max() == config.max_seq_len


def test_the_logits_of_one_position_of_each_row_are_those_of_all_positions():
    config = CONFIGS["llama"]
    forward, params = tiny_models.jitted_forward(config), tiny_models.make(config)[1]
    tokens, positions = tiny_models.random_tokens(config, 4), np.array([0, 6, config.max_seq_len - 1, 3], np.int32)
    full = np.take_along_axis(np.asarray(forward(params, tokens)), positions[:, None, None], 1)
    one = forward(params, tokens, logits_at=positions)
    assert one.shape == (4, 1, 64)
    np.testing.assert_allclose(one[..., :50], full[..., :50], rtol=0, atol=LOGITS_ATOL)
    assert (one[..., 50:] == -np.inf).all()


DROPOUT = ModelConfig(
    num_layers=2, embed_dim=64, num_heads=4, bias=True, tie_embeddings=False, vocab_size=64, max_seq_len=16
)


def test_dropout_needs_a_key_and_follows_it():
    config = DROPOUT
    forward, params = tiny_models.jitted_forward(config), tiny_models.make(config)[1]
    tokens = tiny_models.random_tokens(config, 4)
    plain = np.asarray(forward(params, tokens))

    def dropped(rate, key):
        keyed = forward(params, tokens, dropout_rate=np.float32(rate), dropout_key=jax.random.key(key))
        return np.asarray(keyed)

    # A rate without a key means evaluation of a model that trains with dropout.
    np.testing.assert_array_equal(forward(params, tokens, dropout_rate=np.float32(0.5)), plain)
    np.testing.assert_allclose(dropped(0.0, 1), plain, rtol=0, atol=LOGITS_ATOL)
    np.testing.assert_array_equal(dropped(0.3, 1), dropped(0.3, 1))
    assert np.abs(dropped(0.3, 1) - plain).max() > 0.1
    assert np.abs(dropped(0.3, 1) - dropped(0.3, 2)).max() > 0.1


def test_every_dropout_of_every_layer_has_a_mask_of_its_own():
    """The model of this test writes its masks into its logits.

    All weights are 0, the biases of the sub-layers' outputs are powers of two, and the head is the identity: before
    the last norm, the stream is the sum of 16 (embedding), 1 and 2 (attention and feed-forward of the first layer),
    4 and 8 (of the second), each kept or dropped and scaled alike.
    """
    config = DROPOUT
    leaves = {path: np.zeros(v.get_value().shape, np.float32) for path, v in tiny_models.abstract(config)[1].items()}
    for name, path in ((1.0, ("attention", "out")), (2.0, ("mlp", "down"))):
        leaves["layers", *path, "bias"][:] = name * np.array([[1.0], [4.0]])
    leaves["embedding",][:] = 16
    leaves["norm", "scale"][:] = 1
    leaves["head", "kernel"][:] = np.eye(64)
    tokens = tiny_models.random_tokens(config, 4)
    rate = 0.3
    logits = tiny_models.jitted_forward(config)(
        traverse_util.unflatten_dict(leaves), tokens, dropout_rate=np.float32(rate), dropout_key=jax.random.key(3)
    )
    # The norm divides each position by one number; the largest of its 64 sums is almost surely 31.
    sums = 31 * np.asarray(logits) / np.max(logits, axis=-1, keepdims=True)
    whole = np.rint(sums).astype(int)
    np.testing.assert_allclose(sums, whole, atol=1e-3)
    masks = np.stack([(whole >> bit & 1).ravel() for bit in range(5)])
    n = masks.shape[1]
    assert np.abs(masks.mean(1) - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / n)
    assert np.abs(np.corrcoef(masks) - np.eye(5)).max() < 5 / np.sqrt(n)


@pytest.mark.parametrize("config", **every_config)
def test_activations_are_placed_by_the_names_of_their_axes(config):
    """Each dimension has one name or None, as trainer/sharding.py expects, and each name is on the right dimension."""
    seen: set[str | None] = set()
    sizes = {
        "batch": 3, "seq": 7, "heads": config.num_heads, "kv_heads": config.kv_heads, "vocab": config.padded_vocab_size,
        "mlp": config.mlp_size,
    }  # fmt: skip

    class Checking(Partitioner):
        def __init__(self, context_parallel):
            self.context_parallel = context_parallel

        def constrain(self, x, axes):
            assert len(axes) == x.ndim
            for axis, size in zip(axes, x.shape, strict=True):
                assert axis is None or sizes[axis] == size, (axes, x.shape)
            assert axes[:2] == ("batch", "seq")
            seen.update(axes)
            return x

        def linear(self, x, w, axes):
            # Batch and sequence are one axis of a product with a weight, unless the sequence is split.
            assert x.shape[:-1] == ((3, 7) if self.context_parallel else (3 * 7,))
            return super().linear(x, w, axes)

        def add_bias(self, y, b, axes):
            assert y.shape[:-1] == (3, 7)
            return super().add_bias(y, b, axes)

    params = tiny_models.make(config)[1]
    for context_parallel in (False, True):
        seen.clear()
        apply = tiny_models.applier(config, Checking(context_parallel))
        jax.eval_shape(lambda apply=apply: apply(params)(np.zeros((3, 7), np.int32)))
        assert seen == {*sizes, None}


@pytest.mark.parametrize("config", **every_config)
def test_every_parameter_is_gathered_or_looked_up_under_its_own_axes(config):
    """A parameter that is used directly would be only a shard of itself on a mesh."""
    used: list[tuple] = []

    class Recording(Partitioner):
        def gather_param(self, w, axes, dtype):
            used.append((axes, w.shape))
            return super().gather_param(w, axes, dtype)

        def embed(self, table, ids, axes, dtype):
            used.append((axes, table.shape))
            return super().embed(table, ids, axes, dtype)

    apply = tiny_models.applier(dataclasses.replace(config, scan_layers=True), Recording())
    jax.eval_shape(lambda: apply(tiny_models.make(config)[1])(np.zeros((3, 7), np.int32)))
    expected = []
    traced = sum(len(kinds) for kinds, _ in turns(config.local_layers))
    for variable in tiny_models.abstract(config)[1].values():
        axes, shape = variable.get_metadata("axes"), variable.get_value().shape
        in_stack = axes[0] == "layers"
        expected += [(axes[in_stack:], shape[in_stack:])] * (traced if in_stack else 1)
    if config.tie_embeddings:
        # The tied table is also used as the output table.
        expected.append((("vocab", "embed"), (config.padded_vocab_size, config.embed_dim)))
    assert sorted(used, key=str) == sorted(expected, key=str)


def test_the_constrained_activation_is_the_one_that_is_used():
    """A constraint whose result is not used would have no effect."""
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    tokens = tiny_models.random_tokens(config, 3, 7)
    calls: list[tuple] = []

    class Altering(Partitioner):
        def __init__(self, alter):
            self.alter = alter

        def constrain(self, x, axes):
            return self.alter(x, axes)

    recording = Altering(lambda x, axes: (calls.append(axes), x)[1])
    jax.eval_shape(lambda: tiny_models.applier(config, recording)(params)(tokens))
    assert len(calls) == 8  # embedding, q, k, v, the stream after each sub-layer, mlp, logits

    @jax.jit
    def with_zero_at(params, chosen):
        """The logits if `constrain` returns zeros in its call number `chosen`."""
        count = itertools.count()
        altering = Altering(lambda x, axes: jnp.where(next(count) == chosen, 0, x))
        return tiny_models.applier(config, altering)(params)(tokens)[0]

    plain = np.asarray(with_zero_at(params, -1))[..., : config.vocab_size]
    for chosen in range(len(calls)):
        changed = np.asarray(with_zero_at(params, chosen))[..., : config.vocab_size]
        assert np.abs(changed - plain).max() > 1e-3, calls[chosen]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_are_as_exact_in_bfloat16_as_those_of_the_loss(name):
    """Products of bfloat16 numbers are summed and kept in float32: if rounded again, they would pick other tokens."""
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    params, tokens = tiny_models.random_params(config), tiny_models.random_tokens(config, 2)
    model = tiny_models.applier(config)(params)
    logits, _ = model(tokens)
    hidden, table = model.hidden(tokens)[0], model.output_table().astype(jnp.bfloat16)
    subscripts = "bte,ve->btv" if model.output_axes[0] == "vocab" else "bte,ev->btv"
    exact = np.einsum(subscripts, *(np.asarray(x, np.float64) for x in (hidden, table)))[..., : config.vocab_size]
    found = np.asarray(logits)[..., : config.vocab_size]
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())
