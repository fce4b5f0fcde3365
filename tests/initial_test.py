"""Where the weights of a run come from, and the rows for tokens that the weights do not have."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from model.config import ModelConfig
from model.generate import Generator
from model.sampling import Sampling
from trainer.interchange.initial import _with_rows, place_of

MODEL = ModelConfig(vocab_size=70, max_seq_len=16, embed_dim=8, num_heads=2, num_layers=1, tie_embeddings=False)


def test_a_place_is_a_folder_or_a_run_and_a_step(tmp_path):
    (tmp_path / "run:12").mkdir()
    assert place_of(f"{tmp_path}/run") == (tmp_path / "run", None)
    assert place_of(f"{tmp_path}/run:3") == (tmp_path / "run", 3)
    assert place_of(f"{tmp_path}/run:12") == (tmp_path / "run:12", None)  # a folder has this name
    assert place_of("a:b") == (pathlib.Path.cwd() / "a:b", None)


@pytest.mark.parametrize(
    ("rows", "known", "tokens", "vocab"),
    [
        (64, 50, 50, 50),  # there are no new tokens
        (64, 50, 53, 53),  # the new tokens fit in the padding
        (64, 50, 70, 70),  # the padding is too small: 128 rows
        (128, 60, 63, 70),  # new tokens take spare rows of the weights; other spare rows stay
    ],
)
def test_new_tokens_get_the_mean_of_the_known_rows(rows, known, tokens, vocab):
    model = dataclasses.replace(MODEL, vocab_size=vocab)
    table = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    params = {"embedding": jnp.asarray(table), "head": {"kernel": jnp.asarray(table.T)}, "norm": {"scale": jnp.ones(8)}}
    fitted = _with_rows(params, range(known, tokens), model)
    for got in (fitted["embedding"], fitted["head"]["kernel"].T):
        assert got.shape == (model.padded_vocab_size, 8)
        np.testing.assert_array_equal(got[:known], table[:known])
        mean = table[:known].mean(0)
        np.testing.assert_allclose(got[known:tokens], np.broadcast_to(mean, (tokens - known, 8)), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got[tokens : min(rows, vocab)], table[tokens : min(rows, vocab)])
    np.testing.assert_array_equal(fitted["norm"]["scale"], 1)


def test_rows_without_a_token_are_never_sampled():
    """The tokenizer has 20 of the 70 tokens of the model: only these are sampled."""
    apply, params = tiny_models.make(MODEL)
    generator = Generator(MODEL, apply, context=16, vocab_size=20)
    ids = generator(params, np.array([1, 2]), rows=64, max_new_tokens=8, sampling=Sampling(temperature=3.0))
    assert ids.max() < 20 and len(np.unique(ids)) == 20
