"""The model of a kernel's time: programs cut into regions, and steps added up by hand."""

import operator

import pytest

from benchmarks import tpu, tpu_bound, tpu_grid
from benchmarks.attention_cases import Case
from benchmarks.splash import JaxSplash, Sizes, Splash
from benchmarks.tpu import Program, Region
from benchmarks.tpu_bound import Core, Operand, Step

HEAD = "MATMUL, VSTORE:SPILL\n2 1\n"


def region(length: int, start: int = 0, *, loop: bool = False, matmuls: int = 0, parts: tuple = ()) -> Region:
    return Region(start, start + length, loop, matmuls, 2 * length, 0, parts)


def test_a_program_is_cut_at_its_branches() -> None:
    lines = [
        "     0   :  { %1 = vector.op }",
        "   0x1 LB: > { %2 = scalar.op } /* Start region 7 */",
        "   0x2   : > { %3 = sbr.rel (%p1) target = $region9 }",
        "   0x3   : > { %4 = vmatmul }",
        "   0x4   : > { %5 = vmatmul }",
        "   0x5 PF: > { %6 = scalar.op } /* Start/End empty region 9 */",
        "   0x6   : > { %7 = sbr.rel (!%p2) target = $region7 }",
        "   0x7   :  { %8 = vector.op }",
    ]
    rows = ["0 0", "0 0", "0 0", "2 0", "1 1", "0 0", "0 0", "0 0"]
    body = tpu._body("= header\n" + "\n".join(lines), f"x\n{HEAD}== UTILIZATION:\n" + "\n".join(rows))
    (loop,) = body.parts
    (skipped,) = loop.parts
    assert (body.own, loop.loop, loop.own, skipped.loop, skipped.own) == (2, True, 4, False, 2)
    assert (skipped.matmuls, skipped.spills, skipped.matmul) == (3, 1, 0.75)
    assert body.bundles() == 8 and loop.bundles([10, 3]) == 10 * 4 + 3 * 2
    assert Program("kernel", body).inner == skipped


def test_processes_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """More cases than two processes have."""
    monkeypatch.setattr(tpu, "QUIET", {})
    cases = [(x, 1) for x in range(5)]
    assert tpu.in_processes(operator.add, cases, share=2) == {case: case[0] + 1 for case in cases}


def test_a_grid_is_added_up() -> None:
    step = region(40, 15, matmuls=9, parts=(region(10, 20), region(20, 30, matmuls=9)))
    program = Program("kernel", region(70, parts=(region(50, 10, loop=True, matmuls=9, parts=(step,)),)))
    operands, core = [Operand(100), Operand(400), Operand(30, written=True)], Core(1.0, 10.0, 0)
    steps = [
        Step({"start": None, "whole": None}, (0, 0, 0)),
        Step({"whole": None}, (0, 1, 0)),
        Step({"start": None}, (1, 1, 1)),
    ]
    # 20 bundles around the grid, 20 in every step; reads of 500, 400 and 100 bytes, results of 30 after the second.
    fill, first, second, third, drain = 50, max(50, 40), max(40, 10), max(30, 3), 3
    expected = 20 + fill + first + second + third + drain
    assert tpu_bound.cycles(program, ("start", "whole"), operands, steps, core) == expected
    with pytest.raises(ValueError, match="kernel has 2 regions in a step, not start"):
        tpu_bound.cycles(program, ("start",), operands, steps, core)


def test_estimates_around_the_kernels() -> None:
    within = ['{"estimated_cycles":"12"}', '{"estimated_cycles":"30"}']
    lines = ["HloModule m", '%f {"estimated_cycles":"7"}', "", "ENTRY %main {", *within]
    text = "\n".join(lines)
    assert tpu_bound.around(text) == 42
    with pytest.raises(ValueError, match="a loop outside"):
        tpu_bound.around(text + " while(x)")


@pytest.mark.parametrize(("window", "whole", "partial"), [(None, 6, 4), (1024, 0, 7)])
def test_splash_walks_what_a_mask_leaves(window: int | None, whole: int, partial: int) -> None:
    walk = Splash(Case("causal", 1, 4096, 4096, 2, 1, 128, causal=True, window=window), Sizes(1024, 1024, 512))
    _, steps = walk.forward(residuals=False)
    kinds = [name for step in steps for name in step.runs]
    assert (kinds.count("whole"), kinds.count("partial")) == (2 * whole, 2 * partial)
    assert kinds.count("init") == kinds.count("end") == 2 * 4
    _, steps = walk.backward()
    kinds = [name for step in steps for name in step.runs]
    assert (kinds.count("whole"), kinds.count("partial")) == (2 * whole, 2 * partial)
    assert kinds.count("init") == kinds.count("write") == 4


@pytest.mark.parametrize(("window", "ran", "width"), [(None, 10, 4), (1024, 7, 2)])
def test_the_splash_of_jax_has_steps_that_do_nothing(window: int | None, ran: int, width: int) -> None:
    """Forward the grid is as wide as the longest row, backward as there are blocks of queries."""
    case = Case("causal", 1, 4096, 4096, 2, 1, 128, causal=True, window=window)
    walk = JaxSplash(case, Sizes(1024, 1024, 1024))
    for steps, count, sums in ((walk.forward(True)[1], 2 * 4 * width, 8), (walk.backward()[1], 2 * 4 * 4, 4)):
        kinds = [step.runs for step in steps]
        assert len(kinds) == count and sum("run" in runs for runs in kinds) == 2 * ran
        assert sum("init" in runs for runs in kinds) == sum("end" in runs for runs in kinds) == sums


def test_the_grid_names_what_does_not_compile() -> None:
    answers = {(chip, h, "causal"): "compiles" for chip in ("v5e", "v6e") for h in tpu_grid.HEAD_DIMS}
    answers |= {("v6e", h, "causal"): "no room" for h in tpu_grid.HEAD_DIMS[1:]}
    assert tpu_grid.table(answers, ["v5e", "v6e"], ["causal"]) == [
        "| feature | v5e | v6e |",
        "|---|---|---|",
        "| causal | 64, 80, 96, 128, 256 | 64 |",
        "",
        "6 of 10 compile",
        *(f"- v6e, H = {h}, causal: no room" for h in (80, 96, 128, 256)),
    ]
