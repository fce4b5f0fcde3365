"""Scores of continuations are those of the model in plain NumPy, in any batch and on any mesh."""

import math

import jax
import numpy as np
import pytest
import reference
import tiny_models

from data.errors import DataError
from tests.step_test import config
from trainer import sharding
from trainer.config import Config
from trainer.state import Program
from trainer.tasks.scorer import Pair, Scorer

LONGEST, VOCAB = 160, 50
MESHES = {  # sizes of data, fsdp, context, tensor
    "one": (1, 1, 1, 1), "data": (3, 1, 1, 1), "data x fsdp x tensor": (2, 2, 1, 2), "fsdp x context": (1, 2, 2, 1),
    "data x context x tensor": (2, 1, 2, 2),
}  # fmt: skip


def scorer_config(**top) -> Config:
    """A model that reads 160 tokens, which was trained on 32."""
    model = {"vocab_size": VOCAB, "max_seq_len": LONGEST, "num_layers": 1, "tie_embeddings": False}
    return config(global_batch_size=4, model=model, **top)


def scorer(mesh: str, cfg: Config) -> tuple[Scorer, dict]:
    sizes = dict(zip(sharding.MESH_AXES, MESHES[mesh], strict=True))
    program = Program(cfg, sharding.mesh_of(sizes, jax.devices()[: math.prod(MESHES[mesh])]))
    params = tiny_models.random_params(cfg.model)
    return Scorer(program), jax.tree.map(lambda p, like: jax.device_put(p, like.sharding), params, program.params)


def by_definition(cfg: Config, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The score in float64, of the last 161 tokens."""
    tokens = np.array([*context, *continuation])[-(LONGEST + 1) :]
    logits = reference.forward(tiny_models.random_params(cfg.model), cfg.model, tokens[None, :-1])[0]
    targets, logits = tokens[-len(continuation) :], logits[-len(continuation) :]
    probability = reference.softmax(logits)[np.arange(len(targets)), targets]
    return float(np.log(probability).sum()), bool((logits.argmax(-1) == targets).all())


def greedy(cfg: Config, context: list[int], length: int) -> list[int]:
    tokens = list(context)
    for _ in range(length):
        logits = reference.forward(tiny_models.random_params(cfg.model), cfg.model, np.array([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(context) :]


def random_pairs(cfg: Config) -> list[Pair]:
    """Pairs of all buckets, of which some are greedy, and one is longer than the context."""
    draw = np.random.default_rng(0)
    lengths = [(1, 1), (1, 5), (5, 3), (63, 1), (60, 5), (64, 1), (64, 2), (100, 29), (131, 29), (132, 29), (150, 40)]
    pairs = [tuple(draw.integers(0, VOCAB, n).tolist() for n in lengths) for lengths in lengths]
    context = draw.integers(0, VOCAB, 7).tolist()
    right = greedy(cfg, context, 3)
    return [*pairs, (context, right), (context, right[:1]), (context, [*right[:2], (right[2] + 1) % VOCAB])]


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_are_those_of_the_reference_on_every_mesh(mesh):
    cfg = scorer_config()
    pairs = random_pairs(cfg)
    here, params = scorer(mesh, cfg)
    with jax.set_mesh(here.program.mesh):
        found = here.score(params, pairs)
    expected = [by_definition(cfg, *pair) for pair in pairs]
    np.testing.assert_allclose([s.logprob for s in found], [logprob for logprob, _ in expected], rtol=2e-5)
    assert [s.greedy for s in found] == [is_greedy for _, is_greedy in expected]
    assert [s.greedy for s in found[-3:]] == [True, True, False]
    assert [s.length for s in found] == [len(continuation) for _, continuation in pairs]


def test_a_score_does_not_depend_on_the_other_rows():
    cfg = scorer_config()
    pairs = random_pairs(cfg) * 3
    here, params = scorer("one", cfg)
    together = here.score(params, pairs)
    for i in (0, 6, 20):
        (one,) = here.score(params, [pairs[i]])
        assert one == pytest.approx(together[i], rel=1e-5)
    assert here.score(params, []) == []


def test_a_batch_is_not_larger_than_that_of_training():
    """4 rows of 32 tokens are 2 rows of 64; a longer row is a batch."""
    here, _ = scorer("one", scorer_config())
    assert [here._rows(length, 100) for length in (64, 128, 160)] == [2, 1, 1]
    wide, _ = scorer("data", scorer_config())
    assert wide._rows(64, 100) == 3


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([1], [VOCAB]), "token 50 is outside the model's vocabulary of 50"),
        (([-1], [1]), "token -1 is outside"),
        (([], [1]), "there must be a first token"),
        (([1], [1] * 161), "a continuation of 161 tokens is longer than the model's context of 160"),
    ],
)
def test_what_a_model_cannot_score_is_an_error(pair, said):
    here, params = scorer("one", scorer_config())
    with pytest.raises(DataError, match=said):
        here.score(params, [pair])
