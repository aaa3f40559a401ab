import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.splits import UndividedText, check_fraction, content_hash, held_out
from zoo.train.experiment import UserError


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 100)), min_size=1, max_size=60))
def test_equal_examples_stay_on_one_side(examples):
    hashes, sizes = np.array(examples).T
    mask = held_out(hashes, sizes, 0.2)
    for value in np.unique(hashes):
        assert len(np.unique(mask[hashes == value])) == 1
    several = len(np.unique(hashes)) > 1
    assert mask.any() == several and not mask.all()


def test_about_the_fraction_is_held_out():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 5000)
    mask = held_out(rng.integers(0, 2**63, 5000), sizes, 0.1)
    assert 0.098 < sizes[mask].sum() / sizes.sum() <= 0.1


def test_the_smallest_is_held_out_where_none_fits():
    assert held_out([1, 2, 3], [50, 40, 60], 0.1).tolist() == [False, True, False]


def test_the_choice_does_not_depend_on_order():
    texts = [f"document {i}" * (i % 7 + 1) for i in range(50)]
    one = set(UndividedText(lambda: iter(texts), 0.2).examples("validation"))
    other = set(UndividedText(lambda: iter(texts[::-1]), 0.2).examples("validation"))
    assert one == other and one


def test_every_document_is_in_one_split():
    texts = [f"document {i}" for i in range(30)]
    undivided = UndividedText(lambda: iter(texts), 0.2)
    train, validation = list(undivided.examples("train")), list(undivided.examples("validation"))
    assert sorted(train + validation) == sorted(texts) and len(validation) == 6


def test_a_single_document_is_cut_after_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    undivided = UndividedText(lambda: iter([text]), 0.1)
    (train,), (validation,) = undivided.examples("train"), undivided.examples("validation")
    assert train + validation == text
    assert train.endswith("\n") and 0.09 < len(validation) / len(text) < 0.12


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 7])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        check_fraction(fraction)


def test_content_hash_is_of_the_utf8_bytes():
    assert content_hash("é") == content_hash("é".encode())
