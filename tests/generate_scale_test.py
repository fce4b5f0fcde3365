"""Generation at full scale: 32 prompts of 1 to 500 tokens in one batch, and 20,000 draws of each way of sampling.

The expected logits are those of full passes over whole texts, without a cache, in float64 (tests/reference.py). Each
token of a greedy text must be the most likely one after the tokens before it: then, by induction, the text is the one
that a loop over full passes writes.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import reference
import tiny_models
from scipy import stats

from model.config import ModelConfig, RopeScaling
from model.generate import GREEDY
from model.sampling import Sampling
from tests.generate_test import chi_square_p, plain_generator
from trainer import sharding
from trainer.config import Config, DataConfig, MeshConfig
from trainer.sampling import fast_params, make_generator
from trainer.state import Program

pytestmark = pytest.mark.slow

CONTEXT, NEW, WINDOW, VOCAB = 1024, 24, 96, 100  # the vocabulary is padded to 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "max_seq_len": CONTEXT, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "tie_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "windowed": ModelConfig(
        **SHAPE, head_dim=10, mlp="geglu", norm_at="both", norm_plus_one=True, qk_norm="head", window=WINDOW,
        layer_pattern=("local", "global"), local_rope_theta=100.0, rope_scaling=RopeScaling("linear", 4.0),
        attention_softcap=5.0, embedding_scale=2.5,
    ),
    "grouped": ModelConfig(**SHAPE, mlp="swiglu"),
}  # fmt: skip
SEEDS = {"windowed": 5, "grouped": 3}  # of prompts after which no token is nearly as likely as the most likely one
ROUNDING = 4e-5  # the largest error of a logit in float32
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def prompts(family: str) -> list[np.ndarray]:
    """32 prompts. Their lengths lie around multiples of the window and those whose texts fill a cache of 128 or 512
    tokens to the last place; they are of a few powers of 2 only, because each is compiled."""
    lengths = [1, 1, 1, 17, 31, 32, WINDOW - NEW, WINDOW - 1, WINDOW, WINDOW + 1, 128 - NEW, 129 - NEW, 128, 257]
    lengths += [3 * WINDOW - 1, 3 * WINDOW, 3 * WINDOW + 1, 5 * WINDOW, 512 - NEW, 513 - NEW, 499, 500]
    draw = np.random.default_rng(SEEDS[family])
    lengths += draw.integers(257, 500, 32 - len(lengths)).tolist()
    return [draw.integers(0, VOCAB, n).astype(np.int32) for n in draw.permutation(lengths)]


def params_of(family: str) -> dict:
    return tiny_models.make(FAMILIES[family])[1]


@functools.cache
def alone(family: str) -> list[list[int]]:
    """The greedy text of each prompt, in a batch of one."""
    generator, params = plain_generator(FAMILIES[family]), params_of(family)
    one_by_one = (generator(params, p, rows=1, max_new_tokens=NEW, sampling=GREEDY)[0] for p in prompts(family))
    return [text.tolist() for text in one_by_one]


def full_pass(config: ModelConfig, prompts: list[np.ndarray], texts: list) -> list[np.ndarray]:
    """The logits of a pass without a cache for each token of the texts, float32 [new, vocab]."""
    length = max(map(len, prompts)) + max(map(len, texts))
    padded = np.stack([np.resize([*prompt, *text], length) for prompt, text in zip(prompts, texts, strict=True)])
    logits = np.asarray(tiny_models.jitted_forward(config)(tiny_models.make(config)[1], padded))[..., :VOCAB]
    return [
        row[len(prompt) - 1 : len(prompt) + len(text) - 1]
        for row, prompt, text in zip(logits, prompts, texts, strict=True)
    ]


@every_family
def test_the_text_of_a_prompt_is_that_of_full_passes(family):
    """The gap between the two largest logits is far above the rounding of float32, so that the texts are certain."""
    config, params = FAMILIES[family], params_of(family)
    texts, rounding = alone(family), 0.0
    of_float32 = full_pass(config, prompts(family), texts)
    for prompt, text, found in zip(prompts(family), texts, of_float32, strict=True):
        logits = reference.forward(params, config, np.array([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
        rounding = max(rounding, np.abs(found - logits).max())
        gap = np.diff(np.sort(logits)[:, -2:]).min()
        assert gap > 20 * ROUNDING, (gap, "too close for float32: choose another seed")
        assert text == logits.argmax(-1).tolist(), f"after {len(prompt)} tokens"
    assert rounding < ROUNDING
    assert len({tuple(text) for text in texts}) > 28 and len({token for text in texts for token in text}) > VOCAB // 2


@every_family
def test_a_batch_of_prompts_of_any_length_reads_as_each_alone(family):
    generator = plain_generator(FAMILIES[family])
    texts = generator.continue_all(params_of(family), prompts(family), max_new_tokens=NEW, sampling=GREEDY)
    assert [text.tolist() for text in texts] == alone(family)


@every_family
def test_texts_that_end_at_different_times_in_few_slots_read_as_each_alone(family):
    """A slot is used again while the other texts are at other positions; the parameters are those of launch.sample."""
    stop = set(range(0, VOCAB, 12))
    generator = plain_generator(FAMILIES[family], slots=12, read=4, chunk=5)
    params = fast_params(params_of(family), FAMILIES[family])
    texts = generator.continue_all(params, prompts(family), max_new_tokens=NEW, sampling=GREEDY, stop_ids=stop)
    ends = [next((i for i, id in enumerate(text) if id in stop), NEW) for text in alone(family)]
    assert [text.tolist() for text in texts] == [text[: n + 1] for text, n in zip(alone(family), ends, strict=True)]
    assert len(set(ends)) > 8


@every_family
def test_a_batch_on_a_mesh_of_data_fsdp_and_tensor_reads_as_each_alone(family):
    config = Config(
        model=FAMILIES[family], data=DataConfig(seq_len=CONTEXT), mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        global_batch_size=8,
    )  # fmt: skip
    here = Program(config, sharding.make_mesh(config))
    with jax.set_mesh(here.mesh):
        params = jax.device_put(params_of(family), jax.tree.map(lambda leaf: leaf.sharding, here.params))
        texts = make_generator(here).continue_all(
            fast_params(params, config.model), prompts(family), max_new_tokens=NEW, sampling=GREEDY
        )
    assert [text.tolist() for text in texts] == alone(family)


DRAWS = 20_000
WAYS = {
    "temperature": Sampling(temperature=1.6),
    "top_k": Sampling(temperature=1.5, top_k=12),
    "top_p": Sampling(temperature=1.5, top_p=0.8),
    "min_p": Sampling(temperature=1.5, min_p=0.1),
    "repetition_penalty": Sampling(repetition_penalty=2.0),
    "all": Sampling(repetition_penalty=1.5, temperature=1.8, top_k=30, top_p=0.9, min_p=0.05),
}
SAMPLED = dataclasses.replace(FAMILIES["windowed"], window=16)  # short texts exceed the window
every_way = pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)


def distributions(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities to draw from, float64 [n, vocab], by the definitions of the filters, with sorted tokens.

    Args:
      logits: [n, vocab].
      seen: bool [n, vocab], the tokens that are penalised.
    """
    penalty = sampling.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), np.asarray(logits, np.float64))
    p = reference.softmax(logits / sampling.temperature)
    order = np.argsort(-p)
    p = np.take_along_axis(p, order, -1)
    p[:, sampling.top_k or VOCAB :] = 0
    p /= p.sum(-1, keepdims=True)
    p[(np.cumsum(p, -1) - p >= sampling.top_p) & (sampling.top_p < 1)] = 0
    p[p < sampling.min_p * p[:, :1]] = 0
    p /= p.sum(-1, keepdims=True)
    return np.take_along_axis(p, np.argsort(order), -1)


def there_before(prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """bool [new, vocab]: the tokens that were there before each token of a text."""
    whole = np.concatenate([prompt, text])
    there = np.zeros((len(whole), VOCAB), bool)
    there[np.arange(len(whole)), whole] = True
    return np.maximum.accumulate(there)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("sampling", [WAYS["temperature"], WAYS["all"]], ids=["temperature", "all"])
def test_pairs_of_tokens_come_as_often_as_their_probabilities_say(sampling):
    """20,000 texts of two tokens after one prompt: one is drawn as the prompt is read, one in the loop."""
    params, prompt = tiny_models.make(SAMPLED)[1], np.array([3, 1, 4, 1, 5], np.int32)
    generator = plain_generator(SAMPLED, slots=4096)
    pairs = generator(params, prompt, rows=DRAWS, max_new_tokens=2, seed=5, sampling=sampling)
    texts = np.array([[*prompt, token] for token in range(VOCAB)])
    logits = reference.forward(params, SAMPLED, texts)
    first = distributions(logits[:1, 4], np.isin(np.arange(VOCAB), prompt)[None], sampling)[0]
    second = distributions(logits[:, 5], np.array([np.isin(np.arange(VOCAB), text) for text in texts]), sampling)
    joint = (first[:, None] * second).ravel()
    counts = np.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB * VOCAB)
    assert not counts[joint == 0].any()
    common = DRAWS * joint >= 10
    expected = np.append(joint[common], joint[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    assert common.sum() > 20
    assert chi_square_p(counts[expected > 0], DRAWS * expected[expected > 0]) > 1e-4


@every_way
def test_each_token_of_sampled_texts_follows_its_distribution(sampling):
    """20,000 tokens of 256 texts, whose prompts have different lengths. A token takes a part of [0, 1] as long as its
    probability, the most likely one the first part. A number drawn from the part of each token is then uniform."""
    rows, draw = 256, np.random.default_rng(0)
    new = -(-DRAWS // rows)
    prompts = [draw.integers(0, VOCAB, n).astype(np.int32) for n in draw.integers(17, 128 - new, rows)]
    texts = plain_generator(SAMPLED).continue_all(
        tiny_models.make(SAMPLED)[1], prompts, max_new_tokens=new, seed=6, sampling=sampling
    )
    logits = np.concatenate(full_pass(SAMPLED, prompts, texts))
    seen = np.concatenate([there_before(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    p, token = distributions(logits, seen, sampling), np.concatenate(texts)[:, None]
    own = np.take_along_axis(p, token, -1)[:, 0]
    assert len(own) >= DRAWS and own.min() > 0
    before = np.where(p > own[:, None], p, 0).sum(-1)
    counts = np.histogram(before + own * draw.random(len(own)), bins=100, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-4
