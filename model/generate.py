"""Text generation: prompts of any lengths in one batch, with a KV cache of static shape.

A batch has slots. Reading a prompt into a slot is one pass over its tokens; each token that follows is one pass over
one token of all slots, in a compiled loop that returns to the host after some tokens. Prompts wait until a slot is
free. Random numbers depend on the seed, the number of the prompt and the position in its text, not on the batch.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.attention import Cache, empty_cache
from model.config import ModelConfig
from model.transformer import Transformer

READ = 4  # how many prompts are read at a time if the batch is fixed
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


@dataclasses.dataclass
class _Slot:
    """A text in a slot of the batch.

    Attributes:
      row: the number of its prompt.
      text: int32, the prompt and what was generated.
      start: the index in `text` of the first token in the cache.
      wanted: how long the text may become.
    """

    row: int
    text: np.ndarray
    start: int
    wanted: int

    @property
    def cached(self) -> int:
        """The number of tokens whose keys and values are in the cache: all but the last."""
        return len(self.text) - self.start - 1


class Generator:
    """Continues prompts. It is compiled for each length of prompts and each (slots, length of the cache): powers of 2.

    When the context is full, its second half becomes the start of a new one, so that the model never sees a position
    that it was not trained on, and each token costs at most twice as much.

    Args:
      config: of the model.
      apply: params -> Transformer.
      context: the longest context, from 2 to config.max_seq_len: the length that the model was trained on.
      vocab_size: ids from this number on are never chosen, because the tokenizer does not have them; None: the model's.
      temperature: 0, or a value too small to divide by in float32, means greedy decoding.
      slots: the most texts in a batch.
      fixed: whether a batch always has this many slots, and prompts are read READ at a time. All programs then have the
        same shapes, so that the last bit of a text does not depend on how many others there are.
      chunk: the most tokens of a text between two returns to the host.
      out_sharding: the sharding of the generated tokens; it must be replicated if several processes read them.
      cache_sharding: that of the cache, [layers, slots, s, kv heads, head size].
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
        slots: int = 256,
        fixed: bool = False,
        chunk: int = 64,
        out_sharding: jax.sharding.Sharding | None = None,
        cache_sharding: jax.sharding.Sharding | None = None,
    ):
        if not 2 <= context <= config.max_seq_len:
            raise ValueError(f"a context of {context} tokens; it must be from 2 to max_seq_len = {config.max_seq_len}")
        self.config = config
        self.context = context
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.temperature = min(temperature, 1 / SMALLEST_TEMPERATURE)
        self.top_k = top_k
        self.top_p = top_p
        self.slots = slots
        self.fixed = fixed
        self.chunk = chunk
        self._apply = apply
        out_shardings = (out_sharding, cache_sharding)
        self._read = jax.jit(self._read_prompts, donate_argnames="cache", out_shardings=out_shardings)
        self._write = jax.jit(self._write_tokens, donate_argnames="cache", out_shardings=out_shardings)
        self.cache_sharding = cache_sharding
        self.empty_cache = jax.jit(
            functools.partial(empty_cache, config), static_argnums=(0, 1), out_shardings=cache_sharding
        )

    def __call__(self, params, prompt: np.ndarray, *, rows: int, max_new_tokens: int, seed: int) -> np.ndarray:
        """`rows` continuations of one prompt: int32 [rows, max_new_tokens], without the prompt. See `continue_all`."""
        texts = self.continue_all(params, [prompt] * rows, max_new_tokens=max_new_tokens, seed=seed)
        return np.stack(texts) if texts else np.zeros((0, max_new_tokens), np.int32)

    def continue_all(
        self,
        params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        seed: int,
        first: int = 0,
        longest: int = 0,
        stop_ids: Collection[int] = (),
        on_tokens: Callable[[int, np.ndarray, bool], None] = lambda row, tokens, ended: None,
    ) -> list[np.ndarray]:
        """The continuation of each prompt, without the prompt.

        Args:
          prompts: integers [n], n >= 1, ids of the vocabulary.
          max_new_tokens: how many tokens are generated, unless one of `stop_ids` ends the text, which it then includes.
          seed: continuation i depends only on its prompt and on (seed, first + i).
          first: the number of the first prompt.
          longest: the longest prompt of all calls, if texts must not depend on how prompts are split into calls.
          on_tokens: is called with i, the next tokens of text i, and whether they are its last ones.

        Returns:
          int32 arrays.
        """
        for prompt in prompts:
            self._check(prompt)
        if not prompts or not max_new_tokens:
            return [np.zeros(0, np.int32) for _ in prompts]
        wanted = max(longest, max(map(len, prompts))) + max_new_tokens
        batch = _Batch(self, params, wanted=wanted, texts=len(prompts), seed=seed, stop=stop_ids)
        waiting = collections.deque(
            _Slot(first + i, np.asarray(prompt, np.int32), 0, len(prompt) + max_new_tokens)
            for i, prompt in enumerate(prompts)
        )
        texts: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        while waiting or batch.slots:
            for slot, new, ended in [*batch.read(waiting), *batch.write()]:
                i = slot.row - first
                texts[i] = slot.text[len(prompts[i]) :]
                if len(new):
                    on_tokens(i, new, ended)
        return texts

    def _check(self, prompt: np.ndarray) -> None:
        if not len(prompt):
            raise ValueError("a prompt of 0 tokens; at least 1 is needed")
        lowest, highest = np.min(prompt), np.max(prompt)
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"prompt holds token {wrong}; the vocabulary has ids 0 to {self.config.vocab_size - 1}")

    def lower(self, params, *, rows: int, wanted: int) -> jax.stages.Lowered:
        """Lowers the loop for `rows` texts of `wanted` tokens, including the prompt; params may be abstract."""
        shapes = jax.eval_shape(lambda: empty_cache(self.config, rows, self.cache_length(wanted)))
        cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.cache_sharding), shapes)
        numbers = jax.ShapeDtypeStruct((rows,), np.int32)
        keys = jax.eval_shape(lambda: _keys(0, np.zeros(rows, np.int32)))
        return self._write.lower(
            params, cache=cache, token=numbers, cached=numbers, start=numbers, wanted=numbers, keys=keys,
            stop=jax.ShapeDtypeStruct((0,), np.int32), steps=1,
        )  # fmt: skip

    def cache_length(self, wanted: int) -> int:
        return min(self.context, power_of_2(wanted))

    def _choose(self, logits: Array, keys: Array, position: Array) -> Array:
        """The next token of each row: logits [b, vocab], and position [b], the index in the text of the new token."""
        if self.vocab_size < self.config.vocab_size:
            logits = logits.at[:, self.vocab_size :].set(-jnp.inf)
        if self.temperature < SMALLEST_TEMPERATURE:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        logits = filter_logits(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        of_token = jax.vmap(jax.random.fold_in)(keys, position)
        return jax.vmap(jax.random.categorical)(of_token, logits).astype(jnp.int32)

    def _read_prompts(
        self, params, *, cache: Cache, tokens: Array, lengths: Array, slots: Array, start: Array, keys: Array
    ) -> tuple[Array, Cache]:
        """Reads tokens [n, p], of which the first `lengths` [n] of a row count, into slots [n]; slots beyond the batch
        are left out.

        Returns:
          int32 [n], the tokens that follow; the cache.
        """
        n, p = tokens.shape
        logits, read = self._apply(params)(tokens, cache=empty_cache(self.config, n, p), logits_at=lengths - 1)
        # No token sees one after it, so the padding after a prompt changes nothing, and it is overwritten in the cache
        # before its index becomes visible.
        cache = jax.tree.map(lambda all, new: all.at[:, slots, :p].set(new, mode="drop"), cache, read)
        return self._choose(logits[:, 0], keys, start + lengths), cache

    def _write_tokens(
        self, params, *, cache: Cache, token: Array, cached: Array, start: Array, wanted: Array, keys: Array,
        stop: Array, steps: Array,
    ) -> tuple[tuple[Array, Array], Cache]:  # fmt: skip
        """Up to `steps` tokens of each text [b] of which `cached` tokens and then `token` are known.

        A text ends with a token of `stop`, when it has `wanted` tokens, or when the context is full; a slot that is not
        used has wanted = 0.

        Returns:
          (int32 [b, chunk], the tokens; int32 [b], how many of them count); the cache.
        """
        model, length = self._apply(params), cache["k"].shape[2]

        def goes_on(token: Array, cached: Array) -> Array:
            ended = (token[:, None] == stop[None]).any(axis=1) if len(stop) else jnp.zeros(token.shape, bool)
            return ~ended & (cached + 1 < jnp.minimum(wanted - start, length))

        def step(carry):
            i, token, at, out, cache = carry
            active = goes_on(token, at)
            logits, cache = model(token[:, None], index=at[:, None], cache=cache)
            token = jnp.where(active, self._choose(logits[:, 0], keys, start + at + 1), token)
            return i + 1, token, at + active, out.at[:, i].set(token), cache

        def unfinished(carry):
            i, token, at, *_ = carry
            return (i < steps) & goes_on(token, at).any()

        out = jnp.zeros((len(token), self.chunk), jnp.int32)
        _, _, at, out, cache = jax.lax.while_loop(unfinished, step, (0, token, cached, out, cache))
        return (out, at - cached), cache


_News = tuple[_Slot, np.ndarray, bool]  # a text, its new tokens, and whether they are the last


class _Batch:
    """The texts that are being generated, and their cache."""

    def __init__(self, generator: Generator, params, *, wanted: int, texts: int, seed: int, stop: Collection[int]):
        self.generator = generator
        self.params = params
        self.seed = seed
        self.stop = np.array(sorted(stop), np.int32)
        self.length = generator.cache_length(wanted)
        self.size = generator.slots if generator.fixed else min(power_of_2(texts), generator.slots)
        self.slots: dict[int, _Slot] = {}
        self.cache = generator.empty_cache(self.size, self.length)

    def _full(self, slot: _Slot) -> bool:
        return slot.cached + 1 >= self.length

    def _ended(self, slot: _Slot) -> bool:
        return len(slot.text) >= slot.wanted or slot.text[-1] in self.stop

    def read(self, waiting: collections.deque[_Slot]) -> list[_News]:
        """Gives free slots to waiting texts, reads them, and those whose context is full; returns their next tokens."""
        fresh = [i for i, slot in self.slots.items() if self._full(slot)]
        for i in range(self.size):
            if i not in self.slots and waiting:
                self.slots[i] = waiting.popleft()
                fresh.append(i)
        groups = collections.defaultdict(list)
        for i in fresh:
            slot = self.slots[i]
            known = len(slot.text) if len(slot.text) < self.length else self.length // 2
            slot.start = len(slot.text) - known
            groups[min(self.length, power_of_2(known))].append(i)
        at_once = READ if self.generator.fixed else self.size
        return [
            one
            for size, group in sorted(groups.items())
            for i in range(0, len(group), at_once)
            for one in self._read_group(size, group[i : i + at_once])
        ]

    def _read_group(self, size: int, group: list[int]) -> list[_News]:
        n = READ if self.generator.fixed else power_of_2(len(group))
        tokens, lengths = np.zeros((n, size), np.int32), np.ones(n, np.int32)
        start, rows = np.zeros(n, np.int32), np.zeros(n, np.int32)
        slots = np.full(n, self.size, np.int32)
        for j, i in enumerate(group):
            slot = self.slots[i]
            known = slot.text[slot.start :]
            tokens[j, : len(known)], lengths[j], start[j], rows[j], slots[j] = (
                known,
                len(known),
                slot.start,
                slot.row,
                i,
            )
        first, self.cache = self.generator._read(
            self.params, cache=self.cache, tokens=tokens, lengths=lengths, slots=slots, start=start,
            keys=_keys(self.seed, rows),
        )  # fmt: skip
        return [self._add(i, token[None]) for i, token in zip(group, np.asarray(first), strict=False)]

    def write(self) -> list[_News]:
        """Generates some tokens of each text in the batch, and returns them."""
        if all(map(self._full, self.slots.values())):
            return []
        empty = _Slot(0, np.zeros(1, np.int32), 0, 0)
        slots = [self.slots.get(i, empty) for i in range(self.size)]
        numbers = {
            "token": [slot.text[-1] for slot in slots], "cached": [slot.cached for slot in slots],
            "start": [slot.start for slot in slots], "wanted": [slot.wanted for slot in slots],
        }  # fmt: skip
        (tokens, counts), self.cache = self.generator._write(
            self.params, cache=self.cache, **{name: np.array(value, np.int32) for name, value in numbers.items()},
            keys=_keys(self.seed, np.array([slot.row for slot in slots], np.int32)), stop=self.stop,
            steps=self.generator.chunk,
        )  # fmt: skip
        tokens, counts = np.asarray(tokens), np.asarray(counts)
        return [self._add(i, tokens[i, : counts[i]]) for i in list(self.slots)]

    def _add(self, i: int, new: np.ndarray) -> _News:
        slot = self.slots[i]
        slot.text = np.concatenate([slot.text, new])
        if ended := self._ended(slot):
            del self.slots[i]
        return slot, new, ended


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _keys(seed: int, rows: np.ndarray) -> Array:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(rows))
