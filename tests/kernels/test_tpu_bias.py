"""What the TPU kernels can know of a bias of distances: whether positions leave it one."""

import numpy as np
import pytest

from zoo.kernels import Mask, tpu_bias
from zoo.kernels.mask import resolve

DOCUMENTS = np.array([[1] * 7 + [2] * 9, [3] * 2 + [1] * 10 + [0] * 4])
ANEW = np.array([[*range(7), *range(9)], [*range(2), *range(10), 5, 5, 5, 5]])


@pytest.mark.parametrize(
    ("mask", "kept", "apart"),
    [
        (Mask(), True, [0]),
        (Mask(positions=np.arange(16) + 5), True, [0]),
        (Mask(positions=(np.arange(16) + 100, np.arange(16))), True, [-100]),
        (Mask(segments=DOCUMENTS, positions=ANEW), True, [0, 0]),
        (Mask(segments=(DOCUMENTS, DOCUMENTS), positions=(ANEW + 3, ANEW)), True, [-3, -3]),
        (Mask(positions=ANEW), False, None),
        (Mask(positions=np.arange(16)[::-1]), False, None),
        (Mask(positions=(np.arange(16), 2 * np.arange(16))), False, None),
        (Mask(segments=DOCUMENTS, positions=(ANEW, ANEW + 2 * (DOCUMENTS == 1))), False, None),
        (Mask(lengths=[9, 9], positions=(np.arange(16), np.minimum(np.arange(16), 8))), True, [0, 0]),
    ],
)
def test_keeps_distance(mask: Mask, kept: bool, apart: list[int] | None) -> None:
    resolved = resolve(mask, 2, 16, 16)
    assert bool(tpu_bias.keeps_distance(resolved)) == kept
    if apart is not None:
        assert tpu_bias.apart(resolved)[:, 0].tolist() == apart
