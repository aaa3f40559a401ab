"""Random numbers by index: what an example draws depends on its number and a key alone, so that nothing is rewound."""

import numpy as np

from zoo.train.data.permutation import mix, random_bits

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform(index: np.ndarray | int, count: int, *key: int) -> np.ndarray:
    """float64 in [0, 1), [*index.shape, count]: the first `count` draws of each example's own stream under `key`.

    Each stream is splitmix64 (Steele, Lea and Flood, 2014), begun at a mix of key and index; more draws of the same
    stream begin with the same ones.
    """
    start = mix(np.asarray(index, np.int64).astype(np.uint64)[..., None] ^ random_bits(*key))
    bits = mix(start + _STEP * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def below(draws: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    """int64 in [0, size), of uniform draws and a size that broadcast."""
    return np.minimum((draws * size).astype(np.int64), np.asarray(size) - 1)


def poisson(draws: np.ndarray, mean: float) -> np.ndarray:
    """int64 from the Poisson distribution, of uniform draws, by its inverse; at most 20 standard deviations above."""
    most = int(mean + 20 * mean**0.5) + 1
    shares = np.exp(-mean) * np.cumprod([1.0, *(mean / np.arange(1, most))])
    return np.searchsorted(np.cumsum(shares)[:-1], draws, side="right").astype(np.int64)
