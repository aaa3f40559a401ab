"""The TPU kernels compiled for chips that are not there: whether they compile, what they hold, their schedules."""

import importlib.util

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs the extra `aot`", allow_module_level=True)

from benchmarks import attention_memory, schedule, tpu, tpu_grid

tpu.prepare()


@pytest.mark.parametrize(
    ("chip", "head_dim", "feature"),
    [
        ("v5e", 64, "causal"),
        ("v5p", 80, "segments"),
        ("v6e", 96, "lengths"),
        ("v6e", 128, "all"),
        ("v5e", 256, "odd_lengths"),
        ("v6e", 256, "float32"),
    ],
)
def test_compiles(chip: str, head_dim: int, feature: str) -> None:
    assert tpu_grid.compiles(chip, head_dim, feature) == "compiles"


def test_temporaries_beside_splash() -> None:
    """Splash attention takes 193 MiB for 8 heads of 128 at 32k; here the values' transposed copy is nearly all."""
    assert attention_memory.tpu_temporaries("v5e", 32768) < 70 * 2**20


def test_schedules() -> None:
    """Bundles per 512 x 512 scores; the best of jax and tokamax: 1051, 931, 2227 on v5e and 624, 534, 1340 on v6e."""
    limits = {
        ("v5e", "forward"): 1000,
        ("v5e", "forward, logits bounded"): 900,
        ("v5e", "backward"): 2180,
        ("v6e", "forward"): 560,
        ("v6e", "forward, logits bounded"): 500,
        ("v6e", "backward"): 1320,
    }
    cases = [("flaxzoo", which, chip) for chip, which in limits]
    figures = tpu.in_processes(schedule.measure, cases, share=1)
    found = {(chip, which): one.bundles for (_, which, chip), one in figures.items()}
    assert {case: bundles for case, bundles in found.items() if bundles > limits[case]} == {}
