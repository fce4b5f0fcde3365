"""Text generation: prompts of any lengths in one batch, with a KV cache of static shape.

A batch has slots. Reading a prompt into a slot is one pass over its tokens; each token that follows is one pass over
one token of all slots, in a compiled loop that returns to the host after some tokens. Prompts wait until a slot is
free. Random numbers depend on the seed, the number of the prompt and the position in its text, not on the batch.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.attention import empty_cache
from model.config import ModelConfig
from model.sampling import Sampling, choose, stacked
from model.transformer import Transformer

GREEDY, PLAIN = Sampling(temperature=0.0), Sampling()
State = dict[str, Any]  # {"cache": Cache, "seen": bool [slots, vocab], the tokens that each text has}


@dataclasses.dataclass(eq=False)
class Text:
    """A text that is generated.

    Attributes:
      prompt: integers [n], n >= 1.
      max_new_tokens: at least 1; how many tokens follow, unless a stop token ends the text.
      seed, row: the text depends only on its prompt and on these two numbers.
      tokens: int32, the prompt and what was generated so far.
      start: the index in `tokens` of the first token in the cache.
    """

    prompt: np.ndarray
    max_new_tokens: int
    seed: int = 0
    row: int = 0
    sampling: Sampling = PLAIN
    tokens: np.ndarray = dataclasses.field(init=False)
    start: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        self.tokens = np.asarray(self.prompt, np.int32)

    @property
    def new(self) -> np.ndarray:
        """What was generated."""
        return self.tokens[len(self.prompt) :]

    @property
    def wanted(self) -> int:
        """How long the text may become."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def cached(self) -> int:
        """The number of tokens whose keys and values are in the cache: all but the last."""
        return len(self.tokens) - self.start - 1


class News(NamedTuple):
    """What was added to a text.

    Attributes:
      tokens: int32 [n].
      logprobs: float32 [n], the logarithms of their probabilities, before temperature and filters.
      ended: whether these are the last tokens.
    """

    text: Text
    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool


@dataclasses.dataclass
class Speed:
    """What a program did, except in the first call for each shape, which compiles it.

    Attributes:
      tokens: of all texts.
      bytes: what the passes had to read on each device: weights and cache.
    """

    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    _compiled: set = dataclasses.field(default_factory=set)

    def add(self, shape: tuple[int, ...], *, tokens: int, bytes: int, seconds: float) -> None:
        if shape in self._compiled:
            self.tokens += tokens
            self.bytes += bytes
            self.seconds += seconds
        self._compiled.add(shape)


class Generator:
    """Continues prompts. It is compiled for each length of prompts and each (slots, length of the cache): powers of 2.

    When the context is full, its second half becomes the start of a new one, so that the model never sees a position
    that it was not trained on, and each token costs at most twice as much.

    Args:
      config: of the model.
      apply: params -> Transformer. Params may be transformer.separate.
      context: the longest context, from 2 to config.max_seq_len: the length that the model was trained on.
      vocab_size: ids from this number on are never chosen, because the tokenizer does not have them; None: the model's.
      slots: the most texts in a batch.
      read: how many prompts are read at a time. A batch then always has all its slots, so that all programs have the
        same shapes, and the last bit of a text does not depend on how many others there are. None: as many as there
        are, and a batch is only as large as it must be.
      chunk: the most tokens of a text between two returns to the host.
      out_sharding: the sharding of the generated tokens; it must be replicated if several processes read them.
      row_sharding: that of what has a row for each slot, and of prompts that are read, if it divides them.
      cache_sharding: that of the cache of a layer, [slots, s, kv heads, head size].
      shards: into how many parts row_sharding and cache_sharding split the slots, whose number is a multiple of it.

    Attributes:
      reading, writing: the speed of reading prompts, and of generating tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        apply: Callable[..., Transformer],
        *,
        context: int,
        vocab_size: int | None = None,
        slots: int = 256,
        read: int | None = None,
        chunk: int = 64,
        out_sharding: jax.sharding.Sharding | None = None,
        row_sharding: jax.sharding.Sharding | None = None,
        cache_sharding: jax.sharding.Sharding | None = None,
        shards: int = 1,
    ):
        if not 2 <= context <= config.max_seq_len:
            raise ValueError(f"a context of {context} tokens; it must be from 2 to max_seq_len = {config.max_seq_len}")
        self.config = config
        self.context = context
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self._shards = shards
        self.slots = self._multiple(slots)
        self.read_at_once = read
        self.chunk = chunk
        self.reading, self.writing = Speed(), Speed()
        self._apply = apply
        self._row_sharding = row_sharding
        state = {"cache": cache_sharding, "seen": row_sharding}
        self.read = jax.jit(self._read, donate_argnames="state", out_shardings=(out_sharding, state))
        self.write = jax.jit(self._write, donate_argnames="state", out_shardings=(out_sharding, state))
        self.rows_of = jax.jit(_rows_of, out_shardings=state)
        self.empty = jax.jit(self._empty, static_argnums=(0, 1), out_shardings=state)
        self._cache_sharding = cache_sharding

    def __call__(self, params, prompt: np.ndarray, *, rows: int, max_new_tokens: int, **options) -> np.ndarray:
        """`rows` continuations of one prompt: int32 [rows, max_new_tokens], without the prompt. See `continue_all`."""
        texts = self.continue_all(params, [prompt] * rows, max_new_tokens=max_new_tokens, **options)
        return np.stack(texts) if texts else np.zeros((0, max_new_tokens), np.int32)

    def continue_all(
        self,
        params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        seed: int = 0,
        sampling: Sampling = PLAIN,
        first: int = 0,
        longest: int = 0,
        stop_ids: Collection[int] = (),
        on_news: Callable[[int, News], bool | None] = lambda row, news: None,
    ) -> list[np.ndarray]:
        """The continuation of each prompt, without the prompt.

        Args:
          prompts: integers [n], n >= 1, ids of the vocabulary.
          max_new_tokens: how many tokens are generated, unless one of `stop_ids` ends the text, which it then includes.
          seed: continuation i depends only on its prompt and on (seed, first + i).
          first: the number of the first prompt.
          longest: the longest prompt of all calls, if texts must not depend on how prompts are split into calls.
          on_news: is called with i and the next tokens of text i; if it returns True, the text ends with them.

        Returns:
          int32 arrays.
        """
        if not prompts or not max_new_tokens:
            return [np.zeros(0, np.int32) for _ in prompts]
        texts = [Text(prompt, max_new_tokens, seed, first + i, sampling) for i, prompt in enumerate(prompts)]
        wanted = max(longest, max(map(len, prompts))) + max_new_tokens
        size = self.slots if self.read_at_once else self.slots_for(len(texts))
        batch = Batch(self, params, wanted=wanted, size=size, stop_ids=stop_ids)
        for text in texts:
            batch.add(text)
        while not batch.idle:
            for news in batch.step():
                if on_news(news.text.row - first, news):
                    batch.remove(news.text)
        return [text.new for text in texts]

    def check(self, prompt: np.ndarray) -> None:
        """Raises ValueError if a prompt cannot be continued."""
        if not len(prompt):
            raise ValueError("a prompt of 0 tokens; at least 1 is needed")
        lowest, highest = np.min(prompt), np.max(prompt)
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"prompt holds token {wrong}; the vocabulary has ids 0 to {self.config.vocab_size - 1}")

    def lower(self, params, *, rows: int, wanted: int) -> jax.stages.Lowered:
        """Lowers the loop for `rows` texts of `wanted` tokens, including the prompt; params may be abstract."""
        slots = self._multiple(rows)
        state = jax.eval_shape(lambda: self._empty(slots, self.cache_length(wanted)))
        state["cache"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._cache_sharding), state["cache"]
        )
        return self.write.lower(
            params, state=state, texts=_arrays([None] * slots, 0),
            token=np.zeros(slots, np.int32), stop=np.zeros(0, np.int32), steps=1,
        )  # fmt: skip

    def cache_length(self, wanted: int) -> int:
        return min(self.context, power_of_2(wanted))

    def slots_for(self, texts: int) -> int:
        """The number of slots of a batch of this many texts."""
        return min(self._multiple(power_of_2(texts)), self.slots)

    def _multiple(self, slots: int) -> int:
        return -(-slots // self._shards) * self._shards

    # What is compiled. `texts`: see _arrays.

    def _empty(self, slots: int, length: int) -> State:
        seen = jnp.zeros((slots, self.config.padded_vocab_size), bool)
        return {"cache": empty_cache(self.config, slots, length), "seen": seen}

    def _choose(self, logits: Array, texts: dict[str, Any], length: Array, seen: Array) -> tuple[Array, Array]:
        """The next token of each text, of which `length` [b] tokens are in the context, and its log-probability."""
        if self.vocab_size < self.config.vocab_size:
            logits = logits.at[:, self.vocab_size :].set(-jnp.inf)

        def key(seed: Array, row: Array, position: Array) -> Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

        keys = jax.vmap(key)(texts["seed"], texts["row"], texts["start"] + length)
        return choose(logits, texts["sampling"], keys, seen)

    def _read(
        self, params, *, state: State, texts: dict[str, Any], tokens: Array, lengths: Array, slots: Array, known: Array
    ) -> tuple[tuple[Array, Array], State]:
        """Reads tokens [n, p], of which the first `lengths` [n] of a row count, into slots [n]; slots beyond the batch
        are left out. `known`, bool [n, vocab], are the tokens that each text has.

        Returns:
          int32 [n] and float32 [n], the tokens that follow, and their log-probabilities; the state.
        """
        if self._row_sharding is not None and len(tokens) % self._shards == 0:
            tokens = jax.lax.with_sharding_constraint(tokens, self._row_sharding)
        logits, read = self._apply(params)(tokens, keep=True, logits_at=lengths - 1)
        # No token sees one after it, so the padding after a prompt changes nothing, and it is overwritten in the cache
        # before its index becomes visible.
        cache = jax.tree.map(lambda all, new: _placed(all, new, lengths, slots), state["cache"], read)
        token, logprob = self._choose(logits[:, 0], texts, lengths, known)
        known = known.at[jnp.arange(len(token)), token].set(True)
        return (token, logprob), {"cache": cache, "seen": state["seen"].at[slots].set(known, mode="drop")}

    def _write(
        self, params, *, state: State, texts: dict[str, Any], token: Array, stop: Array, steps: Array
    ) -> tuple[tuple[Array, Array, Array], State]:
        """Up to `steps` tokens of each text [b] of which texts["cached"] tokens and then `token` are known.

        A text ends with a token of `stop`, or when texts["limit"] tokens are known; a slot that is not used has a limit
        of 0.

        Returns:
          (int32 [b, chunk], the tokens; float32 [b, chunk], their log-probabilities; int32 [b], how many count); the
          state.
        """
        model = self._apply(params)

        def goes_on(token: Array, cached: Array) -> Array:
            ended = (token[:, None] == stop[None]).any(axis=1) if len(stop) else jnp.zeros(token.shape, bool)
            return ~ended & (cached + 1 < texts["limit"])

        def step(carry):
            i, token, at, out, state = carry
            active = goes_on(token, at)
            logits, cache = model(token[:, None], index=at[:, None], cache=state["cache"])
            chosen, logprob = self._choose(logits[:, 0], texts, at + 1, state["seen"])
            token = jnp.where(active, chosen, token)
            state = {
                "cache": cache,
                "seen": jax.vmap(lambda seen, token: seen.at[token].set(True))(state["seen"], token),
            }
            return i + 1, token, at + active, (out[0].at[:, i].set(token), out[1].at[:, i].set(logprob)), state

        def unfinished(carry):
            i, token, at, *_ = carry
            return (i < steps) & goes_on(token, at).any()

        shape = (len(token), self.chunk)
        begin = (0, token, texts["cached"], (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)), state)
        _, _, at, out, state = jax.lax.while_loop(unfinished, step, begin)
        return (*out, at - texts["cached"]), state


def _placed(cache: Array, new: Array, lengths: Array, slots: Array) -> Array:
    """`cache` [b, s, k, d] with new keys or values [n, p, k, d] in these slots [n], of which the last ones of the first
    `lengths` [n] count."""
    s, p = cache.shape[1], new.shape[1]
    if p <= s:
        return cache.at[slots, :p].set(new, mode="drop")
    last = lengths[:, None] - 1
    index = last - (last - jnp.arange(s)[None]) % s  # which token belongs at each of the s positions
    newest = jnp.take_along_axis(new, jnp.maximum(index, 0)[:, :, None, None], axis=1)
    return cache.at[slots].set(newest, mode="drop")


def _bytes_per_device(x: Array) -> int:
    return x.addressable_shards[0].data.nbytes


def _rows_of(state: State, slots: Array) -> State:
    return jax.tree.map(lambda x: x[slots], state)


def _arrays(texts: Sequence[Text | None], length: int) -> dict[str, Any]:
    """The numbers of texts as arrays [b], for the compiled functions. The cache has room for `length` tokens."""
    return {
        "seed": np.array([text.seed if text else 0 for text in texts], np.uint32),
        "row": np.array([text.row if text else 0 for text in texts], np.int32),
        "start": np.array([text.start if text else 0 for text in texts], np.int32),
        "cached": np.array([text.cached if text else 0 for text in texts], np.int32),
        "limit": np.array([min(text.wanted - text.start, length) if text else 0 for text in texts], np.int32),
        "sampling": stacked([text.sampling if text else GREEDY for text in texts]),
    }


class Batch:
    """Texts that are being generated, and their cache.

    Args:
      params: of generator.apply.
      wanted: the length of the longest text, with its prompt.
      size: the number of slots.
      stop_ids: tokens that end a text.
    """

    def __init__(self, generator: Generator, params, *, wanted: int, size: int, stop_ids: Collection[int] = ()):
        self._generator = generator
        self._params = params
        self._stop = np.array(sorted(stop_ids), np.int32)
        self._length = generator.cache_length(wanted)
        self._size = size
        self._slots: dict[int, Text] = {}
        self._waiting: collections.deque[Text] = collections.deque()
        self._state = generator.empty(size, self._length)
        looked_up = {} if generator.config.tie_embeddings else {"embedding": None}  # only some rows of it are read
        self._bytes = sum(map(_bytes_per_device, jax.tree.leaves((params | looked_up, self._state["cache"]))))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._slots and not self._waiting

    def add(self, text: Text) -> None:
        """Adds a text, which waits until a slot is free. Raises ValueError if its prompt cannot be continued."""
        self._generator.check(text.prompt)
        self._waiting.append(text)

    def remove(self, text: Text) -> None:
        """Forgets a text, if it has not ended."""
        if text in self._waiting:
            self._waiting.remove(text)
        self._slots = {i: one for i, one in self._slots.items() if one is not text}

    def step(self) -> list[News]:
        """Reads waiting texts into free slots, or generates some tokens of each text; returns what each text gained."""
        return self._read() or self._write()

    def _read(self) -> list[News]:
        """Gives free slots to waiting texts, reads them, and those whose context is full; returns their next tokens."""
        fresh = [i for i, text in self._slots.items() if self._is_full(text)]
        for i in range(self._size):
            if i not in self._slots and self._waiting:
                self._slots[i] = self._waiting.popleft()
                fresh.append(i)
        groups = collections.defaultdict(list)
        for i in fresh:
            text = self._slots[i]
            known = len(text.tokens) if len(text.tokens) < self._length else self._length // 2
            text.start = len(text.tokens) - known
            groups[min(self._length, power_of_2(known))].append(i)
        at_once = self._generator.read_at_once or self._size
        return [
            one
            for length, group in sorted(groups.items())
            for i in range(0, len(group), at_once)
            for one in self._read_group(length, group[i : i + at_once])
        ]

    def _is_full(self, text: Text) -> bool:
        return text.cached + 1 >= self._length

    def _read_group(self, length: int, group: list[int]) -> list[News]:
        n = self._generator.read_at_once or power_of_2(len(group))
        texts = [self._slots[i] for i in group] + [None] * (n - len(group))
        tokens, lengths = np.zeros((n, length), np.int32), np.ones(n, np.int32)
        known = np.zeros((n, self._generator.config.padded_vocab_size), bool)
        for j, text in enumerate(texts):
            if text is not None:
                context = text.tokens[text.start :]
                tokens[j, : len(context)], lengths[j] = context, len(context)
                known[j, text.tokens] = True
        slots = np.array(group + [self._size] * (n - len(group)), np.int32)
        begin = time.perf_counter()
        result, self._state = self._generator.read(
            self._params, state=self._state, texts=_arrays(texts, self._length), tokens=tokens, lengths=lengths,
            slots=slots, known=known,
        )  # fmt: skip
        token, logprob = jax.device_get(result)
        self._generator.reading.add(
            (*tokens.shape, self._length), tokens=int(lengths[: len(group)].sum()), bytes=self._bytes,
            seconds=time.perf_counter() - begin,
        )  # fmt: skip
        return [self._add(i, token[j : j + 1], logprob[j : j + 1]) for j, i in enumerate(group)]

    def _write(self) -> list[News]:
        """Generates some tokens of each text in the batch, and returns them."""
        if all(map(self._is_full, self._slots.values())):
            return []
        if not self._generator.read_at_once and not self._waiting:
            self._shrink()
        texts = [self._slots.get(i) for i in range(self._size)]
        token = np.array([text.tokens[-1] if text else 0 for text in texts], np.int32)
        begin = time.perf_counter()
        result, self._state = self._generator.write(
            self._params, state=self._state, texts=_arrays(texts, self._length), token=token, stop=self._stop,
            steps=self._generator.chunk,
        )  # fmt: skip
        tokens, logprobs, counts = jax.device_get(result)
        self._generator.writing.add(
            (self._size, self._length), tokens=int(counts.sum()), bytes=int(counts.max()) * self._bytes,
            seconds=time.perf_counter() - begin,
        )  # fmt: skip
        return [self._add(i, tokens[i, : counts[i]], logprobs[i, : counts[i]]) for i in list(self._slots)]

    def _shrink(self) -> None:
        """Makes a batch of which a quarter or less is left as small as it can be, so that texts which have ended cost
        nothing more. (A smaller batch is another compiled program; hence not at once.)"""
        size = self._generator.slots_for(len(self._slots))
        if 4 * size > self._size:
            return
        left = sorted(self._slots)
        self._state = self._generator.rows_of(self._state, np.array(left + left[:1] * (size - len(left)), np.int32))
        self._slots = {j: self._slots[i] for j, i in enumerate(left)}
        self._size = size

    def _add(self, i: int, tokens: np.ndarray, logprobs: np.ndarray) -> News:
        text = self._slots[i]
        text.tokens = np.concatenate([text.tokens, tokens])
        if ended := len(text.tokens) >= text.wanted or text.tokens[-1] in self._stop:
            del self._slots[i]
        return News(text, tokens, logprobs, bool(ended))


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()
