"""Small models for the tests, with parameters far from their initial values, so that every one of them matters."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from model.config import ModelConfig, RopeScaling
from model.partitioner import Partitioner
from model.transformer import Transformer

VOCAB, CONTEXT = 50, 16  # the vocabulary is padded to 64

_SHAPE: dict[str, Any] = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "vocab_size": VOCAB, "max_seq_len": CONTEXT}

# Together these cover every choice of ModelConfig that changes the forward pass.
CONFIGS = {
    "llama": ModelConfig(**_SHAPE, num_kv_heads=2, mlp="swiglu", tie_embeddings=False),
    "gpt2": ModelConfig(**_SHAPE, mlp="gelu", position="learned", norm="layernorm", bias=True, scan_layers=False),
    "one_kv_head": ModelConfig(
        **_SHAPE | {"num_layers": 3, "num_heads": 3}, num_kv_heads=1, head_dim=10, mlp="geglu", mlp_dim=20,
        norm="layernorm", norm_eps=0.1, rope_theta=100.0,
    ),
    "learned_grouped": ModelConfig(
        **_SHAPE | {"num_heads": 6, "max_seq_len": 12}, num_kv_heads=2, head_dim=5, mlp="glu", position="learned",
        bias=True, tie_embeddings=False,
    ),
    "one_layer": ModelConfig(**_SHAPE | {"num_layers": 1, "vocab_size": 64}, mlp="relu2", bias=True, norm_eps=0.1),
    "gemma": ModelConfig(
        **_SHAPE | {"num_layers": 5}, num_kv_heads=2, head_dim=10, mlp="geglu", norm_at="both", norm_plus_one=True,
        qk_norm="head", window=5, layer_pattern=("local", "local", "global"), local_rope_theta=100.0,
        rope_scaling=RopeScaling("linear", 4.0), attention_scale=0.5, attention_softcap=5.0, logits_softcap=4.0,
        embedding_scale=2.5,
    ),
    "olmo": ModelConfig(
        **_SHAPE, num_kv_heads=2, norm_at="after", qk_norm="projection", mlp="silu", tie_embeddings=False,
        rope_scaling=RopeScaling("yarn", 4.0, 8, beta_fast=2.0, beta_slow=0.2, truncate=False),
    ),
    "neox": ModelConfig(
        **_SHAPE, parallel=True, norm="layernorm", bias=True, mlp="gelu_exact", rope_fraction=0.5, head_dim=12,
        window=3, layer_pattern=("global", "local"), mlp_bias=False,
    ),
    "qwen": ModelConfig(
        **_SHAPE | {"num_layers": 3}, num_kv_heads=1, qkv_bias=True, mlp="geglu_exact", window=4,
        layer_pattern=("global", "local", "local"), rope_theta=1000.0,
        rope_scaling=RopeScaling("llama3", 4.0, 8, low_freq_factor=0.5, high_freq_factor=2.0), scan_layers=False,
    ),
}  # fmt: skip

every_config = {"argvalues": CONFIGS.values(), "ids": CONFIGS.keys()}  # arguments of pytest.mark.parametrize


def abstract(
    config: ModelConfig, partitioner: Partitioner | None = None
) -> tuple[nnx.GraphDef, dict[tuple[str, ...], nnx.Param]]:
    """The graph definition, and the parameters by path, with shapes in place of arrays."""
    graph, variables = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0), partitioner)), nnx.Param
    )
    return graph, dict(nnx.to_flat_state(variables))


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Like the parameters of Transformer(config), but all noise: sharp attention, scales away from 1, biases from 0."""
    leaves = {}
    for path, variable in abstract(config)[1].items():
        shape = variable.get_value().shape
        noise = np.random.default_rng([seed, zlib.crc32("/".join(path).encode())]).standard_normal(shape)
        if path[-1] == "scale":
            leaf = (not config.norm_plus_one) + 0.3 * noise
        elif path[-1] == "kernel":
            # Scores have a deviation of 1.5^2: attention is far from uniform. Sharper attention would amplify
            # float32's rounding.
            leaf = noise * (1.5 if path[-2] in ("query", "key") else 1.2) / np.sqrt(shape[-2])
        else:  # biases, embedding, learned positions
            leaf = 0.3 * noise
        leaves[path] = leaf.astype(np.float32)
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(leaves))


def applier(config: ModelConfig, partitioner: Partitioner | None = None) -> Callable[[dict], Transformer]:
    graph = abstract(config, partitioner)[0]
    return lambda params: nnx.merge(graph, params)


@functools.cache
def make(config: ModelConfig) -> tuple[Callable[[dict], Transformer], dict]:
    """(params -> Transformer, random params)."""
    return applier(config), random_params(config)


@functools.cache
def jitted_forward(config: ModelConfig) -> Callable[..., jax.Array]:
    """(params, tokens, **arrays of Transformer.__call__) -> logits."""
    apply = applier(config)
    return jax.jit(lambda params, tokens, **arrays: apply(params)(tokens, **arrays)[0])


def random_tokens(config: ModelConfig, rows: int, length: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (rows, length or config.max_seq_len)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


def random_documents(rows: int, length: int) -> np.ndarray:
    """Segment ids: documents of different lengths in each row, some of one token."""
    ids = np.zeros((rows, length), np.int32)
    for i, row in enumerate(ids):
        for border in np.random.default_rng(i).permutation(length)[: length // 6]:
            row[border:] += 1
    return ids
