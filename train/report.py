"""The report of a run: loss and throughput over steps as PNG, and one HTML page that holds all it shows.

Written from metrics.jsonl alone, so that it can be made anew at any time, of a run that goes on as well.
"""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from zoo.train.metrics import Record, read_records
from zoo.train.run_folder import METRICS

CURVES = "curves.png"
PAGE = "report.html"

_TRAIN, _VALIDATION, _INK, _FAINT = "#3b6fb6", "#d1603d", "#1f2933", "#dfe4ea"


def write(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    sample: str | None = None,
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Writes curves.png and report.html into run folder `folder`, and returns the page's path.

    facts: what a person is told of the run, by name.  sample: text, or paths of pictures, each a line (absolute, or
    below `folder`).  commands: what may be done next, by what it does.
    """
    curves = draw(read_records(folder / METRICS))
    _write(folder / CURVES, curves)
    parts = [_table(facts), f'<img src="{_embed(curves)}" alt="Loss and throughput over steps">']
    if sample is not None:
        parts += ["<h2>Sample</h2>", _sample(sample, folder)]
    if commands:
        parts += ["<h2>Go on</h2>", *(_command(what, command) for what, command in commands.items())]
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(parts))
    _write(folder / PAGE, page.encode())
    return folder / PAGE


def draw(records: Sequence[Record]) -> bytes:
    """Two panels as PNG: training and held-out loss, and throughput in the unit that the records count."""
    figure = Figure(figsize=(11, 4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _loss(left, records)
    _throughput(right, records)
    for axes in (left, right):
        _dress(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _loss(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Loss", loc="left", fontweight="bold", color=_INK)
    steps, losses = _series(records, "train", "loss")
    if len(steps) >= 50:
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
        losses = _smooth(losses, len(losses) // 25)
    axes.plot(steps, losses, color=_TRAIN, linewidth=1.6, label="training")
    steps, losses = _series(records, "validation", "loss")
    if len(steps):
        axes.plot(steps, losses, color=_VALIDATION, linewidth=1.6, marker="o", markersize=4, label="held out")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=_VALIDATION,
            fontweight="bold",
        )
        axes.legend(frameon=False, labelcolor=_INK)


def _throughput(axes: Axes, records: Sequence[Record]) -> None:
    names = (name for record in records for name in record if name.endswith("_per_second"))
    name = next((name for name in names if not name.startswith("model_")), "")
    unit = name.removesuffix("_per_second").capitalize()
    axes.set_title(f"{unit} per second" if unit else "Throughput", loc="left", fontweight="bold", color=_INK)
    steps, rates = _series(records, "train", name)
    axes.plot(steps, rates, color=_TRAIN, linewidth=1.6)
    if len(rates):
        # One odd interval should not squeeze all others into a line.
        axes.set_ylim(0, 1.2 * float(np.quantile(rates, 0.95)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _dress(axes: Axes) -> None:
    axes.set_xlabel("step", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)


def _series(records: Sequence[Record], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records of a kind that have a `name`; one that was not finite is null there."""
    found = [(r["step"], r[name]) for r in records if r.get("kind") == kind and r.get(name) is not None]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A running mean over `window` values before and after each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _table(facts: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _sample(sample: str, folder: Path) -> str:
    paths = [folder / line for line in sample.splitlines() if line.endswith(".png")]
    if paths and len(paths) == len(sample.splitlines()) and all(path.is_file() for path in paths):
        pictures = map(_embed, (path.read_bytes() for path in paths))
        return "\n".join(
            f'<img class="sample" src="{picture}" alt="Sample drawn from the model">' for picture in pictures
        )
    return f"<pre>{html.escape(sample)}</pre>"


def _command(what: str, command: str) -> str:
    return f"<p>{html.escape(what)}</p><pre class=command>{html.escape(command)}</pre>"


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

_STYLE = """
body { max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; color: #1f2933; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
img { width: 100%; margin-top: 1.5rem; }
img.sample { width: auto; max-width: 100%; min-width: 20rem; margin-top: 0; image-rendering: pixelated; }
table { border-collapse: collapse; font-size: .95rem; }
th { text-align: left; font-weight: 500; color: #5f6c7b; padding: .2rem 2rem .2rem 0; vertical-align: top;
     white-space: nowrap; }
td { padding: .2rem 0; overflow-wrap: anywhere; }
p { margin: .8rem 0 .3rem; }
pre { background: #f5f7f9; border-radius: 6px; padding: .8rem 1rem; margin: 0; white-space: pre-wrap;
      overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace; }
"""
