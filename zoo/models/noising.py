"""The noise that a diffusion model is trained on, as its config, its objective and its samplers all read it."""

from dataclasses import dataclass

from zoo.layers.linear import LayerError, check_sizes


@dataclass(frozen=True)
class Noising:
    """schedule: how much noise each step adds, by the names of zoo.diffusion.schedules.

    timesteps: the network's time counts t = 0 .. timesteps - 1, 0 the least noisy; on the schedule "flow" it is the
        share of noise times this, a real number.
    target: what the network predicts, "noise", "image" or "velocity".
    first_beta, last_beta: the variance that the first and the last step add, where the schedule goes from one to the
        other ("linear", "scaled_linear", "sigmoid").
    zero_terminal_snr: the noisiest step leaves nothing of the image (Lin et al. 2024).
    """

    schedule: str = "linear"
    timesteps: int = 1000
    target: str = "noise"
    first_beta: float = 1e-4
    last_beta: float = 0.02
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        check_sizes(timesteps=self.timesteps)
        if not 0 < self.first_beta <= self.last_beta < 1:
            raise LayerError(
                f"first_beta {self.first_beta} and last_beta {self.last_beta} make no schedule: "
                "choose 0 < first_beta <= last_beta < 1"
            )
