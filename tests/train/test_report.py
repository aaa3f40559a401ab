"""The report is complete in one file, shows what the metrics say, and takes any text."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.train import report
from zoo.train.metrics import read_records


class Page(HTMLParser):
    """Collects a page's tags and text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [{"kind": "train", "step": 10 * i, "loss": 5 / (i + 1), "tokens_per_second": 1000 + i} for i in range(1, 80)]
    rows += [{"kind": "validation", "step": step, "loss": 5 / step, "bits_per_byte": 2.5} for step in (250, 500, 790)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_holds_everything_it_shows(run: Path) -> None:
    Image.new("L", (40, 40), 128).save(run / "samples.png")
    path = report.write(
        run,
        title="gpt-nano",
        facts={"parameters": "1,234", "data": "python_docs"},
        sample="samples.png",
        commands={"Resume": "zoo train gpt-nano --run x"},
    )
    page = Page(path.read_text())
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for source, name in zip(images, ("curves.png", "samples.png"), strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (run / name).read_bytes()
    assert not [a for _, a in page.tags if "href" in a or "http" in str(a.get("src"))], "nothing is fetched"
    for text in ("gpt-nano", "parameters", "1,234", "python_docs", "zoo train gpt-nano --run x"):
        assert text in page.text
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "metrics.jsonl", "report.html", "samples.png"]


def test_several_pictures_are_shown_in_turn(run: Path) -> None:
    paths = [run / "samples.png", run / "denoising.png"]
    for shade, path in enumerate(paths):
        Image.new("L", (4, 4), shade).save(path)
    text = "\n".join(map(str, paths))
    page = Page(report.write(run, title="two", facts={}, sample=text).read_text())
    sources = [attributes["src"] or "" for tag, attributes in page.tags if attributes.get("class") == "sample"]
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [
        path.read_bytes() for path in paths
    ]
    paths[1].unlink()
    assert text in Page(report.write(run, title="one", facts={}, sample=text).read_text()).text


def test_any_text_is_shown_as_it_is(run: Path) -> None:
    text = "<script>alert('&amp;')</script> {style} ünïcode\n" * 200
    path = report.write(run, title="<b>t</b>", facts={"<i>": text}, sample=text, commands={"<p>": text})
    page = Page(path.read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert page.text.count(text) == 3 and "<b>t</b>" in page.text


def test_curves_show_training_validation_and_throughput(run: Path) -> None:
    records = read_records(run / "metrics.jsonl")
    train, validation = ([r for r in records if r["kind"] == kind] for kind in ("train", "validation"))
    loss, rate = (_ink(report.draw(records), part) for part in ("left", "right"))
    assert loss > _ink(report.draw(train), "left") > _ink(report.draw([]), "left")
    assert rate > _ink(report.draw(validation), "right")


def _ink(png: bytes, part: str) -> int:
    """Number of coloured pixels in one part of a picture."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)
    colour = np.ptp(pixels, axis=2) > 60
    middle = int(0.6 * colour.shape[1])
    return int((colour[:, :middle] if part == "left" else colour[:, middle:]).sum())


def test_runs_that_have_little_to_show(tmp_path: Path) -> None:
    report.write(tmp_path, title="empty", facts={})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": null}\n{"step": 2, "lo')
    path = report.write(tmp_path, title="begun", facts={})
    assert "<title>begun</title>" in path.read_text()


def test_smoothing_keeps_a_line_and_halves_noise() -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(report._smooth(line, 3)[3:-3], line[3:-3])
    noise = np.random.default_rng(0).normal(size=500)
    assert report._smooth(noise, 5).std() < 0.5 * noise.std()
