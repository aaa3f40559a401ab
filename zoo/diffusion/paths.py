"""The way from noise to an image: the times that the network is told, and the levels between which each step goes."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from zoo.diffusion.schedules import Conversion, Levels, Schedule, ScheduleError, conversion, ratios

SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True, eq=False)
class Path:
    """Host tables, float64. times [steps]: what the network is told. Step i goes from begin [i] to end [i].

    convert: image and noise from x and what the network predicts, at `begin`.
    first: weights of a given image and of noise in the first x. Only a path that begins part of the way has the image.
    """

    times: np.ndarray
    begin: Levels
    end: Levels
    convert: Conversion
    first: tuple[float, float] = (0.0, 1.0)

    @property
    def steps(self) -> int:
        return len(self.times)

    def tail(self, strength: float) -> "Path":
        """The last `strength` of the steps, from an image with the noise that there is then (Meng et al. 2022).

        With strength 1 it is the path itself, from noise alone. Raises ScheduleError where no step is left.
        """
        # The small term is for strengths such as 0.29, of which 100 steps are 28.999999999999996.
        kept = int(self.steps * strength + 1e-9)
        if not 0 < strength <= 1 or kept < 1:
            raise ScheduleError(
                f"strength {strength} leaves none of {self.steps} steps or asks for more: "
                f"choose from {1 / self.steps:g} to 1"
            )
        if kept == self.steps:
            return self
        rest = self.take(np.arange(self.steps - kept, self.steps))
        return replace(rest, first=(float(rest.begin.signal[0]), float(rest.begin.sigma[0])))

    def take(self, steps: np.ndarray) -> "Path":
        """The steps of these numbers, in their order."""
        begin, end = (Levels(*(values[steps] for values in levels)) for levels in (self.begin, self.end))
        convert = Conversion(*(values[steps] for values in self.convert))
        return Path(self.times[steps], begin, end, convert, self.first)

    def scaled(self, noise: float) -> "Path":
        """The same path from noise of another standard deviation than 1."""
        return replace(self, first=(0.0, noise))


def spaced(schedule: Schedule, steps: int, spacing: str = "trailing", offset: int = 0) -> np.ndarray:
    """`steps` falling times of a schedule [steps], float64 (Lin et al. 2024, table 2). Not rounded.

    "trailing" begins with the noisiest, as training did; "leading" ends with time `offset` and in general begins below;
    "linspace" does both.
    """
    timesteps = schedule.timesteps
    if spacing not in SPACINGS:
        raise ScheduleError(f"spacing {spacing!r} is unknown: choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= timesteps:
        raise ScheduleError(f"sampling in {steps} steps is not possible with {timesteps}: choose 1 to {timesteps}")
    if spacing == "trailing":
        return np.arange(steps, 0, -1) * timesteps / steps - 1.0 + schedule.least_time
    if spacing == "linspace":
        return np.linspace(0, timesteps - 1, steps)[::-1] + schedule.least_time
    times = np.arange(steps)[::-1] * float(timesteps // steps) + offset
    if not times[-1] >= 0 or times[0] >= timesteps:
        raise ScheduleError(
            f"{steps} leading steps with offset {offset} reach time {times[0]:g}, and the last is {timesteps - 1}: "
            "choose a smaller offset from 0, or another number of steps"
        )
    return times + schedule.least_time


def along(schedule: Schedule, times: np.ndarray, *, to_image: bool = True, stride: int | None = None) -> Path:
    """The path through falling `times` [steps] of a schedule.

    to_image: it ends at the image itself; else at the least noisy time.
    stride: each step goes so far down in time, wherever the next one begins; None: to where the next one begins.
    Raises ScheduleError where the network's target says nothing of the image.
    """
    begin = schedule.levels(times)
    if stride is None:
        return between(schedule, times, begin, to_image=to_image)
    goals = times - stride
    last = _last(schedule, to_image)
    least = schedule.least_time
    end = schedule.levels(np.maximum(goals, least))
    end = Levels(*(np.where(goals < least, final, values) for final, values in zip(last, end, strict=True)))
    return Path(times, begin, end, _convert(schedule, times, begin))


def between(schedule: Schedule, times: np.ndarray, begin: Levels, *, to_image: bool = True) -> Path:
    """The path whose steps go from each of the levels `begin` [steps] to the next, and from the last to the end."""
    end = Levels(
        *(np.append(values[1:], final) for values, final in zip(begin, _last(schedule, to_image), strict=True))
    )
    return Path(times, begin, end, _convert(schedule, times, begin))


def karras(most: float, least: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """sigma / signal [steps], falling, whose rho-th roots go in even steps (Karras et al. 2022, equation 5)."""
    return np.linspace(most ** (1 / rho), least ** (1 / rho), steps) ** rho


def times_of(schedule: Schedule, ratio: np.ndarray) -> np.ndarray:
    """Times [...] of a discrete schedule at which sigma / signal is `ratio`; its logarithm is linear between them."""
    table = np.log(ratios(schedule.levels(np.arange(schedule.timesteps))))
    return np.interp(np.log(ratio), table, np.arange(schedule.timesteps))


def shifted(share: np.ndarray, shift: float) -> np.ndarray:
    """Shares of noise on the straight path, moved towards noise for larger images (Esser et al. 2024, equation 23)."""
    return shift * share / (1.0 + (shift - 1.0) * share)


def _last(schedule: Schedule, to_image: bool) -> Levels:
    if to_image:
        return Levels(np.float64(1.0), np.float64(0.0))
    return schedule.levels(np.asarray(schedule.least_time))


def _convert(schedule: Schedule, times: np.ndarray, begin: Levels) -> Conversion:
    with np.errstate(divide="ignore", invalid="ignore"):
        convert = conversion(schedule, begin)
    finite = np.isfinite(convert).all(0)
    if not finite.all():
        time = times[~finite][0]
        raise ScheduleError(
            f"target {schedule.target!r} says nothing of the image at time {time:g}, where signal is "
            f"{begin.signal[~finite][0]:g}: choose the target 'velocity', or a spacing that leaves it out"
        )
    return convert


class Posterior(NamedTuple):
    """q(x_end | x_begin, image) of each step [steps]: mean x * x_begin + image * image, and its variance.

    added: the variance of q(x_begin | x_end), of the same steps.
    """

    x: np.ndarray
    image: np.ndarray
    variance: np.ndarray
    added: np.ndarray


def posterior(path: Path) -> Posterior:
    """Bayes' rule along a path (Ho et al. 2020, equations 6 and 7), the times between two of it taken as one step."""
    ratio = path.begin.signal / path.end.signal
    before, after = np.square(path.begin.sigma), np.square(path.end.sigma)
    added = before - ratio**2 * after
    return Posterior(ratio * after / before, path.end.signal * added / before, added * after / before, added)
