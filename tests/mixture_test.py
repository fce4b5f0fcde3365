"""A mixture has exact counts, no sample twice or left out, and the same order whichever sample a run starts at."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import mixture
from data.errors import DataError
from data.mixture import BLOCK, Mixture, Stage, parse_stages

STAGED = parse_stages("0:0.7,0.3,0; 5000:0.25,0.25,0.5; 5001:0,0,1; 20000:1,1,1", 3)


def locate(stages, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return Mixture(stages, seed).locate(np.arange(samples))


def test_every_block_holds_exact_counts():
    source, _ = locate(parse_stages("0.5,0.3,0.2", 3), 10 * BLOCK)
    for block in source.reshape(10, BLOCK):
        assert np.bincount(block).tolist() == [1024, 614, 410]
    assert not np.array_equal(source[:BLOCK], source[BLOCK : 2 * BLOCK])  # each block has its own order


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1, 1, 1), [683, 683, 682]),  # the first sources win a tie
        ((1, 2047), [1, 2047]),
        ((0.0005, 1), [1, 2047]),  # the first source's share of 2048 samples is 1.02
        ((0.0004, 1), [1, 2047]),  # its share is 0.82: rounding down would leave it no sample
        ((0, 3), [0, 2048]),
        ((1e-300, 1e-300), [1024, 1024]),
    ],
)
def test_counts_are_rounded_by_largest_remainder(weights, counts):
    assert Mixture([Stage(0, weights)], 0).counts[0].tolist() == counts


def assert_each_source_is_consumed_in_order(source, index, num_sources):
    for s in range(num_sources):
        assert np.array_equal(index[source == s], np.arange((source == s).sum()))


def test_each_source_is_consumed_in_its_own_order_through_all_stages():
    source, index = locate(STAGED, 30_000)
    assert_each_source_is_consumed_in_order(source, index, 3)
    assert set(source[:5000]) == {0, 1} and set(source[5001:20_000]) == {2}


@settings(max_examples=50, deadline=None)
@given(
    starts=st.lists(st.integers(1, 3 * BLOCK), max_size=3, unique=True).map(sorted),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_stages(starts, data, seed):
    """No sample is skipped or repeated, whatever the weights and starts of stages; `consumed` counts the samples."""
    num_sources = data.draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 20), min_size=num_sources, max_size=num_sources).filter(any)
    stages = [Stage(start, tuple(map(float, data.draw(weights)))) for start in (0, *starts)]
    mixed = Mixture(stages, seed)
    samples = 4 * BLOCK
    source, index = mixed.locate(np.arange(samples))
    assert_each_source_is_consumed_in_order(source, index, num_sources)
    for upto in {*starts, data.draw(st.integers(0, samples)), samples}:
        assert np.array_equal(mixed.consumed(upto), np.bincount(source[:upto], minlength=num_sources))
    picked = np.array(data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=50)))
    again = Mixture(stages, seed).locate(picked)  # any samples, in any order, from a new Mixture
    assert np.array_equal(again[0], source[picked]) and np.array_equal(again[1], index[picked])


def test_a_later_stage_changes_nothing_before_it():
    before = parse_stages("0.7,0.3", 2)
    after = parse_stages("0:0.7,0.3; 3000:0.1,0.9", 2)
    old, new = locate(before, 6000), locate(after, 6000)
    for a, b in zip(old, new, strict=True):
        assert np.array_equal(a[:3000], b[:3000])
    assert (new[0][3000:] == 1).mean() == pytest.approx(0.9, abs=0.03)


def test_seeds_give_other_orders():
    stages = parse_stages("1,1", 2)
    assert not np.array_equal(locate(stages, BLOCK, seed=0)[0], locate(stages, BLOCK, seed=1)[0])


def test_golden_values():
    """If these values change, every run that resumes gets another mixture: raise mixture.VERSION."""
    source, index = locate(STAGED, 25_000, seed=7)
    at = [0, 1, 2, 3, 4999, 5000, 5001, 20_000, 20_001, 24_999]
    assert source[at].tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert index[at].tolist() == [0, 1, 2, 3, 3513, 1486, 0, 3514, 3515, 16662]


def test_one_source_is_itself():
    source, index = locate(parse_stages("", 1), 10)
    assert not source.any() and index.tolist() == list(range(10))
    assert Mixture(parse_stages("", 1), 0).consumed(12_345).tolist() == [12_345]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.7,x", ["'0.7,x'", "0.7,0.3"]),
        ("0.7", ["1 weights", "2 sources"]),
        ("0.5,0.5; 100:1,1,1", ["3 weights from sequence 100", "2 sources"]),
        ("-1,2", ["0 or above"]),
        ("0,0", ["one above 0"]),
        ("nan,1", ["0 or above"]),
        ("inf,1", ["0 or above"]),
        ("1e308,1e308", ["their sum finite"]),
        ("1.7e308,0; 9:1,1.79e308", ["less than one of the 2048"]),
        ("1,1; 9:1.79e308,1e307", ["their sum finite"]),
        ("0.0001,1", ["less than one of the 2048", "at least 0.00049"]),
        ("10:1,1", ["stages from sequences [10]", "the first must be 0"]),
        ("0:1,1; 0:1,2", ["[0, 0]"]),
        ("0:1,1; 9:1,2; 5:1,1", ["[0, 9, 5]"]),
        ("x:1,1", ["'x:1,1'"]),
        ("-5:1,1", ["[-5]"]),
    ],
)
def test_weights_that_cannot_be_followed(text, parts):
    with pytest.raises(ValueError, match=r"data\.weights") as e:
        parse_stages(text, 2)
    for part in parts:
        assert part in str(e.value)


def test_weights_may_change_from_a_sample_on_that_was_not_trained_on():
    old = parse_stages("0:0.7,0.3; 1000:1,1", 2)
    for new in ("0:0.7,0.3; 1000:1,1; 2000:0,1", "0:0.7,0.3; 1000:1,1; 1500:0,1; 9000:1,0"):
        mixture.check_change(old, parse_stages(new, 2), 1500)
    mixture.check_change(old, parse_stages("0.7,0.3", 2), 1000)  # the stage that starts at 1000 had not begun
    for new in ("0.6,0.4", "0:0.7,0.3; 1000:1,1; 1499:0,1", "0.7,0.3", "0:0.7,0.3; 1000:1,2"):
        with pytest.raises(DataError, match=r"0:0\.7,0\.3; 1000:1,1.*sequence 1500 or later"):
            mixture.check_change(old, parse_stages(new, 2), 1500)
