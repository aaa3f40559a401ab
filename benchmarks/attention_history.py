"""What `benchmarks.attention` found: kept as JSON lines, shown as a table and plots, compared with an earlier run."""

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

HISTORY = "history.jsonl"

KEY = ("case", "mode", "dtype", "implementation")

# Deterministic figures that must not grow, and by how much they may.
GATES = {"temporaries": 1.01, "error": 1.5}


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
    table = Table(box=None, pad_edge=False)
    for name in ("case", "dtype", "mode", "implementation"):
        table.add_column(name)
    for name in ("ms", "CPU ms", "GFLOP/s", "of peak", "temporaries MiB", "compile s", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("case", "dtype", "mode", "implementation")), *cells(row))
    Console(width=150).print(table)


def cells(row: Row) -> list[str]:
    if "refused" in row:
        return [row["refused"]]

    def figure(name: str, text: str, factor: float = 1.0) -> str:
        return "" if row.get(name) is None else format(row[name] * factor, text)

    return [
        figure("wall", ".2f", 1e3),
        figure("cpu", ".2f", 1e3),
        figure("flops_per_second", ".0f", 1e-9),
        figure("of_peak", ".0%"),
        figure("temporaries", ".1f", 2**-20),
        figure("compile_seconds", ".2f"),
        figure("error", ".1e"),
    ]


def write_report(folder: Path, rows: Sequence[Row]) -> list[str]:
    """table.csv, lengths.png and report.html of these rows; their names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    picture = plots(rows)
    (folder / "lengths.png").write_bytes(picture)
    (folder / "report.html").write_text(page(rows, picture))
    return [HISTORY, "table.csv", "lengths.png", "report.html"]


def plots(rows: Sequence[Row]) -> bytes:
    """Throughput and temporaries of the family "long" against length, log-log, as PNG."""
    found = [row for row in rows if row["family"] == "long" and "refused" not in row]
    lines = sorted({(row["dtype"], row["mode"], row["implementation"]) for row in found})
    implementations = sorted({row["implementation"] for row in found})
    figure = Figure(figsize=(11, 4.2), dpi=140, layout="constrained")
    panels = (("flops_per_second", 1e-9, "GFLOP/s"), ("temporaries", 2**-20, "temporaries, MiB"))
    for axes, (name, factor, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for dtype, mode, implementation in lines:
            points = [
                (row["length"], row[name] * factor)
                for row in found
                if (row["dtype"], row["mode"], row["implementation"]) == (dtype, mode, implementation) and row[name]
            ]
            axes.plot(
                *zip(*sorted(points), strict=True) if points else ([], []),
                color=f"C{implementations.index(implementation)}",
                linestyle="-" if dtype == "bfloat16" else "--",
                marker="o" if mode == "both" else "s",
                fillstyle="full" if mode == "both" else "none",
                markersize=4,
                label=f"{implementation}, {mode}, {dtype}",
            )
        axes.set(xscale="log", yscale="log", xlabel="keys", title=title)
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
    heads = (*KEY, "ms", "CPU ms", "GFLOP/s", "of peak", "temporaries MiB", "compile s", "error")
    body = []
    for row in rows:
        span = ' colspan="7"' if "refused" in row else ""
        tds = [f"<td>{html.escape(str(row[name]))}</td>" for name in KEY]
        tds += [f"<td class=figure{span}>{html.escape(cell)}</td>" for cell in cells(row)]
        body.append(f"<tr>{''.join(tds)}</tr>")
    first = rows[0] if rows else {}
    where = ", ".join(f"{name} {first[name]}" for name in ("device", "cores", "jax", "commit", "date") if name in first)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>attention</title><style>
body {{ max-width: 75rem; margin: 3rem auto; padding: 0 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: #1f2933; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th {{ text-align: left; color: #5f6c7b; font-weight: 500; }} th, td {{ padding: .15rem .8rem .15rem 0; }}
.figure {{ text-align: right; font-variant-numeric: tabular-nums; }}
.figure[colspan] {{ text-align: left; color: #5f6c7b; }}
</style></head><body><h1>Attention</h1><p>{html.escape(where)}</p>
<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="Throughput and temporaries against length">
<table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>
{chr(10).join(body)}
</table></body></html>
"""


def compare(base: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Prints what changed against the base; returns the regressions, which deterministic figures alone make."""
    before = {tuple(row[name] for name in KEY): row for row in base}
    regressions, ratios = [], []
    for row in rows:
        key = tuple(row[name] for name in KEY)
        old = before.get(key)
        if old is None or "refused" in old:
            continue
        label = " ".join(key)
        if "refused" in row:
            regressions.append(f"{label}: ran, and is refused now: {row['refused']}")
            continue
        for name, allowed in GATES.items():
            a, b = old.get(name), row.get(name)
            if a is not None and b is not None and b > allowed * a:
                regressions.append(f"{label}: {name} {a:.4g} -> {b:.4g}")
        ratios.append((row["wall"] / old["wall"], label))
    print(f"\n{len(ratios)} rows have a counterpart in the base; time against it (not gated):")
    for ratio, label in sorted(ratios):
        print(f"  {ratio:6.2f}  {label}")
    for regression in regressions:
        print(f"REGRESSION {regression}")
    return regressions
