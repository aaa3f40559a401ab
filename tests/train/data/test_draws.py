"""Draws by index: their distributions, and that an example's are its own."""

import math

import numpy as np
import pytest

from zoo.train.data.draws import below, poisson, uniform


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_an_examples_draws_are_its_own() -> None:
    whole = uniform(np.arange(10), 7, 3, 1)
    np.testing.assert_array_equal(uniform(np.array([8, 2]), 7, 3, 1), whole[[8, 2]])
    np.testing.assert_array_equal(uniform(8, 5, 3, 1), whole[8, :5])
    for other in (uniform(np.arange(10), 7, 4, 1), uniform(np.arange(10), 7, 3, 2)):
        assert not np.isin(other, whole).any()
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("axis", ["along a stream", "across examples"])
def test_draws_are_uniform_and_independent(axis: str) -> None:
    draws = uniform(0, 20_000, 5) if axis == "along a stream" else uniform(np.arange(20_000), 1, 5)[:, 0]
    cells = below(draws, 10)
    pairs = 10 * cells[:-1] + cells[1:]
    # 9 and 99 degrees of freedom: mean 9 and 99, standard deviation 4.2 and 14.
    assert chi_square(np.bincount(cells, minlength=10), 2000) < 30
    assert chi_square(np.bincount(pairs, minlength=100), 199.99) < 160


def test_poisson() -> None:
    drawn = poisson(uniform(1, 50_000, 2), 3.0)
    expected = 50_000 * np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(9)])
    # 8 degrees of freedom.
    assert chi_square(np.bincount(drawn)[:9], expected) < 30
    assert drawn.mean() == pytest.approx(3.0, abs=0.05) and drawn.var() == pytest.approx(3.0, abs=0.15)
    assert poisson(np.array([0.0, 1 - 2**-53]), 3.0).tolist()[0] == 0
