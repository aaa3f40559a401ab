"""Choosing block sizes: what is tried, how it is called, and that what is written is what the kernels read."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import autotune
from benchmarks.attention_cases import draw
from benchmarks.autotune import Setting
from zoo.kernels import AttentionError, reference, tpu_blocks
from zoo.kernels.problem import build
from zoo.kernels.tpu_blocks import Blocks

SMALL = Blocks(128, 128, 128, 128)


@pytest.mark.parametrize("direction", autotune.DIRECTIONS)
def test_candidates_are_blocks_that_a_file_may_name(direction: str) -> None:
    tried = autotune.candidates(direction, 2048)
    assert len(set(tried)) == len(tried) > 20
    for blocks in tried:
        tpu_blocks._checked("here", {"direction": direction} | blocks._asdict())
    assert all(max(blocks.queries, blocks.keys) <= 512 for blocks in autotune.candidates(direction, 512))
    assert {blocks.queries for blocks in autotune.candidates(direction, 1500)} <= {256, 512, 768}


def test_the_blocks_of_now_stay_where_little_is_won() -> None:
    other = SMALL._replace(keys=256)
    assert autotune.best_of({SMALL: 1.0, other: 0.98}, SMALL) == SMALL
    assert autotune.best_of({SMALL: 1.0, other: 0.9}, SMALL) == other
    assert autotune.best_of({other: 2.0}, SMALL) == other
    assert autotune.best_of({SMALL: "too large", other: 2.0}, SMALL) == other
    assert autotune.best_of({SMALL: "too large"}, SMALL) is None


class Refusals(dict):
    def __missing__(self, key: Any) -> str:
        return "too large"


def test_nothing_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blocks.json"
    arguments = ["--compile-for", "v5e", "--lengths", "512", "--head-dims", "64", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["autotune", *arguments])
    monkeypatch.setattr(autotune, "_chip", lambda parser, name: "v5e")
    monkeypatch.setattr(autotune, "results", lambda settings, *_: (Refusals() for _ in settings))
    with pytest.raises(SystemExit, match="nothing is written"):
        autotune.main()
    assert capsys.readouterr().out.count("none: too large") == 2 and not path.exists()


@pytest.mark.parametrize("direction", autotune.DIRECTIONS)
def test_measuring_interpreted_kernels(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(direction, 64, 256, "float32")
    blocks = [SMALL, SMALL._replace(queries=256)]
    monkeypatch.setattr(autotune, "POSITIONS", 256)
    seconds = autotune.measured(setting, blocks, repeats=1, interpret=True)
    assert list(seconds) == blocks and min(seconds.values()) > 0


def test_a_pass_is_called_with_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "POSITIONS", 512)
    setting = Setting("forward", 64, 256, "float32")
    q, k, v, _ = draw(setting.case, "float32")
    expected = reference.attend(build(q, k, v, setting.case.mask()))
    output = autotune.call(setting, SMALL, interpret=True)(q, k, v)
    np.testing.assert_allclose(output.out, expected.output, rtol=0, atol=2e-5)
    np.testing.assert_allclose(output.lse.swapaxes(1, 2), expected.lse, rtol=0, atol=2e-5)


def test_what_is_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [Setting("forward", h, length, "bfloat16") for h in (64, 128) for length in (2048, 32768)]
    best = {one: SMALL._replace(keys=128 * (i + 1)) for i, one in enumerate(settings)}
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps([one._asdict() for one in autotune.entries(best, "v5e")]))
    monkeypatch.setenv(tpu_blocks.OVERRIDE, str(path))
    for setting, blocks in best.items():
        assert tpu_blocks.chosen("forward", "v5e", setting.head_dim, setting.length) == blocks
    assert tpu_blocks.chosen("forward", "v5e", 80, 2048) == best[settings[2]]
    assert tpu_blocks.chosen("forward", "v5e", 128, 2**20) == best[settings[3]]
    monkeypatch.delenv(tpu_blocks.OVERRIDE)
    for other in (("backward", "v5e", 64, 2048), ("forward", "v6e", 64, 2048), ("forward", "v5e", 256, 2048)):
        default = tpu_blocks.chosen(*other)
        with monkeypatch.context() as patch:
            patch.setenv(tpu_blocks.OVERRIDE, str(path))
            assert tpu_blocks.chosen(*other) == default


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"direction": "forward", "queries": 512}, "needs direction, queries, keys, rows, step"),
        ({"direction": "sideways", "queries": 512, "keys": 512, "rows": 512, "step": 512}, "direction is forward or"),
        ({"direction": "forward", "queries": 512, "keys": 512, "rows": 512, "step": 384}, "multiples of their tiles"),
        ({"direction": "forward", "queries": 512, "keys": 512, "rows": 512, "step": 512, "chip": "v9"}, "chip is one"),
        ({"direction": "forward", "queries": 1, "keys": 1, "rows": 1, "step": 1, "length": "long"}, "whole numbers"),
        (["forward"], "needs direction"),
    ],
)
def test_a_file_that_holds_something_else(line: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps([line]))
    with pytest.raises(AttentionError, match=message):
        tpu_blocks.read(str(path))


@pytest.mark.parametrize(
    ("length", "cut"), [(4096, (1024, 512)), (1100, (768, 256)), (100, (128, 128)), (513, (768, 256))]
)
def test_blocks_are_cut_to_a_length(length: int, cut: tuple[int, int]) -> None:
    """As few as the limit allows, as even as registers allow, in whole tiles."""
    block, tile = tpu_blocks._cut(length, 1024, 512)
    assert (block, tile) == cut and block % tile == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out", "new.json"], "there is no TPU here: give --compile-for CHIP"),
        (["--out", __file__], "name a new file, in a folder that is there"),
        (["--out", "no/such/folder/new.json"], "name a new file, in a folder that is there"),
        (["--out", "new.json", "--repeats", "0"], "turns are timed from 1 on"),
        (["--out", "new.json", "--repeats", "3", "--compile-for", "v5e"], "none with --compile-for"),
        (["--out", "new.json", "--compile-for", "v9"], "'v9' is unknown: choose v4, v5e"),
        (["--out", "new.json", "--head-dims", "60"], "multiples of 8 up to 256"),
        (["--out", "new.json", "--lengths", "100"], "from 512 on"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", *arguments])
    with pytest.raises(SystemExit):
        autotune.main()
    assert message in capsys.readouterr().err
