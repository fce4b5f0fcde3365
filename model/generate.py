"""Text generation with a KV cache of static shape: greedy, temperature, top-k, top-p."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.attention import empty_cache
from model.config import ModelConfig
from model.transformer import Transformer

SMALLEST_TEMPERATURE = 1e-30  # dividing logits by this number, or by its inverse, gives finite float32


def filter_logits(logits: Array, *, temperature: float, top_k: int, top_p: float) -> Array:
    """Logits whose softmax is the distribution to sample from; excluded tokens get -inf.

    Args:
      logits: float32 [..., vocab].
      temperature: above 0; divides the logits.
      top_k: keep the k most likely tokens, and ties with the k-th; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probabilities reach p (Holtzman et al., 2020), after
        temperature and top-k; 1 keeps all. The most likely token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of the more likely tokens
        keep = (before < top_p).at[..., 0].set(True)  # even at top_p = 0
        last = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits


class Generator:
    """Continues prompts; one compilation for each (rows, buffer length).

    When the context is full, its second half becomes the start of a new one, so that the model never sees a position
    that it was not trained on, and each token costs at most twice as much.

    Args:
      config: of the model.
      apply: params -> Transformer.
      context: the longest context, from 2 to config.max_seq_len: the length that the model was trained on.
      vocab_size: ids from this number on are never chosen, because the tokenizer does not have them; None: the model's.
      temperature: 0, or a value too small to divide by in float32, means greedy decoding.
      out_sharding: the sharding of the generated tokens; it must be replicated if several processes read them.
    """

    def __init__(
        self,
        config: ModelConfig,
        apply: Callable[..., Transformer],
        *,
        context: int,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        out_sharding: jax.sharding.Sharding | None = None,
    ):
        if not 2 <= context <= config.max_seq_len:
            raise ValueError(f"a context of {context} tokens; it must be from 2 to max_seq_len = {config.max_seq_len}")
        self.config = config
        self.context = context
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.temperature = min(temperature, 1 / SMALLEST_TEMPERATURE)
        self.top_k = top_k
        self.top_p = top_p
        self._apply = apply
        self._fill = jax.jit(self._fill_buffer, out_shardings=out_sharding)

    def __call__(self, params, prompt: np.ndarray, *, rows: int, max_new_tokens: int, seed: int) -> np.ndarray:
        """`rows` continuations of one prompt.

        Row i depends only on (seed, i), not on how many rows are asked for.

        Args:
          prompt: integer [n], n >= 1.

        Returns:
          int32 [rows, max_new_tokens], without the prompt.
        """
        if not len(prompt):
            raise ValueError("a prompt of 0 tokens; at least 1 is needed")
        lowest, highest = np.min(prompt), np.max(prompt)
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"prompt holds token {wrong}; the vocabulary has ids 0 to {self.config.vocab_size - 1}")
        wanted = len(prompt) + max_new_tokens
        length = self._buffer_length(wanted)
        text = np.tile(np.asarray(prompt, np.int32), (rows, 1))
        keys = _keys(seed, rows)
        while text.shape[1] < wanted:
            known = text.shape[1] if text.shape[1] < length else length // 2
            upto = min(length, known + wanted - text.shape[1])
            buffer = np.zeros((rows, length), np.int32)
            buffer[:, :known] = text[:, -known:]
            filled = self._fill(params, buffer, known=known, upto=upto, keys=keys, offset=text.shape[1] - known)
            text = np.concatenate([text, np.asarray(filled)[:, known:upto]], axis=1)
        return text[:, len(prompt) :]

    def lower(self, params, *, rows: int, wanted: int) -> jax.stages.Lowered:
        """Lowers the program for `rows` texts of `wanted` tokens, including the prompt; params may be abstract."""
        buffer = jax.ShapeDtypeStruct((rows, self._buffer_length(wanted)), np.int32)
        keys = jax.eval_shape(lambda: _keys(0, rows))
        return self._fill.lower(params, buffer, known=1, upto=2, keys=keys, offset=0)

    def _buffer_length(self, wanted: int) -> int:
        return min(self.context, 1 << (wanted - 1).bit_length())

    def _fill_buffer(self, params, buffer: Array, *, known: Array, upto: Array, keys: Array, offset: Array) -> Array:
        """Fills buffer[:, known:upto]; `offset`, the position of buffer[:, 0] in the full text, selects random keys."""
        model = self._apply(params)
        rows, length = buffer.shape

        def choose(logits: Array, position: Array) -> Array:
            if self.vocab_size < self.config.vocab_size:
                logits = logits.at[:, self.vocab_size :].set(-jnp.inf)
            if self.temperature < SMALLEST_TEMPERATURE:
                return jnp.argmax(logits, -1).astype(jnp.int32)
            logits = filter_logits(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
            of_token = jax.vmap(lambda key: jax.random.fold_in(key, offset + position))(keys)
            return jax.vmap(jax.random.categorical)(of_token, logits).astype(jnp.int32)

        # Prefill: the full buffer at once. Entries past `known` are padding, but no query sees a key after itself,
        # and each padding entry is overwritten before its position becomes visible.
        logits, cache = model(buffer, cache=empty_cache(self.config, rows, length), logits_at=known - 1)
        buffer = jax.lax.dynamic_update_slice(buffer, choose(logits[:, 0], known)[:, None], (0, known))

        def step(carry):
            position, buffer, cache = carry
            token = jax.lax.dynamic_slice(buffer, (0, position), (rows, 1))
            logits, cache = model(token, index=position[None], cache=cache)
            token = choose(logits[:, 0], position + 1)
            return position + 1, jax.lax.dynamic_update_slice(buffer, token[:, None], (0, position + 1)), cache

        return jax.lax.while_loop(lambda carry: carry[0] + 1 < upto, step, (known, buffer, cache))[1]


def _keys(seed: int, rows: int) -> Array:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))
