"""`zoo eval RUN`: held-out figures of a run's newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from zoo.commands.flags import parse
from zoo.commands.runs import Devices, key_of, split_folder
from zoo.train import launch
from zoo.train.experiment import UserError
from zoo.train.image_sampler import SamplerName

if TYPE_CHECKING:
    from zoo.train.sample_distances import Distances

HELP = """\
usage: zoo eval RUN [flags]

Loss and what the recipe makes of it, over the held-out data, of the newest checkpoint of a run. Of a run that draws
images also how far its samples are from real ones (FID and KID), as another network sees them: a run of a ViT, a folder
of a published ViT, or the weights of the FID's Inception. zoo eval RUN --help shows the flags.

  zoo eval runs/digits --bits-per-dimension
  zoo eval runs/digits --features runs/vit --samples 1000
"""


@dataclass(frozen=True)
class Figures:
    """What is measured beside the objective's own."""

    bits_per_dimension: bool = False  # of image diffusion: the variational bound, over all steps of the schedule
    features: str | None = None  # compare samples with real images, as this run, folder or safetensors file sees them
    samples: int | None = None  # so many, with --features; distances of other numbers do not compare
    real_images: int = 10_000  # held-out and training images that samples are compared with, each at most
    seed: int = 0  # another number, other samples
    sampler: SamplerName | None = None  # of drawing them; the run's own sampler unless given
    steps: int | None = None  # along the schedule
    guidance: float | None = None  # 1 is none

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the run's sampler that are to be others."""
        asked = {name: getattr(self, name) for name in ("sampler", "steps", "guidance")}
        return {name: value for name, value in asked.items() if value is not None}

    def check(self) -> None:
        """Raises UserError where distances are half asked for."""
        if self.features is not None and self.samples is None:
            raise UserError("--features needs --samples: say how many, as distances depend on it")
        of_samples = ("samples", "real_images", "seed", "sampler", "steps", "guidance")
        given = [name for name in of_samples if getattr(self, name) != getattr(Figures, name)]
        if self.features is None and given:
            flag = given[0].replace("_", "-")
            raise UserError(f"--{flag} is of samples that are compared with images: name a network by --features")
        key_of(self.seed)


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    folder, rest = split_folder(arguments, "eval")
    description = f"Held-out figures of {folder}."
    asked, devices = parse((Figures(), Devices()), rest, prog=f"zoo eval {folder}", description=description)
    asked.check()
    launch.start(devices.placement())
    # Imported here because it needs orbax and the data's libraries: mistakes above need not wait for them.
    from zoo.train.evaluate import evaluate_run

    found = None
    if asked.features is not None and asked.samples is not None:
        from zoo.train.sample_distances import distances

        found = distances(
            folder,
            devices.placement(),
            asked.features,
            samples=asked.samples,
            real=asked.real_images,
            seed=asked.seed,
            changes=asked.changes,
        )
    figures, step = evaluate_run(folder, devices.placement(), bits_per_dimension=asked.bits_per_dimension)
    table = _table()
    table.add_row("step", f"{step:,}")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console = Console()
    console.print(table)
    if found is not None:
        console.print()
        _print_distances(console, found)
    return 0


def _table(*headers: str) -> Table:
    """Names at the left, numbers flush right."""
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 3, 0, 0))
    for header in headers or ("", ""):
        table.add_column(header, justify="right" if table.columns else "left")
    return table


def _print_distances(console: Console, found: "Distances") -> None:
    table = _table("distances", "FID", "KID", "+-")
    for row in found.rows:
        figures = (row.frechet, row.kernel.value, row.kernel.deviation)
        table.add_row(f"{row.of} - {row.to}", *(f"{figure:.4g}" for figure in figures))
    console.print(table)
    sizes = ", ".join(f"{size:,}" for size in sorted({row.kernel.size for row in found.rows}))
    # One line, as wide as it is: rich would break it where a terminal ends, and in the middle of a path.
    print(f"of {found.width:,} features: {found.network}; KID over subsets of {sizes}")
