"""The decoder-only transformer: embedding, a stack of pre-norm blocks, norm, head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from model.attention import Attention, Cache
from model.config import ModelConfig
from model.dropout import dropout
from model.layers import MLP, Linear, Norm, param
from model.partitioner import Placement

ONE_DEVICE = Placement()
LAYER_INPUT = "layer_input"  # a name for jax.checkpoint's policies
INIT_STD = 0.02  # GPT-2's; projections back into the residual stream use INIT_STD / sqrt(2 num_layers)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With `stack`, that many as one module."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None):
        stds = {"std": INIT_STD, "out_std": INIT_STD * (2 * config.num_layers) ** -0.5}
        self.attention_norm = Norm(config, stack)
        self.attention = Attention(config, rngs, **stds, stack=stack)
        self.mlp_norm = Norm(config, stack)
        self.mlp = MLP(config, rngs, **stds, stack=stack)

    def __call__(
        self, x: Array, places: Array, starts: Array | None, cache: Cache | None,
        rate, key: Array | None, placement: Placement,
    ) -> tuple[Array, Cache | None]:  # fmt: skip
        """Arguments as of Attention."""
        x = checkpoint_name(x, LAYER_INPUT)
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        y, cache = self.attention(self.attention_norm(x, placement), places, starts, cache, rate, keys[0], placement)
        x = placement.residual(x + dropout(y, rate, keys[1], placement.bernoulli))
        y = self.mlp(self.mlp_norm(x, placement), placement)
        return placement.residual(x + dropout(y, rate, keys[2], placement.bernoulli)), cache


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
        self, tokens: Array, *, only: Array | None = None, placement: Placement = ONE_DEVICE, **arguments
    ) -> tuple[Array, Cache | None]:
        """Logits of the next token at each position.

        Args:
          tokens, arguments: as of `hidden`.
          only: index into t; logits of that one place are computed, and t is 1 in the result.

        Returns:
          logits float32 [b, t, padded_vocab_size], -inf beyond vocab_size; the new cache.
        """
        config = self.config
        x, cache = self.hidden(tokens, placement=placement, **arguments)
        if only is not None:
            x = jax.lax.dynamic_slice_in_dim(x.reshape(*tokens.shape, -1), only, 1, axis=1)
            x = x.reshape(-1, config.embed_dim)
        w = placement.weight(self.output_table(), self.output_axes, x.dtype)
        w = w.T if self.output_axes[0] == "vocab" else w
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)  # as the loss sees them
        logits = logits.reshape(len(tokens), -1, config.padded_vocab_size)
        logits = placement.constrain(logits, ("batch", "seq", "vocab"))
        return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, -jnp.inf), cache

    @property
    def output_axes(self) -> tuple[str, str]:
        """Logical axes of output_table."""
        return ("vocab", "embed") if self.head is None else ("embed", "vocab")

    def output_table(self) -> Array:
        """The parameter that makes logits of hidden states, float32."""
        return self.embedding[...] if self.head is None else self.head.kernel[...]

    def hidden(
        self,
        tokens: Array,
        *,
        start: Array | int = 0,
        places: Array | None = None,
        document_starts: Array | None = None,
        cache: Cache | None = None,
        dropout_rate: Array | float = 0.0,
        dropout_key: Array | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> tuple[Array, Cache | None]:
        """What the head makes logits of: the normalised residual stream after the last layer.

        Args:
          tokens: integer [b, t], ids below vocab_size.
          start: position of the first token; above 0 only with a cache that holds the tokens before it.
          places: int32 [t], the position of each token in its row, where a placement that splits the sequence has put
            them in another order than that of `start`, `start` + 1, ….
          document_starts: int32 [b, t], where the document of each token begins in its row: no token sees another
            document, and positions count from its own beginning. None: a row is one document. Not with a cache.
          cache: see attention.empty_cache; gains the keys and values of `tokens`.
          dropout_rate, dropout_key: no key, no dropout.

        Returns:
          [b * t, embed], or [b, t, embed] where the placement splits the sequence; the new cache.
        """
        config = self.config
        if tokens.shape[1] > config.max_seq_len:  # learned positions would be clamped without a word
            raise ValueError(f"{tokens.shape[1]} tokens are more than model.max_seq_len = {config.max_seq_len}")
        if document_starts is not None and cache is not None:
            raise ValueError("a cache holds one document a row; document_starts cannot be given with it")
        if places is None:
            places = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        dtype = jnp.dtype(config.dtype)
        x = placement.lookup(self.embedding[...], tokens, ("vocab", "embed"), dtype)
        if self.position is not None:
            positions = jnp.broadcast_to(places if document_starts is None else places - document_starts, tokens.shape)
            x = x + placement.lookup(self.position[...], positions, ("position", "embed"), dtype)
        keys = None
        if dropout_key is not None:
            embedding_key, layers_key = jax.random.split(dropout_key)
            x = dropout(x, dropout_rate, embedding_key, placement.bernoulli)
            keys = jax.random.split(layers_key, config.num_layers)
        # Two axes until the end: the gradient of a weight then contracts one, which is one plain matrix product; over
        # batch and sequence XLA's CPU backend makes a transposed copy of the activations (docs/performance.md). A
        # sequence that is split over devices cannot be one axis with the batch: the parts of a device are not adjacent.
        if not placement.splits_sequence:
            x = x.reshape(-1, config.embed_dim)
        x = placement.residual(x)

        graph, stacked = nnx.split(self.layers)

        def layer(x, of_layer):
            params, layer_cache, key = of_layer
            return nnx.merge(graph, params)(x, places, document_starts, layer_cache, dropout_rate, key, placement)

        # Stacked parameters whether the loop is compiled once or unrolled: one layout for every checkpoint.
        unroll = 1 if config.scan_layers else config.num_layers
        x, cache = jax.lax.scan(_remat(config, layer, placement), x, (stacked, cache, keys), unroll=unroll)
        return self.norm(x, placement), cache


def _remat(config: ModelConfig, layer, placement: Placement):
    """`layer` with config.remat's choice of what is kept for the backward pass."""
    policies = jax.checkpoint_policies
    if config.remat in ("none", "attention"):
        if not placement.regathers:
            return layer
        policy = _all_but_placed
    elif config.remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif config.remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        policy = None
    # A compiled loop already keeps the recomputation from being merged with the forward pass; an unrolled one does not.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=not config.scan_layers)(layer)


def _all_but_placed(primitive, *_, **__) -> bool:
    """Keeps everything but what `constrain` made: whole weights, of which a device has only its part and which are
    gathered once more; and activations that were there before they were placed."""
    return primitive.name != "sharding_constraint"
