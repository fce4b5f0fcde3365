"""Generation: greedy text is compared with a slow reference without a cache, and sampling with exact distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_models
from scipy import stats
from tiny_models import CONFIGS, VOCAB

from model.config import ModelConfig
from model.generate import Batch, Generator, News, Text
from model.sampling import Sampling, filter_logits

KNOWN = np.array([0.15, 0.5, 0.1, 0.25])  # cumulative sums, largest first: 0.5, 0.75, 0.9, 1


def probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    logits = jnp.asarray(logits, jnp.float32)
    kept = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return np.asarray(jax.nn.softmax(kept, axis=-1))


def support(p, **sampling) -> set[int]:
    return set(np.flatnonzero(probabilities(np.log(p), **sampling)).tolist())


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_takes_the_root_of_probabilities(temperature):
    expected = KNOWN ** (1 / temperature)
    np.testing.assert_allclose(
        probabilities(np.log(KNOWN), temperature=temperature), expected / expected.sum(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.74}, {1, 3}),
        ({"top_p": 0.76}, {0, 1, 3}),
        ({"top_p": 0.91}, {0, 1, 2, 3}),
        # top-p applies after temperature: p^2, normalised, is 0.72, 0.18, 0.07, 0.03.
        ({"top_p": 0.7, "temperature": 0.5}, {1}),
        ({"top_p": 0.7, "temperature": 2.0}, {0, 1, 3}),  # sqrt(p), normalised, is 0.37, 0.26, 0.20, 0.16
        # top-p applies after top-k, which leaves 2/3 and 1/3.
        ({"top_p": 0.6, "top_k": 2}, {1}),
        ({"top_p": 0.7, "top_k": 2}, {1, 3}),
        ({"top_p": 0.99, "top_k": 2}, {1, 3}),
        ({"min_p": 0.19}, {0, 1, 2, 3}),
        ({"min_p": 0.21}, {0, 1, 3}),
        ({"min_p": 0.31}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # min-p applies after temperature: p^2 is 0.09, 1, 0.04, 0.25 times the largest.
        ({"min_p": 0.1, "temperature": 0.5}, {1, 3}),
        ({"min_p": 0.31, "top_k": 1}, {1}),
    ],
    ids=str,
)
def test_support_of_a_known_distribution(sampling, expected):
    assert support(KNOWN, **sampling) == expected


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}], ids=str)
def test_the_tokens_that_stay_keep_their_proportions(sampling):
    np.testing.assert_allclose(probabilities(np.log(KNOWN), **sampling), [0, 2 / 3, 0, 1 / 3], rtol=1e-6)


def test_equally_likely_tokens_stay_or_go_together():
    tied = np.array([0.2, 0.4, 0.2, 0.2 - 1e-3, 1e-3])
    assert support(tied, top_k=2) == {0, 1, 2}
    assert support(tied, top_k=3) == {0, 1, 2}
    assert support(tied, top_p=0.39) == {1}
    assert support(tied, top_p=0.5) == {0, 1, 2}
    assert support(np.full(5, 0.2), top_p=0.1) == support(np.full(5, 0.2), top_k=1) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_the_most_likely_token_always_stays(top_p, top_k):
    assert support(KNOWN, top_p=top_p, top_k=top_k) == {1}
    assert support([1e-30, 1.0, 1e-20], top_p=top_p, top_k=top_k) == {1}


def test_ruled_out_tokens_stay_ruled_out_and_do_not_count():
    """The logits of padding are -inf: a top_k above the number of real tokens must not select padding."""
    logits = np.concatenate([np.log(KNOWN), [-np.inf] * 4])
    for sampling in ({}, {"top_k": 6}, {"top_p": 0.999}, {"top_k": 6, "top_p": 0.76}, {"temperature": 1e3}):
        p = probabilities(logits, **sampling)
        assert (p[4:] == 0).all() and p.sum() == pytest.approx(1)
        np.testing.assert_allclose(p[:4], probabilities(np.log(KNOWN), **sampling), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.55, 0.95, 1.0])
def test_filtering_is_its_definition_row_by_row(temperature, top_k, top_p):
    logits = 2 * np.random.default_rng(0).standard_normal((3, 4, VOCAB))
    p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for index in np.ndindex(3, 4):
        expected = reference.filtered_probabilities(logits[index], temperature, top_k, top_p)
        np.testing.assert_array_equal(p[index] > 0, expected > 0)
        np.testing.assert_allclose(p[index], expected, rtol=2e-5)


FIELDS = {field.name for field in dataclasses.fields(Sampling)}


@functools.cache
def plain_generator(config: ModelConfig, **options) -> Generator:
    return Generator(config, tiny_models.make(config)[0], **({"context": config.max_seq_len} | options))


class Sampled:
    """A Generator that always samples alike, greedily by default."""

    def __init__(self, generator: Generator, sampling: Sampling):
        self._generator = generator
        self._sampling = sampling

    def __call__(self, *arguments, **options):
        return self._generator(*arguments, sampling=self._sampling, **options)

    def continue_all(self, *arguments, **options):
        return self._generator.continue_all(*arguments, sampling=self._sampling, **options)


def generator_of(config: ModelConfig, **options) -> Sampled:
    """Its compiled programs are shared by all tests with the same options except those of Sampling."""
    fields = {name: value for name, value in options.items() if name in FIELDS}
    others = {name: value for name, value in options.items() if name not in FIELDS}
    return Sampled(plain_generator(config, **others), Sampling(**({"temperature": 0.0} | fields)))


def slow_greedy(config: ModelConfig, params: dict, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
    """Recomputes the context for each token, in float64. A full context starts again from its second half."""
    text, context = list(prompt), list(prompt)
    for _ in range(max_new_tokens):
        if len(context) >= config.max_seq_len:
            context = text[-(config.max_seq_len // 2) :]
        logits = reference.forward(params, config, np.array([context]))[0, -1]
        runner_up, best = np.sort(logits)[-2:]
        assert best - runner_up > 20 * 2e-5, "too close for float32: choose another seed"
        text.append(int(logits.argmax()))
        context.append(text[-1])
    return text[len(prompt) :]


GREEDY = {name: CONFIGS[name] for name in ("llama", "gpt2", "one_kv_head", "learned_grouped")}


@pytest.mark.parametrize("config", GREEDY.values(), ids=GREEDY.keys())
def test_greedy_text_is_that_of_full_passes_without_a_cache(config):
    """Prompts have from one token to one less than the context; text reaches the last position of the context."""
    params, context = tiny_models.make(config)[1], config.max_seq_len
    written = set()
    for n in (1, 2, context // 2 + 1, context - 1):
        prompt = tiny_models.random_tokens(config, 1, n, seed=n)[0]
        rows = generator_of(config)(params, prompt, rows=2, max_new_tokens=context - n, seed=0)
        assert rows.dtype == np.int32 and rows.shape == (2, context - n)
        assert rows[0].tolist() == slow_greedy(config, params, prompt, context - n)
        assert rows[1].tolist() == rows[0].tolist()
        written |= set(rows[0].tolist())
    assert len(written) > 5  # text that repeats one token would prove little


@pytest.mark.parametrize("config", GREEDY.values(), ids=GREEDY.keys())
def test_text_beyond_the_context_restarts_from_its_second_half(config):
    params, context = tiny_models.make(config)[1], config.max_seq_len
    for n in (3, context - 1, context, context + 1, 2 * context + 3):
        prompt = tiny_models.random_tokens(config, 1, n, seed=10 + n)[0]
        (text, _) = generator_of(config)(params, prompt, rows=2, max_new_tokens=2 * context + 5, seed=0)
        assert text.tolist() == slow_greedy(config, params, prompt, 2 * context + 5)


def test_short_texts_use_a_short_buffer_and_read_the_same():
    """The texts fill buffers of 2 and 8 positions completely."""
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    for n, new in ((1, 1), (3, 5)):
        prompt = tiny_models.random_tokens(config, 1, n, seed=n)[0]
        (text,) = generator_of(config)(params, prompt, rows=1, max_new_tokens=new, seed=0)
        assert text.tolist() == slow_greedy(config, params, prompt, new)


def test_one_compilation_for_each_number_of_slots_and_power_of_2():
    """A compilation for each prompt length would stall sampling during a run."""
    config = CONFIGS["llama"]
    apply, params = tiny_models.make(config)
    traced = []

    def counting(params):
        traced.append(1)
        return apply(params)

    generator = Sampled(Generator(config, counting, context=config.max_seq_len), Sampling(temperature=0.0))
    for n, new in ((9, 7), (10, 6), (12, 4), (13, 2)):
        generator(params, np.arange(n), rows=2, max_new_tokens=new, seed=n)
    assert len(traced) == 2  # prompts of 9 to 16 tokens, and the loop
    generator(params, np.arange(5), rows=2, max_new_tokens=9, seed=0)
    assert len(traced) == 3  # prompts of 5 to 8 tokens
    generator(params, np.arange(5), rows=2, max_new_tokens=3, seed=0)
    assert len(traced) == 5  # a cache of 8 tokens


BATCHED = {name: CONFIGS[name] for name in ("gemma", "learned_grouped")}  # windows, grouped queries, both positions


@pytest.mark.parametrize("config", BATCHED.values(), ids=BATCHED.keys())
def test_prompts_of_any_length_in_one_batch_read_as_each_alone(config):
    """Greedy texts of 20 prompts, in 4 and in 32 slots, are those of full passes over each by itself; some texts are
    longer than the context."""
    params, context, new = tiny_models.make(config)[1], config.max_seq_len, 12
    lengths = [1, 2, 3, 5, 8, 9, context // 2, context - new, context - 2, context - 1, context, context + 3] + [4] * 8
    prompts = [tiny_models.random_tokens(config, 1, n, seed=100 + i)[0] for i, n in enumerate(lengths)]
    expected = [slow_greedy(config, params, prompt, new) for prompt in prompts]
    for slots in (4, 32):
        parts: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        generator = generator_of(config, slots=slots, chunk=5)
        texts = generator.continue_all(
            params,
            prompts,
            max_new_tokens=new,
            seed=0,
            on_news=lambda i, news, parts=parts: parts[i].extend(news.tokens),
        )
        assert [text.tolist() for text in texts] == expected
        assert list(parts.values()) == expected


def test_a_text_depends_on_its_prompt_the_seed_and_its_number_alone():
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    prompts = [tiny_models.random_tokens(config, 1, 1 + i % 7, seed=i)[0] for i in range(11)]

    def write(prompts, **options):
        generator = generator_of(config, temperature=1.5, **options)
        return [text.tolist() for text in generator.continue_all(params, prompts, max_new_tokens=20, seed=3)]

    texts = write(prompts)
    assert write(prompts, slots=2) == write(prompts, slots=2, chunk=3) == texts
    assert write(prompts[:5]) == texts[:5]
    whole = write(prompts, slots=4, read=4)
    generator = generator_of(config, temperature=1.5, slots=4, read=4)
    rest = generator.continue_all(params, prompts[7:], max_new_tokens=20, seed=3, first=7, longest=7)
    assert [text.tolist() for text in rest] == whole[7:] == texts[7:]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_a_stop_token_ends_its_text_and_no_other():
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    prompts = [tiny_models.random_tokens(config, 1, 3, seed=i)[0] for i in range(8)]
    generator = generator_of(config, temperature=2.0, slots=4, chunk=4)
    whole = generator.continue_all(params, prompts, max_new_tokens=30, seed=0)
    stop = {7, 9}
    texts = generator.continue_all(params, prompts, max_new_tokens=30, seed=0, stop_ids=stop)
    ended = 0
    for text, full in zip(texts, whole, strict=True):
        first = next((i for i, id in enumerate(full.tolist()) if id in stop), None)
        ended += first is not None
        assert text.tolist() == full.tolist()[: None if first is None else first + 1]
    assert ended > 2
    assert [len(t) for t in generator.continue_all(params, [], max_new_tokens=3, seed=0)] == []


def test_top_k_of_1_is_greedy():
    config = CONFIGS["llama"]
    params, prompt = tiny_models.make(config)[1], np.array([3, 1, 4])
    arguments = {"rows": 2, "max_new_tokens": 30, "seed": 1}
    text = generator_of(config, temperature=5.0, top_k=1)(params, prompt, **arguments)
    np.testing.assert_array_equal(text, generator_of(config)(params, prompt, **arguments))


ROWS = 200  # tests that need many rows share one compilation


def test_a_row_depends_on_the_seed_and_its_number_alone():
    config = CONFIGS["llama"]
    params, prompt = tiny_models.make(config)[1], np.array([3, 1, 4])
    generator = generator_of(config, temperature=1.0)

    def write(rows, seed):
        return generator(params, prompt, rows=rows, max_new_tokens=30, seed=seed)

    text = write(ROWS, 0)
    np.testing.assert_array_equal(write(ROWS, 0), text)
    np.testing.assert_array_equal(write(2, 0), text[:2])
    assert len({tuple(row) for row in text.tolist()}) == ROWS
    assert (write(ROWS, 1) != text).any(axis=1).all()


def test_the_start_of_a_text_does_not_depend_on_how_much_is_written():
    """This holds within one buffer length: random numbers depend on positions in the text, not on steps of the loop."""
    config = CONFIGS["llama"]
    params, prompt = tiny_models.make(config)[1], np.array([3, 1, 4])
    generator = generator_of(config, temperature=1.0)
    long = generator(params, prompt, rows=2, max_new_tokens=40, seed=0)
    np.testing.assert_array_equal(generator(params, prompt, rows=2, max_new_tokens=7, seed=0), long[:, :7])


def chi_square_p(counts, expected) -> float:
    expected = np.asarray(expected, np.float64)
    assert expected.min() >= 5  # otherwise the chi-square approximation is not valid
    return stats.chisquare(counts, expected * np.sum(counts) / expected.sum()).pvalue


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 20, "top_p": 0.8}],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(sampling):
    """The first tokens of 4000 rows are compared with the reference's distribution; rare tokens are counted
    together."""
    config, rows = CONFIGS["gpt2"], 4000
    params, prompt = tiny_models.make(config)[1], np.array([3, 1, 4])
    text = generator_of(config, **sampling)(params, prompt, rows=rows, max_new_tokens=1, seed=7)
    logits = reference.forward(params, config, prompt[None])[0, -1]
    expected = rows * reference.filtered_probabilities(logits, **({"top_k": 0, "top_p": 1.0} | sampling))
    counts = np.bincount(text[:, 0], minlength=VOCAB)
    assert not counts[expected == 0].any()
    common, rare = expected >= 10, (expected > 0) & (expected < 10)
    assert common.sum() >= 3
    if rare.any():
        spare = max(expected[rare].sum(), 1e-9)
        assert abs(counts[rare].sum() - spare) < 5 * np.sqrt(spare) + 1
    assert chi_square_p(counts[common], expected[common]) > 1e-4


def test_consecutive_tokens_follow_their_joint_distribution():
    """The second token is drawn in the decoding loop, given the first, with its own random number."""
    config, rows = CONFIGS["llama"], 4000
    params, prompt = tiny_models.make(config)[1], np.array([3, 1])
    sampling = {"temperature": 2.0, "top_k": 3}
    text = generator_of(config, **sampling)(params, prompt, rows=rows, max_new_tokens=2, seed=0)

    def next_token(context):
        logits = reference.forward(params, config, np.array([context]))[0, -1]
        return reference.filtered_probabilities(logits, **sampling, top_p=1.0)

    first = next_token([3, 1])
    joint = np.stack([first[a] * (next_token([3, 1, a]) if first[a] else np.zeros(VOCAB)) for a in range(VOCAB)])
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (text[:, 0], text[:, 1]), 1)
    assert counts[joint == 0].sum() == 0 and (joint > 0).sum() == 9
    assert chi_square_p(counts[joint > 0], rows * joint[joint > 0]) > 1e-4


def test_uniform_text_has_all_tokens_no_padding_and_no_repetition():
    """If all parameters are 0, every token is equally likely, and all draws are independent.

    A random number that is used twice, by two rows or by two positions (such as the same one before and after a full
    context starts again), would show as more agreement than by chance. The padding from 50 to 64 never appears.
    """
    config = CONFIGS["llama"]
    zeros = jax.tree.map(jnp.zeros_like, tiny_models.make(config)[1])
    new = 4 * config.max_seq_len
    text = generator_of(config, temperature=1.0)(zeros, np.array([0]), rows=ROWS, max_new_tokens=new, seed=0)
    assert text.min() == 0 and text.max() == VOCAB - 1
    assert stats.chisquare(np.bincount(text.ravel(), minlength=VOCAB)).pvalue > 1e-4
    chance = 1 / VOCAB

    def assert_by_chance(agree):
        assert abs(agree.mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / agree.size)

    for lag in range(1, 2 * config.max_seq_len):
        assert_by_chance(text[:, lag:] == text[:, :-lag])
    for shift in range(1, 10):
        assert_by_chance(text[shift:] == text[:-shift])


def test_what_cannot_be_continued_is_refused():
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        generator_of(config)(params, np.array([], np.int32), rows=1, max_new_tokens=1, seed=0)
    # For an id outside the table, JAX would silently read the nearest row of the embedding and write another text.
    for wrong in (-1, VOCAB, VOCAB + 20):
        with pytest.raises(ValueError, match=f"token {wrong}; .* 0 to {VOCAB - 1}"):
            generator_of(config)(params, np.array([3, wrong, 4]), rows=1, max_new_tokens=1, seed=0)
    for context in (1, config.max_seq_len + 1):
        with pytest.raises(ValueError, match=f"context of {context} "):
            generator_of(config, context=context)


@pytest.mark.parametrize("name", ["learned_grouped", "llama"])
def test_no_place_past_the_context_is_ever_used(name):
    """A model may have room for more positions than it was trained on."""
    roomy, context = CONFIGS[name], CONFIGS[name].max_seq_len // 2
    params = tiny_models.make(roomy)[1]
    expected = slow_greedy(dataclasses.replace(roomy, max_seq_len=context), params, np.array([1, 2, 3]), 3 * context)
    text = generator_of(roomy, context=context)(params, np.array([1, 2, 3]), rows=1, max_new_tokens=3 * context, seed=0)
    assert text[0].tolist() == expected


def test_temperatures_that_float32_cannot_divide_by():
    """A temperature that is too small is greedy; one that is too large selects any token, but no padding."""
    config = CONFIGS["llama"]
    params, prompt = tiny_models.make(config)[1], np.array([1, 2])
    greedy = generator_of(config)(params, prompt, rows=1, max_new_tokens=8, seed=0).tolist()
    for temperature in (5e-324, 1e-46, 1e-31):
        text = generator_of(config, temperature=temperature)(params, prompt, rows=1, max_new_tokens=8, seed=0)
        assert text.tolist() == greedy, temperature
    for temperature in (1e31, 1e39, 1e308):
        text = generator_of(config, temperature=temperature)(params, prompt, rows=40, max_new_tokens=8, seed=0)
        assert text.max() < VOCAB and len(np.unique(text)) > 0.9 * VOCAB


def test_nothing_wanted_is_nothing_written():
    config = CONFIGS["llama"]
    text = generator_of(config)(tiny_models.make(config)[1], np.array([1, 2]), rows=3, max_new_tokens=0, seed=0)
    assert text.shape == (3, 0)


def test_texts_of_one_batch_are_sampled_each_by_its_own_numbers():
    """Each text is that of a batch in which all are sampled like it."""
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    choices = [
        Sampling(temperature=0.0), Sampling(temperature=2.0), Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.5, top_p=0.5), Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=0.0, repetition_penalty=1.5), Sampling(temperature=1.0, top_k=1), Sampling(top_k=5),
    ]  # fmt: skip
    generator = plain_generator(config)
    batch = Batch(generator, params, wanted=40, size=8)
    texts = [Text(np.array([3, 1, 4]), 36, 5, i, sampling) for i, sampling in enumerate(choices)]
    for text in texts:
        batch.add(text)
    while not batch.idle:
        batch.step()
    for i, text in enumerate(texts):
        alike = generator(
            params, np.array([3, 1, 4]), rows=8, max_new_tokens=36, seed=5, sampling=text.sampling
        )  # fmt: skip
        assert text.new.tolist() == alike[i].tolist(), text.sampling
    assert len({tuple(text.new) for text in texts}) == 7  # top_k = 1 is greedy
    assert len(set(texts[5].new)) > len(set(texts[0].new))


def test_log_probabilities_are_those_of_the_model_whatever_is_filtered():
    config = CONFIGS["gemma"]
    params, prompt = tiny_models.make(config)[1], np.array([3, 1, 4])
    for sampling in (Sampling(temperature=0.0), Sampling(3.0, temperature=1.7, top_k=4, top_p=0.8, min_p=0.01)):
        news: list[News] = []
        (text,) = plain_generator(config).continue_all(
            params, [prompt], max_new_tokens=12, seed=1, sampling=sampling,
            on_news=lambda i, new, news=news: news.append(new),
        )  # fmt: skip
        logits = reference.forward(params, config, np.array([[*prompt, *text]]))[0, 2:-1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = np.concatenate([new.logprobs for new in news])
        np.testing.assert_allclose(found, logprobs[np.arange(12), text], atol=1e-4)
        assert np.concatenate([new.tokens for new in news]).tolist() == text.tolist()
        assert [new.ended for new in news][-1] and not any(new.ended for new in news[:-1])


def test_a_repeated_token_is_penalised_in_the_prompt_and_in_the_text():
    """Greedy text is compared with a loop over full passes; slots are used again, and texts exceed the context."""
    config, penalty, new = CONFIGS["llama"], 1.8, 20
    params = tiny_models.make(config)[1]
    prompts = [tiny_models.random_tokens(config, 1, n, seed=n)[0] for n in (1, 5, 9, 14, 15, 16, 19, 35)]

    def slowly(prompt):
        text, context = list(prompt), list(prompt)
        for _ in range(new):
            if len(context) >= config.max_seq_len:
                context = text[-(config.max_seq_len // 2) :]
            logits = reference.forward(params, config, np.array([context]))[0, -1].copy()
            seen = np.unique(text)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            runner_up, best = np.sort(logits)[-2:]
            assert best - runner_up > 20 * 2e-5
            text.append(int(logits.argmax()))
            context.append(text[-1])
        return text[len(prompt) :]

    generator = generator_of(config, slots=2, repetition_penalty=penalty)
    texts = generator.continue_all(params, prompts, max_new_tokens=new)
    assert [text.tolist() for text in texts] == [slowly(prompt) for prompt in prompts]
    assert texts[0].tolist() != generator_of(config)(params, prompts[0], rows=1, max_new_tokens=new)[0].tolist()


def test_a_text_that_is_not_wanted_any_more_ends_and_the_others_do_not_change():
    """Most texts are removed early, so that the batch becomes smaller, and one while it waits."""
    config = CONFIGS["llama"]
    params = tiny_models.make(config)[1]
    prompts = [tiny_models.random_tokens(config, 1, 1 + i % 7, seed=i)[0] for i in range(18)]
    generator = generator_of(config, temperature=1.5, slots=16, chunk=4)
    whole = generator.continue_all(params, prompts, max_new_tokens=30, seed=3)
    texts = generator.continue_all(
        params, prompts, max_new_tokens=30, seed=3, on_news=lambda i, news: i not in (3, 16) and len(news.text.new) >= 5
    )
    for i, (text, full) in enumerate(zip(texts, whole, strict=True)):
        assert text.tolist() == full[: len(text)].tolist()
        assert len(text) == 30 if i in (3, 16) else 5 <= len(text) < 10
    batch = Batch(plain_generator(config), params, wanted=20, size=1)
    first, second = Text(prompts[0], 10, 0, 0), Text(prompts[1], 10, 0, 1)
    batch.add(first)
    batch.add(second)
    batch.step()
    batch.remove(second)
    batch.remove(first)
    assert batch.idle and batch.step() == [] and len(second.new) == 0


@pytest.mark.parametrize("fields", [
    {"temperature": -1e-9}, {"temperature": np.inf}, {"temperature": np.nan}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": np.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
    {"repetition_penalty": np.inf}, {"top_k": 2**31},
], ids=str)  # fmt: skip
def test_a_value_that_means_nothing_is_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*; it must be"):
        Sampling(**fields)
