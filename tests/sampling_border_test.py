"""filter_logits at its exact borders: which token is the last that is kept.

Probabilities are powers of two, so that their sums are exact and can equal top_p.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.sampling import filter_logits

PROBABILITIES = np.array([1 / 4, 1 / 16, 1 / 2, 1 / 8, 1 / 16], np.float32)
LOGITS = jnp.log(PROBABILITIES)


def kept(**options) -> list[int]:
    """The tokens that can be sampled, the most likely first."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    filtered = np.asarray(filter_logits(LOGITS, **defaults | options))
    return [int(i) for i in np.argsort(-filtered, kind="stable") if np.isfinite(filtered[i])]


def test_the_probabilities_are_exact():
    """The tests below rely on exact probabilities: with a rounding error, no sum would equal top_p."""
    descending = jax.nn.softmax(-jnp.sort(-LOGITS))
    assert descending.tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    assert jnp.cumsum(descending).tolist() == [1 / 2, 3 / 4, 7 / 8, 15 / 16, 1]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.5, [2]), (0.75, [2, 0]), (0.875, [2, 0, 3]), (0.9375, [2, 0, 3, 1, 4]), (0.0, [2])],
)
def test_tokens_that_reach_top_p_exactly_are_enough(top_p, expected):
    """The smallest set whose probabilities reach p is kept: a token is left out if the sum before it equals p."""
    assert kept(top_p=top_p) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, [2, 0]), (0.75, [2, 0, 3]), (0.875, [2, 0, 3, 1, 4])])
def test_anything_above_takes_one_token_more(top_p, expected):
    """If two tokens are equally likely, both are kept."""
    assert kept(top_p=float(np.nextafter(np.float32(top_p), np.float32(1)))) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, [2]), (0.75, [2, 0]), (0.875, [2, 0, 3])])
def test_anything_below_takes_no_token_less(top_p, expected):
    assert kept(top_p=float(np.nextafter(np.float32(top_p), np.float32(0)))) == expected


@pytest.mark.parametrize(("top_k", "expected"), [(1, [2]), (2, [2, 0]), (3, [2, 0, 3]), (4, [2, 0, 3, 1, 4])])
def test_top_k_keeps_its_last_token_and_those_as_likely(top_k, expected):
    assert kept(top_k=top_k) == expected


@pytest.mark.parametrize("top_k", [0, 5, 6])
def test_top_k_of_0_or_of_all_keeps_all(top_k):
    assert kept(top_k=top_k) == [2, 0, 3, 1, 4]


def test_top_p_is_of_what_top_k_leaves():
    """Among the two most likely tokens, the first has a probability of 2/3."""
    assert kept(top_k=2, top_p=0.6) == [2] and kept(top_p=0.6) == [2, 0]
    assert kept(top_k=2, top_p=0.7) == [2, 0]


def test_top_p_is_of_what_temperature_makes():
    """At temperature 1/2 probabilities are squared: 64, 16, 4, 1 and 1 of 86; the first is 0.74."""
    assert kept(temperature=0.5, top_p=0.6) == [2] and kept(temperature=2.0, top_p=0.5) == [2, 0]


@pytest.mark.parametrize("rows", [1, 3])
def test_each_row_has_its_own_border(rows):
    logits = jnp.stack([jnp.roll(LOGITS, i) for i in range(rows)])
    found = np.isfinite(filter_logits(logits, temperature=1.0, top_k=0, top_p=0.75))
    assert np.array_equal(found, [np.roll(PROBABILITIES >= 1 / 4, i) for i in range(rows)])
