"""What `benchmarks.attention` found: kept as JSON lines, shown as a table and plots, compared with an earlier run."""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

HISTORY = "history.jsonl"

KEY = ("target", "case", "mode", "dtype", "implementation")

LINE = ("target", "implementation", "mode", "dtype")
"""What is one line in a plot."""


class Gate(NamedTuple):
    """How far a figure may rise above an earlier one: to factor times it, plus step."""

    factor: float = 1.0
    step: float = 0.0

    def allows(self, before: float, now: float) -> bool:
        return now <= self.factor * before + self.step


GATES = {
    "temporaries": Gate(1.01),
    "growth": Gate(step=0.05),
    "error": Gate(1.5),
    "bundles": Gate(1.01),
    "spills": Gate(1.1),
    "bound": Gate(1.01),
}
"""Deterministic figures, none of which may grow further."""


class Column(NamedTuple):
    """A figure of a row, and how it is shown: times factor, in this format."""

    name: str
    head: str
    format: str
    factor: float = 1.0


COLUMNS = (
    Column("wall", "ms", ".2f", 1e3),
    Column("cpu", "CPU ms", ".2f", 1e3),
    Column("flops_per_second", "GFLOP/s", ".0f", 1e-9),
    Column("of_peak", "of peak", ".0%"),
    Column("bound", "bound us", ".0f", 1e6),
    Column("bundles", "bundles", ".0f"),
    Column("matrix_unit", "matrix unit", ".0%"),
    Column("spills", "spills", ".0f"),
    Column("temporaries", "temporaries MiB", ".1f", 2**-20),
    Column("growth", "exponent", ".2f"),
    Column("memory", "memory MiB", ".1f", 2**-20),
    Column("of_memory", "of the device's", ".1%"),
    Column("compile_seconds", "compile s", ".2f"),
    Column("error", "error", ".1e"),
)


def key(row: Row) -> tuple[str, ...]:
    """What says which row one is; what was run has its device as target."""
    return (row.get("target", row.get("device", "")), *(row[name] for name in KEY[1:]))


def columns(rows: Sequence[Row]) -> list[Column]:
    """Those of which any row has a figure."""
    return [one for one in COLUMNS if any(row.get(one.name) is not None for row in rows)]


def add_growth(rows: Sequence[Row]) -> None:
    """`growth` in the family "long": the exponent of temporaries against length, from the next shorter length."""
    long = [row for row in rows if row["family"] == "long"]
    for row in long:
        of_line = [x for x in long if all(x.get(name) == row.get(name) for name in LINE)]
        shorter = [x for x in of_line if x["length"] < row["length"] and x.get("temporaries")]
        if shorter and row.get("temporaries"):
            near = max(shorter, key=lambda x: x["length"])
            rise = math.log(row["temporaries"] / near["temporaries"])
            row["growth"] = rise / math.log(row["length"] / near["length"])


def append(folder: Path, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / HISTORY).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def base(name: str, folder: Path) -> list[Row]:
    """The rows of a history, or of one commit in the history of `folder`; a later row of a key replaces an earlier."""
    path = Path(name)
    own = folder / HISTORY
    if path.is_file():
        return [json.loads(line) for line in path.read_text().splitlines()]
    lines = own.read_text().splitlines() if own.is_file() else []
    found = [row for row in map(json.loads, lines) if (row.get("commit") or "").startswith(name)]
    if not found:
        raise SystemExit(f"--compare {name}: no such file, and no such commit in {own}")
    return found


def show(rows: Sequence[Row]) -> None:
    """A table for people."""
    shown, named = columns(rows), names(rows)
    table = Table(box=None, pad_edge=False)
    for name in named:
        table.add_column(name)
    for column in shown:
        table.add_column(column.head, justify="right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in named), *cells(row, shown))
    Console(width=150).print(table)


def names(rows: Sequence[Row]) -> list[str]:
    """Those of KEY that any row has."""
    return [name for name in KEY if any(name in row for row in rows)]


def cells(row: Row, columns: Sequence[Column]) -> list[str]:
    if "refused" in row:
        return [row["refused"]]
    figures = [(row.get(column.name), column) for column in columns]
    return ["" if x is None else format(x * column.factor, column.format) for x, column in figures]


def write_report(folder: Path, rows: Sequence[Row]) -> list[str]:
    """table.csv, lengths.png and report.html of these rows; their names."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    picture = plots(rows)
    (folder / "lengths.png").write_bytes(picture)
    (folder / "report.html").write_text(page(rows, picture))
    return [HISTORY, "table.csv", "lengths.png", "report.html"]


def plots(rows: Sequence[Row]) -> bytes:
    """Throughput, or the modelled bound, and temporaries of the family "long" against length, log-log, as PNG."""
    found = [row for row in rows if row["family"] == "long" and "refused" not in row]
    lines = sorted({tuple(row.get(name, "") for name in LINE) for row in found})
    colors = sorted({line[:2] for line in lines})
    panels = [one for one in columns(found) if one.name in ("flops_per_second", "bound", "temporaries")]
    figure = Figure(figsize=(11, 4.2), dpi=140, layout="constrained")
    for axes, column in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        for line in lines:
            of_line = [row for row in found if tuple(row.get(name, "") for name in LINE) == line]
            points = [(row["length"], row[column.name] * column.factor) for row in of_line if row.get(column.name)]
            axes.plot(
                *zip(*sorted(points), strict=True) if points else ([], []),
                color=f"C{colors.index(line[:2])}",
                linestyle="-" if line[3] == "bfloat16" else "--",
                marker="o" if line[2] == "both" else "s",
                fillstyle="full" if line[2] == "both" else "none",
                markersize=4,
                label=", ".join(filter(None, line)),
            )
        axes.set(xscale="log", yscale="log", xlabel="keys", title=column.head)
        axes.set_xticks(sorted({row["length"] for row in found}), labels=sorted({row["length"] for row in found}))
        axes.minorticks_off()
        axes.grid(color="#e5e9ee")
    if lines:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(rows: Sequence[Row], picture: bytes) -> str:
    shown, named = columns(rows), names(rows)
    heads, body = (*named, *(column.head for column in shown)), []
    for row in rows:
        span = f' colspan="{len(shown)}"' if "refused" in row else ""
        tds = [f"<td>{html.escape(row.get(name, ''))}</td>" for name in named]
        tds += [f"<td class=figure{span}>{html.escape(cell)}</td>" for cell in cells(row, shown)]
        body.append(f"<tr>{''.join(tds)}</tr>")
    first = rows[0] if rows else {}
    where = ", ".join(
        f"{name} {first[name]}" for name in ("target", "device", "cores", "jax", "commit", "date") if name in first
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>attention</title><style>
body {{ max-width: 75rem; margin: 3rem auto; padding: 0 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: #1f2933; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th {{ text-align: left; color: #5f6c7b; font-weight: 500; }} th, td {{ padding: .15rem .8rem .15rem 0; }}
.figure {{ text-align: right; font-variant-numeric: tabular-nums; }}
.figure[colspan] {{ text-align: left; color: #5f6c7b; }}
</style></head><body><h1>Attention</h1><p>{html.escape(where)}</p>
<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="The family long against length">
<table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>
{chr(10).join(body)}
</table></body></html>
"""


def compare(base: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Prints what changed against the base; returns the regressions, which deterministic figures alone make."""
    before = {key(row): row for row in base}
    regressions, ratios, counterparts = [], [], 0
    for row in rows:
        old, label = before.get(key(row)), " ".join(filter(None, key(row)))
        counterparts += old is not None
        if old is None or "refused" in old:
            continue
        if "refused" in row:
            regressions.append(f"{label}: ran, and is refused now: {row['refused']}")
            continue
        for name, gate in GATES.items():
            a, b = old.get(name), row.get(name)
            if a is not None and b is not None and not gate.allows(a, b):
                regressions.append(f"{label}: {name} {a:.4g} -> {b:.4g}")
        if "wall" in row and "wall" in old:
            ratios.append((row["wall"] / old["wall"], label))
    if not counterparts:
        raise SystemExit(
            "--compare: no row has a counterpart in the base: run the same cases, modes, dtypes and device"
        )
    print(f"\n{counterparts} rows have a counterpart in the base{'; time against it (not gated):' if ratios else ''}")
    for ratio, label in sorted(ratios):
        print(f"  {ratio:6.2f}  {label}")
    for regression in regressions:
        print(f"REGRESSION {regression}")
    return regressions
