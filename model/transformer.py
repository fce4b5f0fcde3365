"""The decoder-only transformer: embedding, a stack of pre-norm blocks, norm, head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.attention import Attention, Cache
from model.config import ModelConfig
from model.layers import MLP, Constrain, Linear, Norm, dropout, param

INIT_STD = 0.02  # GPT-2's; projections back into the residual stream use INIT_STD / sqrt(2 num_layers)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), x [b * t, embed]. With `stack`, that many as one module."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None):
        stds = {"std": INIT_STD, "out_std": INIT_STD * (2 * config.num_layers) ** -0.5}
        self.attention_norm = Norm(config, stack)
        self.attention = Attention(config, rngs, **stds, stack=stack)
        self.mlp_norm = Norm(config, stack)
        self.mlp = MLP(config, rngs, **stds, stack=stack)

    def __call__(
        self, x: Array, places: Array, starts: Array | None, cache: Cache | None,
        rate, key: Array | None, constrain: Constrain,
    ) -> tuple[Array, Cache | None]:  # fmt: skip
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        y, cache = self.attention(self.attention_norm(x), places, starts, cache, rate, keys[0], constrain)
        x = constrain(x + dropout(y, rate, keys[1]), ("batch", None))
        y = self.mlp(self.mlp_norm(x))
        return constrain(x + dropout(y, rate, keys[2]), ("batch", None)), cache


class Transformer(nnx.Module):
    """Token ids to logits.

    Args:
      config: with vocab_size and max_seq_len set.
      rngs: a `params` stream for the initial values.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        if not config.vocab_size or not config.max_seq_len:
            raise ValueError("model.vocab_size and model.max_seq_len must be set before a Transformer is built")
        self.config = config
        vocab, embed = config.padded_vocab_size, config.embed_dim
        self.embedding = param(rngs, INIT_STD, (vocab, embed), ("vocab", "embed"), None)
        self.position = (
            param(rngs, INIT_STD, (config.max_seq_len, embed), ("position", "embed"), None)
            if config.position == "learned"
            else None
        )
        self.layers = Block(config, rngs, stack=config.num_layers)
        self.norm = Norm(config, None)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(rngs, embed, vocab, ("embed", "vocab"), std=INIT_STD, bias=False, stack=None)
        )

    def __call__(
        self,
        tokens: Array,
        *,
        start: Array | int = 0,
        document_starts: Array | None = None,
        cache: Cache | None = None,
        only: Array | None = None,
        dropout_rate: Array | float = 0.0,
        dropout_key: Array | None = None,
        constrain: Constrain = lambda x, axes: x,
    ) -> tuple[Array, Cache | None]:
        """Logits of the next token at each position.

        Args:
          tokens: integer [b, t], ids below vocab_size.
          start: position of the first token; above 0 only with a cache that holds the tokens before it.
          document_starts: int32 [b, t], where the document of each token begins in its row: no token sees another
            document, and positions count from its own beginning. None: a row is one document. Not with a cache.
          cache: see attention.empty_cache; gains the keys and values of `tokens`.
          only: index into t; logits of that one place are computed, and t is 1 in the result.
          dropout_rate, dropout_key: no key, no dropout.
          constrain: places activations on the mesh.

        Returns:
          logits float32 [b, t, padded_vocab_size], -inf beyond vocab_size; the new cache.
        """
        config = self.config
        if tokens.shape[1] > config.max_seq_len:  # learned positions would be clamped without a word
            raise ValueError(f"{tokens.shape[1]} tokens are more than model.max_seq_len = {config.max_seq_len}")
        if document_starts is not None and cache is not None:
            raise ValueError("a cache holds one document a row; document_starts cannot be given with it")
        places = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self.embedding[...].astype(config.dtype)[tokens]
        if self.position is not None:
            positions = places if document_starts is None else places - document_starts
            x = x + self.position[...].astype(config.dtype)[positions]
        keys = None
        if dropout_key is not None:
            embedding_key, layers_key = jax.random.split(dropout_key)
            x = dropout(x, dropout_rate, embedding_key)
            keys = jax.random.split(layers_key, config.num_layers)
        # Two axes until the logits: the gradient of a weight then contracts one, which is one plain matrix product;
        # over batch and sequence XLA's CPU backend makes a transposed copy of the activations (docs/performance.md).
        x = constrain(x.reshape(-1, config.embed_dim), ("batch", None))

        graph, stacked = nnx.split(self.layers)

        def layer(x, of_layer):
            params, layer_cache, key = of_layer
            return nnx.merge(graph, params)(x, places, document_starts, layer_cache, dropout_rate, key, constrain)

        # Stacked parameters whether the loop is compiled once or unrolled: one layout for every checkpoint.
        unroll = 1 if config.scan_layers else config.num_layers
        x, cache = jax.lax.scan(_remat(config, layer), x, (stacked, cache, keys), unroll=unroll)

        if only is not None:
            x = jax.lax.dynamic_slice_in_dim(x.reshape(*tokens.shape, -1), only, 1, axis=1)
            x = x.reshape(-1, config.embed_dim)
        logits = self._logits(self.norm(x)).reshape(len(tokens), -1, config.padded_vocab_size)
        logits = constrain(logits.astype(jnp.float32), ("batch", "seq", "vocab"))
        return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, -jnp.inf), cache

    def _logits(self, x: Array) -> Array:
        if self.head is not None:
            return self.head(x)
        return x @ self.embedding[...].astype(x.dtype).T


def _remat(config: ModelConfig, layer):
    if config.remat == "none":
        return layer
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    # A compiled loop already keeps the recomputation from being merged with the forward pass; an unrolled one does not.
    return functools.partial(jax.checkpoint, policy=saveable, prevent_cse=not config.scan_layers)(layer)
