"""Tables of a page, each between two marks: rows made anew, and rows that stay with the speed measured since."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from rich.progress import track

END = "<!-- end -->"


class Table(NamedTuple):
    """What stands between the marks of a table.

    columns: headings, and whether figures stand below them.
    rows: the kind of each row, by what its line begins with: its first cell, or more of them.
    cells: the further cells of a row, but for its speed.  speed: its last cell; None: there is no such column.
    """

    columns: Mapping[str, bool]
    rows: Mapping[str, str]
    cells: Callable[[str], Sequence[str]]
    speed: Callable[[str], str] | None = None

    def lines(self, held: Sequence[str], anew: Collection[str]) -> list[str]:
        """Markdown: the rows of the kinds `anew`, and those among the lines `held` before that are of other kinds."""
        made = [name for name, kind in self.rows.items() if kind in anew]
        cells = {name: self.cells(name) for name in track(made, description="rows", disable=not made)}
        found = {name: f"| {' | '.join((name, *cells[name], *self._last(name)))} |" for name in made}
        for name in self.rows.keys() - found.keys():
            for line in held:
                if line.startswith(f"| {name} | "):
                    found[name] = line if self.speed is None else f"{line.rsplit(' | ', 1)[0]} | {self.speed(name)} |"
        ruler = "|".join("---:" if figures else "---" for figures in self.columns.values())
        return [f"| {' | '.join(self.columns)} |", f"|{ruler}|", *(found[name] for name in self.rows if name in found)]

    def _last(self, name: str) -> tuple[str, ...]:
        return () if self.speed is None else (self.speed(name),)


def begin(title: str) -> str:
    return f"<!-- {title}, made by python -m benchmarks.families -->"


def rewritten(page: str, title: str, table: Table, anew: Collection[str]) -> str:
    """The page with its table `title` made anew; raises SystemExit where it has no marks of one."""
    before, mark, rest = page.partition(begin(title))
    held, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"the page has no table of {title}: put {begin(title)} and {END} where it belongs")
    lines = "\n".join(table.lines(held.splitlines(), anew))
    return f"{before}{mark}\n\n{lines}\n\n{END}{after}"
