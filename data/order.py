"""The order of sequences: only a keyed permutation, which takes O(1) for each index.

Sequence g of a run (g counts from 0 and never resets) belongs to epoch g // n and is the window permute(g % n) of
that epoch. A balanced Feistel network with cycle walking gives a bijection on [0, n) for every n (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). So no permutation is stored, and any process can compute any sequence
at any time.
"""

import hashlib

import numpy as np

# A part of every dataset fingerprint: a change of the order changes the data. Golden vectors in tests fix the order.
VERSION = "feistel-1"
ROUNDS = 8


def derive(*parts: object) -> bytes:
    """32 bytes that depend on every part and on VERSION; they are the same on every machine and Python."""
    return hashlib.blake2b(":".join(map(str, (VERSION, *parts))).encode(), digest_size=32).digest()


def _round(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea and Flood, 2014), with a key."""
    x = half + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, *key: object) -> np.ndarray:
    """Maps indices in [0, n) to [0, n), one to one, in an order that looks random and depends on `key`.

    Args:
      index: int64 array of any shape, each in [0, n).
      n: the size of the domain, 1 <= n < 2**62.
      key: selects the permutation, for example (seed, split, epoch).

    Returns:
      int64 array of the same shape.
    """
    if not 1 <= n < 2**62:
        raise ValueError(f"the domain must have 1 to 2**62 - 1 elements, not {n}")
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.frombuffer(derive(*key) + derive(*key, "2"), dtype="<u8")[:ROUNDS].astype(np.uint64)

    def cipher(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & mask
        for k in keys:
            left, right = right, left ^ (_round(right, k) & mask)
        return (left << half_bits) | right

    index = np.asarray(index)
    x = cipher(index.astype(np.uint64).reshape(-1))  # an array: for a scalar, NumPy warns of the intended overflow
    # Cycle walking: the network permutes [0, 4**half_bits), and values outside [0, n) are permuted again. The domain
    # is smaller than 4 n (n > 1), so a few passes over fewer and fewer values suffice.
    outside = x >= np.uint64(n)
    while outside.any():
        x[outside] = cipher(x[outside])
        outside = x >= np.uint64(n)
    return x.astype(np.int64).reshape(index.shape)
