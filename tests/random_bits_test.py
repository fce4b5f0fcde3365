"""trainer/parallel/random_bits.py: rows of random bools equal those of the whole array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.parallel.random_bits import _product, bernoulli_rows


@pytest.mark.parametrize("shape", [(8, 5), (6, 3, 7), (4, 1), (12, 2, 3, 4)])
@pytest.mark.parametrize("p", [0.1, 0.9, jnp.float32(0.5)])
def test_rows_are_those_of_the_whole(shape, p):
    key = jax.random.fold_in(jax.random.key(3), shape[0])
    whole = jax.random.bernoulli(key, p, shape)
    for rows in (1, 2, shape[0] // 2):
        for first in range(0, shape[0] - rows + 1, rows):
            part = jax.jit(bernoulli_rows, static_argnums=2)(key, p, (rows, *shape[1:]), first)
            assert np.array_equal(part, whole[first : first + rows])


def test_products_of_64_bits():
    dice = np.random.default_rng(0)
    a = dice.integers(0, 2**32, 200, dtype=np.uint64)
    for b in (1, 2**16, 2**31 + 12345, 2**32 - 1, *map(int, dice.integers(0, 2**32, 20))):
        high, low = _product(jnp.asarray(a, jnp.uint32), b)
        expected = [int(x) * b for x in a]
        assert np.array_equal(high, [x >> 32 for x in expected]) and np.array_equal(low, [x % 2**32 for x in expected])


def test_an_array_of_more_than_4_billion_elements():
    """Attention weights of a large batch are such an array. It does not fit here, so two of its rows are compared."""
    key, row = jax.random.key(1), 2**17
    part = bernoulli_rows(key, 0.5, (1, 2**16), row)
    assert not np.array_equal(part, bernoulli_rows(key, 0.5, (1, 2**16), row - 2**16)), "2**32 elements apart"
    assert abs(float(part.mean()) - 0.5) < 0.01


def test_another_generator_is_refused():
    with pytest.raises(ValueError, match="threefry"):
        bernoulli_rows(jax.random.key(0, impl="rbg"), 0.5, (1, 2), 0)
