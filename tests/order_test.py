"""The order of samples: every window once per epoch, the same order on every machine and in every version."""

import hashlib
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import order

FROZEN = (
    "the order of samples has changed: every user's run would see other data after an update, and resumed runs would "
    "repeat and skip samples. If that is meant, give order.VERSION a new value and freeze these numbers again"
)


def permutation(n: int, *key: object) -> np.ndarray:
    return order.permute(np.arange(n), n, *key)


def slow_permute(index: int, n: int, *key: object) -> int:
    """The documented algorithm, reimplemented with Python integers: no NumPy, no wrap-around, no vectorised walk."""
    text = ":".join(map(str, ("feistel-1", *key)))
    stream = b"".join(hashlib.blake2b(t.encode(), digest_size=32).digest() for t in (text, text + ":2"))
    keys = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, 64, 8)]
    bits = max(1, math.ceil((n - 1).bit_length() / 2))
    x = index
    while True:
        left, right = divmod(x, 1 << bits)
        for key_of_round in keys:
            z = (right + key_of_round) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((z ^ (z >> 31)) % (1 << bits))
        x = (left << bits) | right
        if x < n:
            return x


def test_every_small_domain_is_permuted_without_loss():
    for n in range(1, 4097):
        p = permutation(n, 5, "train", n % 7)
        assert p.min() == 0 and p.max() == n - 1 and np.bincount(p, minlength=n).max() == 1, f"n = {n}"


@pytest.mark.parametrize("k", range(1, 19))
def test_domains_around_a_power_of_two_are_permuted_without_loss(k):
    """Other libraries lose elements at 2^k + 1 for even k, for example at 65537."""
    for n in (2**k - 1, 2**k, 2**k + 1):
        for epoch in (0, 1):
            assert np.array_equal(np.sort(permutation(n, 1, "train", epoch)), np.arange(n)), f"n = {n}"


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**31))
def test_any_domain_of_any_seed_is_permuted_without_loss(n, seed, epoch):
    assert np.array_equal(np.sort(permutation(n, seed, "train", epoch)), np.arange(n))


@given(
    n=st.integers(1, 2**62 - 1),
    seed=st.integers(0, 2**32 - 1),
    wanted=st.lists(st.integers(0, 2**62), min_size=1, max_size=50),
    cuts=st.lists(st.integers(0, 50), max_size=5),
)
def test_samples_asked_for_in_any_parts_are_those_asked_for_at_once(n, seed, wanted, cuts):
    """A run that stopped at any sample, or whose batch size changed, continues in the same order."""
    index = np.array([i % n for i in wanted])
    whole = order.permute(index, n, seed, "train", 0)
    parts = [
        order.permute(part, n, seed, "train", 0) for part in np.split(index, sorted(c % (len(index) + 1) for c in cuts))
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert ((whole >= 0) & (whole < n)).all()
    assert len(np.unique(whole)) == len(np.unique(index))


GOLDEN = [
    (1, (0, "train", 0), [0]),
    (10, (0, "train", 0), [7, 8, 1, 9, 3, 5, 6, 4, 2, 0]),
    (16, (1337, "train", 0), [1, 0, 7, 4, 2, 6, 13, 10, 8, 14, 11, 3, 12, 9, 5, 15]),
    (17, (1337, "train", 0), [6, 7, 14, 5, 2, 12, 16, 9, 1, 4, 15, 0, 11, 3, 13, 8, 10]),
    (17, (1337, "train", 1), [8, 6, 1, 14, 11, 15, 10, 16, 12, 13, 0, 5, 9, 2, 3, 4, 7]),
    (17, (1337, "val", 0), [2, 4, 1, 3, 9, 12, 6, 8, 10, 7, 11, 5, 13, 14, 0, 15, 16]),
]


@pytest.mark.parametrize(("n", "key", "expected"), GOLDEN)
def test_golden_permutations(n, key, expected):
    assert permutation(n, *key).tolist() == expected, FROZEN


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (65537, [29608, 23050, 63884, 35993, 42754]),
        (10**9, [847646955, 886080089, 571789399, 438439718, 965550525]),
        (
            2**62 - 1,
            [4512957440415580528, 430204321315416360, 3116507185522444228, 1755171240826655951, 2562589579538240861],
        ),
    ],
)
def test_golden_samples_of_large_domains(n, expected):
    assert order.permute(np.array([0, 1, 2, n // 2, n - 1]), n, 1337, "train", 3).tolist() == expected, FROZEN


def test_golden_version_and_derived_bytes():
    """The phase of each epoch comes from derive, so it is part of the order too."""
    assert order.VERSION == "feistel-1", FROZEN
    expected = "e354400129886862a431791de9f034f2dbf5207b287805e409a7a238e178f342"
    assert order.derive(0, "train", "phase", 0, 0).hex() == expected, FROZEN


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 65537, 10**9 + 7, 2**40, 2**62 - 1])
def test_agrees_with_the_algorithm_written_in_plain_integers(n):
    index = sorted({0, n - 1, n // 2, n // 3, n // 7})
    for epoch in range(4):
        expected = [slow_permute(i, n, 42, "train", epoch) for i in index]
        assert order.permute(np.array(index), n, 42, "train", epoch).tolist() == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((100, "train", 0), (100, "train", 1)),
        ((100, "train", 0), (101, "train", 0)),
        ((100, "train", 0), (100, "val", 0)),
        ((100, "train", 1), (101, "train", 0)),  # a seed + epoch sum would make these the same
        ((1, "train", 11), (11, "train", 1)),
    ],
)
def test_another_epoch_seed_or_split_is_an_unrelated_order(one, other):
    n = 4096
    a, b = permutation(n, *one), permutation(n, *other)
    assert np.count_nonzero(a == b) < 10  # two random permutations agree at 1 place on average
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_order_looks_random():
    """Over 256 epochs, samples from each sixteenth of the epoch come evenly, but not too evenly, from each sixteenth
    of the data; neighbours, fixed points and repeats of the last epoch's place are as rare as by chance."""
    n, epochs = 1024, 256
    table = np.zeros((16, 16))
    neighbours = fixed = repeated = 0
    before = np.full(n, -1)
    for epoch in range(epochs):
        p = permutation(n, 7, "train", epoch)
        np.add.at(table, (np.arange(n) // 64, p // 64), 1)
        neighbours += np.count_nonzero(np.abs(np.diff(p)) == 1)
        fixed += np.count_nonzero(p == np.arange(n))
        repeated += np.count_nonzero(p == before)
        assert abs(np.corrcoef(np.arange(n), p)[0, 1]) < 0.16  # 5 standard deviations
        before = p
    expected = n * epochs / table.size
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert 225 - 6 * 21.2 < chi_square < 225 + 6 * 21.2  # 15 x 15 degrees of freedom, standard deviation 21.2
    assert 400 < neighbours < 640  # 512 expected
    assert 170 < fixed < 350 and 170 < repeated < 350  # 256 expected


@pytest.mark.parametrize("n", [2, 3, 4])
def test_tiny_domains_reach_every_order_about_equally(n):
    seeds = 2400
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(seeds):
        p = tuple(permutation(n, seed).tolist())
        counts[p] = counts.get(p, 0) + 1
    expected = seeds / math.factorial(n)
    assert len(counts) == math.factorial(n)
    assert all(abs(count - expected) < 6 * math.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("n", [2**31 + 11, 2**40 - 1, 2**61 + 1, 2**62 - 1])
def test_huge_domains_stay_in_range_and_do_not_collide(n):
    index = np.concatenate([np.arange(5000), np.arange(n - 5000, n)])
    p = order.permute(index, n, 3, "train", 0)
    assert p.dtype == np.int64 and p.min() >= 0 and p.max() < n
    assert len(np.unique(p)) == len(index)
    assert p.min() < n // 100 and p.max() > n - n // 100  # spread over the whole of the domain


@pytest.mark.parametrize("n", [5, 16, 65537])
def test_any_shape_and_integer_type_gives_the_elements_of_the_whole_permutation(n):
    """A scalar index works, too, without an overflow warning: one sample is the same as in the whole permutation."""
    whole = permutation(n, 9, "train", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in (0, 1, 3, n - 1):
            for scalar in (i, np.int64(i), np.array(i, np.int32)):
                one = order.permute(scalar, n, 9, "train", 0)
                assert np.shape(one) == () and int(one) == whole[i]
        index = np.array([[4, 0, 2], [1, 1, 3]], np.uint16)
        assert np.array_equal(order.permute(index, n, 9, "train", 0), whole[index])
        assert order.permute(np.empty((0, 3), np.int64), n, 9, "train", 0).shape == (0, 3)


def test_the_callers_array_is_left_alone():
    index = np.arange(7)
    order.permute(index, 7, 0)
    assert np.array_equal(index, np.arange(7))


@pytest.mark.parametrize("n", [0, -1, 2**62])
def test_a_domain_that_cannot_be_permuted_is_an_error(n):
    with pytest.raises(ValueError, match=str(n)):
        order.permute(np.array([0]), n, 0)
