"""What the verbs over a finished run share: its folder, and where the model goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from zoo.train.experiment import Placement, UserError


@dataclass(frozen=True)
class Devices:
    """Where the model goes; it need not be where it was trained."""

    mesh: str | None = None  # such as data=2,tensor=2; all devices on data unless given
    simulate_devices: int | None = None  # so many CPU devices, whatever hardware there is
    compile_cache: bool = True  # keep compiled programs between runs

    def placement(self) -> Placement:
        return Placement(mesh=self.mesh, simulate_devices=self.simulate_devices, compile_cache=self.compile_cache)


def split_folder(arguments: Sequence[str], verb: str) -> tuple[Path, list[str]]:
    """The run folder, which comes first, and the flags after it; raises UserError where it is left out."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"name a run: zoo {verb} RUN (a folder that zoo train made)")
    return Path(arguments[0]), list(arguments[1:])


def key_of(seed: int) -> jax.Array:
    """The key that draws by --seed; raises UserError where the number is none."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} is not a seed: choose a whole number from 0 to 2**63 - 1")
    return jax.random.key(seed)
