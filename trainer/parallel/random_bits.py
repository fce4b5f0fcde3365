"""Random bools for some rows of an array: the same bools as if those of the whole array had been made."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p


def bernoulli_rows(key: Array, p: Array | float, shape: tuple[int, ...], first: Array | int) -> Array:
    """`jax.random.bernoulli(key, p, (n, *shape[1:]))[first : first + shape[0]]` for any n. Computes only these rows.

    With JAX's threefry (partitionable, as launch/environment.py sets it) the bits of an element depend only on the
    key and on its index.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError("dropout on several replicas needs JAX's threefry2x32, its default")
    size = math.prod(shape[1:])
    high, low = _product(jnp.uint32(first) + jnp.arange(shape[0], dtype=jnp.uint32), size)
    within = jnp.arange(size, dtype=jnp.uint32)[None]
    low = low[:, None] + within
    high = high[:, None] + (low < within).astype(jnp.uint32)
    bits = jnp.bitwise_xor(*threefry2x32_p.bind(*jax.random.key_data(key), high, low))
    # As jax.random.uniform does it: 23 bits are the fraction of a float32 in [1, 2).
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
    return (uniform < p).reshape(shape)


def _product(a: Array, b: int) -> tuple[Array, Array]:
    """The high and the low 32 bits of a * b, both below 2**32."""
    half = 0xFFFF
    b_low, b_high = jnp.uint32(b & half), jnp.uint32(b >> 16)
    low, high = (a & half) * b_low, (a >> 16) * b_high
    first, second = (a & half) * b_high, (a >> 16) * b_low
    middle = (low >> 16) + (first & half) + (second & half)
    return high + (first >> 16) + (second >> 16) + (middle >> 16), (low & half) | (middle << 16)
