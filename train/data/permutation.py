"""Random access into shuffled orders: a permutation of [0, n) that is computed, never stored.

A Feistel network over the next even power of two at or above n, walked until it lands below n (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002, section 4), with the finaliser of splitmix64 (Steele, Lea and Flood,
2014) as round function. Integer arithmetic alone: the same on every machine and with every version of NumPy.
"""

import numpy as np

_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of `x` stirs every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*numbers: int) -> np.ndarray:
    """64 bits, uint64 [1], that depend on every one of the numbers (taken modulo 2^64) and on their order."""
    bits = np.zeros(1, np.uint64)
    for number in numbers:
        bits = mix((bits ^ np.uint64(number % (1 << 64))) + np.uint64(0x9E3779B97F4A7C15))
    return bits


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """int64, of the shape of `indices` (each in [0, size)): where the permutation named by `key` takes them."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [random_bits(*key, round_number) for round_number in range(_ROUNDS)]
    x = np.asarray(indices).astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        x[outside] = (left << shift) | right
        outside = x >= size
    return x.astype(np.int64)


def shuffled(index: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` examples stands at each global index when every pass has an order of its own: (pass, example)."""
    passes, within = np.divmod(index, size)
    chosen = np.empty_like(within)
    for number in np.unique(passes):
        here = passes == number
        chosen[here] = permute(within[here], size, seed, int(number))
    return passes, chosen
