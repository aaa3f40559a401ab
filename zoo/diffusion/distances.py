"""How far apart two sets of images are, by the features [N, D] that a network has of them. All of it is float64.

The Frechet distance (Heusel et al. 2017, arXiv 1706.08500; of Inception's features it is the FID) compares means and
covariances. What it is expected to be falls with N, so that only distances of equally many images compare. The kernel
distance (KID; Binkowski et al. 2018, arXiv 1801.01401) has an unbiased estimate, which may be below 0.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

SUBSETS, SUBSET = 100, 1000
"""Subsets that a kernel distance is averaged over, and how many features of each set are in one."""


class DistanceError(ValueError):
    """Features that have no distance; the message says why."""


class Moments(NamedTuple):
    """count, mean [D] and covariance [D, D] (over count - 1) of features."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(batches: Iterable[Any]) -> Moments:
    """Of features that come in batches [n, D], one of which is held at a time; raises DistanceError.

    Batches are merged by their own means (Chan et al. 1979), so that features far from 0 cost no digits.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        batch = _checked(batch).astype(np.float64)
        own = batch.mean(0)
        centred, shift = batch - own, own - mean
        total = count + len(batch)
        scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (count * len(batch) / total)
        mean = mean + shift * (len(batch) / total)
        count = total
    if count < 2:
        raise DistanceError(f"{count} images have no covariance: give 2 or more")
    return Moments(count, mean, scatter / (count - 1))


def frechet(a: Moments, b: Moments) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), of covariances A and B; raises DistanceError.

    With roots A = R R^T and B = S S^T, tr (A B)^(1/2) is the sum of the singular values of R^T S: all digits stay
    where a covariance is singular, which it is of no more images than features.
    """
    if a.mean.shape != b.mean.shape:
        raise DistanceError(f"features of {a.mean.size} and of {b.mean.size} numbers have no distance: use one network")
    between = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    squares = np.square(a.mean - b.mean).sum()
    return float(squares + np.trace(a.covariance) + np.trace(b.covariance) - 2 * between)


def _root(covariance: np.ndarray) -> np.ndarray:
    """[D, rank], whose product with its own transpose is the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


class KernelDistance(NamedTuple):
    """value: the mean of estimates from subsets.  deviation: of one such estimate.  size: images of a subset."""

    value: float
    deviation: float
    size: int


def kernel_distance(a: Any, b: Any, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0) -> KernelDistance:
    """The KID of features [N, D] and [M, D]: `squared_mmd` of subsets drawn by `seed`; raises DistanceError.

    size: of a subset, at most; half of the smaller set where that is less, so that subsets do differ.
    """
    a, b = _checked(a), _checked(b)
    size = min(size, len(a) // 2, len(b) // 2)
    if size < 2:
        raise DistanceError(f"{len(a)} and {len(b)} images have no kernel distance: give 4 or more of each")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        of_a, of_b = (features[rng.choice(len(features), size, replace=False)] for features in (a, b))
        found.append(squared_mmd(of_a, of_b))
    return KernelDistance(float(np.mean(found)), float(np.std(found)), size)


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012) of features [N, D], [M, D].

    Its kernel is (x.y / D + 1)^3.
    """
    if a.shape[1] != b.shape[1]:
        raise DistanceError(f"features of {a.shape[1]} and of {b.shape[1]} numbers have no distance: use one network")
    return float(_mean_within(a) + _mean_within(b) - 2 * _kernel(a, b).mean())


def _mean_within(features: np.ndarray) -> float:
    """The mean kernel of two different rows."""
    values, count = _kernel(features, features), len(features)
    return (values.sum() - np.trace(values)) / (count * (count - 1))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = a.astype(np.float64) @ b.T.astype(np.float64) / a.shape[1] + 1
    return products * products * products


def _checked(features: Any) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise DistanceError(f"features of shape {features.shape} are none: give [images, numbers of each]")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(1).sum())
        raise DistanceError(f"features of {bad} of {len(features)} images are not finite: nothing is near to them")
    return features
