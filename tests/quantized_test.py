"""Weights in int8: the rounding, and that a model computes with exactly the rounded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_models
from flax import traverse_util

from model.config import ModelConfig
from model.generate import GREEDY
from model.quantized import Quantized, quantize
from tests.generate_test import plain_generator
from trainer import sharding
from trainer.config import Config, DataConfig, MeshConfig
from trainer.sampling import fast_params, make_generator
from trainer.state import Program


def is_quantized(x) -> bool:
    return isinstance(x, Quantized)


def rounded(params: dict, config: ModelConfig) -> tuple[dict, dict]:
    """What generation uses, and the same numbers as stacked float64 arrays."""
    fast = fast_params(params, config, int8=True)

    def dense(path: tuple[str, ...], leaf) -> np.ndarray:
        if isinstance(leaf, tuple):
            return np.stack([dense(path, one) for one in leaf])
        if not is_quantized(leaf):
            return np.asarray(leaf, np.float64)
        scale = np.asarray(leaf.scale, np.float64)
        return np.asarray(leaf.values, np.float64) * (scale[:, None] if path[-1] == "embedding" else scale)

    flat = traverse_util.flatten_dict(fast)
    return fast, traverse_util.unflatten_dict({path: dense(path, leaf) for path, leaf in flat.items()})


@pytest.mark.parametrize("outputs", [0, 1])
def test_each_number_is_rounded_to_the_nearest_step_of_its_output(outputs):
    w = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32) * np.logspace(-3, 3, 30)
    w[:, 3] = w[5] = 0.0
    w[7, 8] = -1e4
    found = jax.jit(quantize, static_argnums=1)(jnp.asarray(w), outputs)
    across = 1 - outputs
    largest = np.abs(w).max(across)
    np.testing.assert_allclose(found.scale, np.where(largest > 0, largest / 127, 1), rtol=1e-6)
    assert found.values.dtype == jnp.int8 and np.abs(np.asarray(found.values, int)).max() == 127
    scale = np.expand_dims(np.asarray(found.scale, np.float64), across)
    assert (np.abs(np.asarray(found.values) * scale - w) <= 0.50001 * scale).all()


def test_a_weight_that_is_not_finite_makes_an_output_that_is_not():
    w = jnp.ones((4, 3)).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
    for rounded in (quantize(w, 1), jax.jit(quantize, static_argnums=1)(w, 1)):
        assert np.isfinite(jnp.ones((1, 4)) @ rounded).tolist() == [[False, False, True]]


@pytest.mark.parametrize("config", **tiny_models.every_config)
def test_the_logits_are_those_of_the_rounded_weights_and_near_those_of_the_others(config):
    params = tiny_models.make(config)[1]
    fast, dense = rounded(params, config)
    products = [leaf for leaf in jax.tree.leaves(fast, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(products) == config.num_layers * (6 + config.gated) + 1 + (not config.tie_embeddings)
    tokens = tiny_models.random_tokens(config, rows=3)
    logits = np.asarray(tiny_models.jitted_forward(config)(fast, tokens))[..., : config.vocab_size]
    expected, whole = (reference.forward(p, config, tokens) for p in (dense, params))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert 1e-4 < np.abs(expected - whole).max() < 0.2 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mesh_writes_the_text_of_the_rounded_weights(name):
    model = tiny_models.CONFIGS[name]
    params = tiny_models.make(model)[1]
    fast, dense = rounded(params, model)
    prompt = np.array([3, 1, 4, 1, 5], np.int32)
    (text,) = plain_generator(model)(fast, prompt, rows=1, max_new_tokens=8, sampling=GREEDY)
    logits = reference.forward(dense, model, np.array([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
    assert text.tolist() == logits.argmax(-1).tolist()
    config = Config(
        model=model, data=DataConfig(seq_len=model.max_seq_len), mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        global_batch_size=8,
    )  # fmt: skip
    program = Program(config, sharding.make_mesh(config))
    with jax.set_mesh(program.mesh):
        placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        of_mesh = fast_params(placed, model, int8=True)
        (again,) = make_generator(program)(of_mesh, prompt, rows=1, max_new_tokens=8, sampling=GREEDY)
    assert again.tolist() == text.tolist()
    kernel = of_mesh["layers"]["mlp"]["up"]["kernel"][0].values
    assert kernel.addressable_shards[0].data.size == kernel.size // 4, "split over fsdp and tensor, as the weight is"
