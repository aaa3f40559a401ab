"""`zoo eval RUN`: held-out figures of a run's newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from zoo.commands.flags import parse
from zoo.commands.runs import Devices, split_folder
from zoo.train import launch

HELP = """\
usage: zoo eval RUN [flags]

Loss and what the recipe makes of it, over the held-out data, of the newest checkpoint of a run.
zoo eval RUN --help shows the flags.
"""


@dataclass(frozen=True)
class Figures:
    """What is measured beside the objective's own."""

    bits_per_dimension: bool = False  # of image diffusion: the variational bound, over all steps of the schedule


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    folder, rest = split_folder(arguments, "eval")
    description = f"Held-out figures of {folder}."
    asked, devices = parse((Figures(), Devices()), rest, prog=f"zoo eval {folder}", description=description)
    launch.start(devices.placement())
    # Imported here because it needs orbax and the data's libraries: mistakes above need not wait for them.
    from zoo.train.evaluate import evaluate_run

    figures, step = evaluate_run(folder, devices.placement(), bits_per_dimension=asked.bits_per_dimension)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("step", f"{step:,}")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    Console().print(table)
    return 0
