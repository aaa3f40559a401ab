"""The noise that a diffusion model is trained on, as its config, its objective and its samplers all read it."""

from dataclasses import dataclass

from zoo.layers.linear import check_sizes


@dataclass(frozen=True)
class Noising:
    """schedule: how much noise each step adds, by the names of zoo.diffusion.schedules.

    timesteps: the network's time counts t = 0 .. timesteps - 1, 0 the least noisy.
    """

    schedule: str = "linear"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        check_sizes(timesteps=self.timesteps)
