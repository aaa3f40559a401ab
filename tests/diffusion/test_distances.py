"""Frechet and kernel distances beside scipy's square root of a matrix, closed forms and sums written out."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from zoo.diffusion.distances import DistanceError, Moments, frechet, kernel_distance, moments, squared_mmd


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated, and far from 0."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + 100


def test_moments_of_batches_are_those_of_all() -> None:
    x = features(101, 7) + 1e6
    found = moments(np.split(x, [1, 40, 97]))
    assert found.count == 101
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-9)


@pytest.mark.parametrize(("count", "other"), [(200, 100), (200, 12), (9, 12)])
def test_frechet_distance_is_that_of_the_square_root(count: int, other: int) -> None:
    """Also of fewer images than features, where scipy's root of the singular product has some six digits."""
    a, b = moments([features(count, 20)]), moments([features(other, 20, seed=1)])
    root = sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10 if min(count, other) > 20 else 1e-5)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-12)


def test_frechet_distance_of_gaussians_along_the_axes() -> None:
    rng = np.random.default_rng(0)
    means, deviations = rng.standard_normal((2, 30)), rng.uniform(0, 3, (2, 30))
    deviations[0, :10], deviations[1, 5:15] = 0, 0
    a, b = (Moments(99, mean, np.diag(s**2)) for mean, s in zip(means, deviations, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [20, 500])
def test_a_set_is_at_no_distance_from_itself(count: int) -> None:
    own = moments([features(count, 64)])
    assert abs(frechet(own, own)) < 1e-11 * np.trace(own.covariance)
    alike = Moments(count, own.mean, np.zeros((64, 64)))
    assert frechet(own, alike) == pytest.approx(np.trace(own.covariance), rel=1e-12)


def test_kernel_distance_is_its_sums() -> None:
    a, b = features(7, 3) / 100, features(9, 3, seed=1) / 100

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    expected = sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / (7 * 9)
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_has_no_bias_and_frechet_distance_has() -> None:
    """Of halves of one distribution: the mean of many estimates is 0 to within its error, at any size."""
    rng = np.random.default_rng(0)
    pairs = [rng.standard_normal((2, 20, 4)) for _ in range(400)]
    found = np.array([squared_mmd(a, b) for a, b in pairs])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert min(frechet(moments([a]), moments([b])) for a, b in pairs) > 0


def test_subsets_agree_with_the_whole_and_tell_their_deviation() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((400, 8)), rng.standard_normal((300, 8)) + 0.5
    found = kernel_distance(a, b, subsets=50, size=100)
    assert found.size == 100 and kernel_distance(a, b, subsets=2).size == 150
    assert found.value == pytest.approx(squared_mmd(a, b), abs=4 * found.deviation / np.sqrt(50))
    assert found.deviation > 0
    assert kernel_distance(a, b, subsets=50, size=100) == found != kernel_distance(a, b, subsets=50, size=100, seed=1)


def test_what_has_no_distance_is_refused() -> None:
    one, wide = moments([features(9, 2)]), moments([features(9, 3)])
    with pytest.raises(DistanceError, match="of 2 and of 3 numbers"):
        frechet(one, wide)
    with pytest.raises(DistanceError, match="of 2 and of 3 numbers"):
        kernel_distance(features(9, 2), features(9, 3))
    with pytest.raises(DistanceError, match="1 images have no covariance"):
        moments([features(1, 2)])
    with pytest.raises(DistanceError, match="9 and 3 images have no kernel distance"):
        kernel_distance(features(9, 2), features(3, 2))
    with pytest.raises(DistanceError, match="features of 1 of 9 images are not finite"):
        moments([np.where(np.arange(9)[:, None] == 4, np.nan, features(9, 2))])
    with pytest.raises(DistanceError, match=r"of shape \(9,\) are none"):
        moments([np.zeros(9)])
