import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.permutation import permute, random_bits, shuffled


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_of_a_thousand_billion_indices():
    size = 10**12 + 7
    indices = np.random.default_rng(0).integers(0, size, 100_000)
    places = permute(indices, size, 1)
    assert places.min() >= 0 and places.max() < size
    assert len(np.unique(places)) == len(np.unique(indices))


def test_every_place_is_equally_likely():
    """Chi-squared over keys: where index i lands, for all i; 4 standard deviations of its distribution."""
    size, keys = 12, 3000
    landed = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    for i in range(size):
        counts = np.bincount(landed[:, i], minlength=size)
        statistic = ((counts - keys / size) ** 2 / (keys / size)).sum()
        assert statistic < (size - 1) + 4 * np.sqrt(2 * (size - 1))


def test_neighbours_part():
    """After the shuffle, neighbours stand as far apart as two random places do: a third of the size on average."""
    size = 10_000
    apart = np.abs(np.diff(permute(np.arange(size), size, 5))).mean() / size
    assert abs(apart - 1 / 3) < 0.01


def test_passes_have_orders_of_their_own():
    passes, places = shuffled(np.arange(300), 100, seed=0)
    assert passes.tolist() == [0] * 100 + [1] * 100 + [2] * 100
    orders = places.reshape(3, 100)
    assert all(sorted(order) == list(range(100)) for order in orders.tolist())
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_the_order_is_the_same_for_ever():
    """A run resumed with a newer NumPy, or on another machine, goes on in the order that it began with."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [2, 0, 7, 8, 1, 3, 4, 5, 6, 9]
    assert int(random_bits(1, 2)[0]) == 13608149317741381227
