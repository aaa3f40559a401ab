"""Samplers as tables of weights, made in float64 on the host; `zoo.diffusion.sampling` applies any of them.

Every sampler here is linear in x, in the images and the noise that the network has predicted at this step and at
earlier ones, and in fresh noise. Euler's method on sigma / signal, and on the straight path, is DDIM without noise.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from zoo.diffusion.paths import Path, along, between, karras, posterior, shifted, spaced, times_of
from zoo.diffusion.schedules import Flow, Schedule, ScheduleError, from_ratio, ratios
from zoo.diffusion.variance import Variances, check_variance, variances


@dataclass(frozen=True, eq=False)
class Table:
    """Weights [steps, lags] of what a step ends with; lag 0 is of the step itself, lag j of the one j before it.

    xs, images, noises, predictions: of x at a step's begin, of the image and the noise predicted there, and of what the
        network said itself. As many lags as have any weight.
    fresh [steps]: of standard normal noise, or, with `learned`, of noise of the deviation that the network says between
        these variances.  clip: bound put on predicted images (None: none).
    """

    path: Path
    xs: np.ndarray
    images: np.ndarray
    noises: np.ndarray
    predictions: np.ndarray
    fresh: np.ndarray
    clip: float | None = None
    learned: Variances | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """How to sample, whatever the network and the number of steps.

    spacing, offset: which times, see zoo.diffusion.paths.spaced.
    to_image: the way ends at the image itself; else at the noise of the schedule's least noisy time.
    """

    spacing: str = "trailing"
    offset: int = 0
    to_image: bool = True

    def table(self, schedule: Schedule, steps: int, *, strength: float = 1.0) -> Table:
        """The table for so many network evaluations, of which `strength` is the share that an image is given for.

        Raises ScheduleError where the schedule has no such steps, or its target says too little of the image.
        """
        return self.weights(self.path(schedule, steps).tail(strength))

    def path(self, schedule: Schedule, steps: int) -> Path:
        """The way that `weights` are for: between whole times, unless a sampler has another."""
        times = np.round(spaced(schedule, steps, self.spacing, self.offset))
        return along(schedule, times, to_image=self.to_image)

    @abstractmethod
    def weights(self, path: Path) -> Table: ...


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    variance: of fresh noise: "small", the posterior's, which is right for a single image; "large", the step's own,
        right for images ~ N(0, 1) (section 3.2); or "learned", the network's, see zoo.diffusion.variance.
    """

    variance: str = "small"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_variance(self.variance)

    def weights(self, path: Path) -> Table:
        step = posterior(path)
        learned = variances(path) if self.variance == "learned" else None
        variance = {"small": step.variance, "large": step.added, "learned": np.ones(path.steps)}[self.variance]
        fresh = np.sqrt(np.where(path.end.sigma > 0, variance, 0.0))
        return replace(_table(path, xs=step.x, images=step.image, fresh=fresh, clip=self.clip), learned=learned)


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """Song et al. 2021, equations 12 and 16.

    eta: 0 adds no noise, 1 as much as ancestral sampling.
    fixed_stride: each step goes timesteps // steps down, wherever the next one begins (as diffusers has it; it differs
        where the spacing is uneven); else to where the next one begins.
    clipped_noise: where the predicted image is clipped, its noise is what then remains of x; else it is what the
        network said (as diffusers has it), which takes out of x more than the image puts in, and under guidance leads
        away from what is asked for.
    """

    eta: float = 0.0
    clip: float | None = 1.0
    fixed_stride: bool = False
    clipped_noise: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ScheduleError(f"eta {self.eta} is not a share of ancestral sampling's noise: choose from 0 to 1")

    def path(self, schedule: Schedule, steps: int) -> Path:
        times = np.round(spaced(schedule, steps, self.spacing, self.offset))
        stride = schedule.timesteps // steps if self.fixed_stride else None
        return along(schedule, times, to_image=self.to_image, stride=stride)

    def weights(self, path: Path) -> Table:
        variance = self.eta**2 * posterior(path).variance
        kept = np.sqrt(np.maximum(np.square(path.end.sigma) - variance, 0.0))
        options = {"fresh": np.sqrt(variance), "clip": self.clip}
        if not self.clipped_noise:
            return _table(path, images=path.end.signal, noises=kept, **options)
        falls = kept / path.begin.sigma
        return _table(path, xs=falls, images=path.end.signal - falls * path.begin.signal, **options)


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """Euler's method on d x / d ratio, with x over signal and ratio = sigma / signal (Karras et al. 2022, algorithm 1
    without churn), or on the straight path of flow matching.

    Either is x_end = signal_end image + sigma_end noise: DDIM, at times that need not be whole.
    karras: ratios in even steps of their seventh root.  shift: of the straight path, see zoo.diffusion.paths.shifted.
    """

    spacing: str = "linspace"
    karras: bool = False
    shift: float = 1.0

    def path(self, schedule: Schedule, steps: int) -> Path:
        times = spaced(schedule, steps, self.spacing, self.offset)
        if isinstance(schedule, Flow):
            return self._straight(schedule, times)
        if self.shift != 1.0:
            raise ScheduleError(f"shift {self.shift} is of the schedule 'flow': leave it at 1 on others")
        times = times if self.spacing == "linspace" else np.round(times)
        ratio = ratios(schedule.levels(times))
        if self.karras:
            ratio = karras(ratio[0], ratio[-1], steps)
            times = times_of(schedule, ratio)
        begin = from_ratio(ratio)
        path = between(schedule, times, begin, to_image=self.to_image)
        # As published: x over signal begins with the deviation ratio, or sqrt(ratio^2 + 1) where spacing is leading.
        return path if self.spacing == "leading" else path.scaled(float(begin.sigma[0]))

    def _straight(self, schedule: Flow, times: np.ndarray) -> Path:
        if self.karras:
            raise ScheduleError("Karras' steps are of sigma / signal, which 'flow' has no bound of: leave karras off")
        share = times / schedule.timesteps
        if self.spacing == "linspace":
            # As published: the last time before the end is a shifted one already.
            share = np.linspace(1.0, shifted(share[-1:], self.shift)[0], len(share))
        share = shifted(share, self.shift)
        return along(schedule, share * schedule.timesteps, to_image=self.to_image)

    def weights(self, path: Path) -> Table:
        return _table(path, images=path.end.signal, noises=path.end.sigma)


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Sampler):
    """DPM-Solver++ of order 1 to 3, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2): an expansion of the
    predicted image in lambda = log(signal / sigma).

    Order 3 is as published, where the second derivative counts half of what Taylor's series says.
    lower_order_last: in fewer than 15 steps the last two are of order 2 and 1. A step to the image itself is of 1.
    heun: order 2 in the paper's other form.  karras: see Euler.
    """

    spacing: str = "linspace"
    order: int = 2
    karras: bool = False
    lower_order_last: bool = True
    heun: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ScheduleError(f"DPM-Solver++ of order {self.order} is unknown: choose 1, 2 or 3")

    def path(self, schedule: Schedule, steps: int) -> Path:
        if isinstance(schedule, Flow):
            return along(schedule, spaced(schedule, steps, self.spacing, self.offset), to_image=self.to_image)
        if not 1 <= steps < schedule.timesteps:
            last = schedule.timesteps - 1
            raise ScheduleError(
                f"DPM-Solver++ in {steps} steps does not fit between {last + 1} times: choose 1 to {last}"
            )
        if self.karras:
            ratio = ratios(schedule.levels(np.arange(schedule.timesteps)))
            ratio = karras(ratio[-1], ratio[0], steps)
            times = times_of(schedule, ratio)
            return between(schedule, np.round(times), from_ratio(ratio), to_image=self.to_image)
        if self.spacing == "trailing":
            times = spaced(schedule, steps, self.spacing)
        else:
            # The least noisy of one time more is where the way ends.
            times = spaced(schedule, steps + 1, self.spacing, self.offset)[:-1]
        times = np.round(times)
        return between(schedule, times, from_ratio(ratios(schedule.levels(times))), to_image=self.to_image)

    def weights(self, path: Path) -> Table:
        with np.errstate(divide="ignore"):
            begin = np.log(path.begin.signal) - np.log(path.begin.sigma)
            h = np.log(path.end.signal) - np.log(path.end.sigma) - begin
        falls = path.end.sigma / path.begin.sigma
        gain = path.end.signal - falls * path.begin.signal
        images = np.zeros((path.steps, 3))
        for i in range(path.steps):
            # A step of no length, which Karras' last is where the way does not end at the image, has no derivatives.
            order = self._order(i, path) if h[i] else 1
            # The derivatives of the image in lambda / h, by its values at this and earlier steps.
            first, second = np.zeros(3), np.zeros(3)
            if order > 1:
                newer = h[i] / (begin[i] - begin[i - 1]) * np.array([1.0, -1.0, 0.0])
                first = newer
            if order > 2:
                older = h[i] / (begin[i - 1] - begin[i - 2]) * np.array([0.0, 1.0, -1.0])
                r0, r1 = (begin[i] - begin[i - 1]) / h[i], (begin[i - 1] - begin[i - 2]) / h[i]
                first = newer + r0 / (r0 + r1) * (newer - older)
                second = (newer - older) / (r0 + r1)
            images[i] = gain[i] * np.eye(3)[0]
            if order == 2 and not self.heun:
                images[i] += gain[i] / 2 * first
            elif order > 1:
                # Integrals of lambda and lambda^2 / 2 against exp(lambda), over the step.
                shrink = np.expm1(-h[i])
                images[i] += path.end.signal[i] * (
                    (shrink / h[i] + 1) * first - ((shrink + h[i]) / h[i] ** 2 - 0.5) * second
                )
        return _table(path, xs=falls, images=images)

    def _order(self, i: int, path: Path) -> int:
        left, lower = path.steps - i, self.lower_order_last and path.steps < 15
        if left == 1 and (path.end.sigma[i] == 0 or lower):
            return 1
        return min(self.order, i + 1, 2 if left == 2 and lower else 3)


@dataclass(frozen=True, kw_only=True)
class PLMS(Sampler):
    """Pseudo linear multistep sampling (Liu et al. 2022, arXiv 2202.09778, section 3.3), begun by a step of order 2.

    The noise of a DDIM step is extrapolated from up to four predictions (Adams and Bashforth). The first step is gone
    twice, the second time with the mean of the predictions at its two ends: one evaluation more than steps.
    Predictions of another target than noise are extrapolated as they are, and give the noise then.
    """

    def path(self, schedule: Schedule, steps: int) -> Path:
        if steps < 2:
            raise ScheduleError(f"PLMS in {steps} step has nothing to extrapolate from: choose 2 or more")
        return super().path(schedule, steps)

    def weights(self, path: Path) -> Table:
        evaluations = path.steps + 1 if path.steps > 1 else 1
        mix = np.zeros((evaluations, 5))
        # Evaluation 1 is left out once it has served.
        mix[:5] = np.array(
            [[24, 0, 0, 0, 0], [12, 12, 0, 0, 0], [36, 0, -12, 0, 0], [46, -32, 0, 10, 0], [55, -59, 37, 0, -9]]
        )[:evaluations]
        mix[5:, :4] = [55, -59, 37, -9]
        # Evaluation 1 looks at the end of step 0, and goes that step again from where it began.
        step = np.maximum(np.arange(evaluations) - 1, 0)
        seen = np.maximum(step, np.minimum(np.arange(evaluations), 1))
        going = path.take(step)
        if not going.begin.signal.all():
            raise ScheduleError("PLMS cannot begin where nothing of the image is left: choose ddim, or another spacing")
        falls = going.end.signal / going.begin.signal
        of_noise = going.end.sigma - falls * going.begin.sigma
        xs = np.zeros((evaluations, 2))
        xs[:, 0] = falls + of_noise * going.convert.noise_x
        if evaluations > 1:
            xs[1] = xs[1, ::-1]
        mixed = (of_noise * going.convert.noise_p)[:, None] * mix / 24
        return _table(replace(path.take(seen), end=going.end), xs=xs, predictions=mixed)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "euler": Euler(),
    "dpmpp_2m": DPMSolver(),
    "plms": PLMS(),
}
"""Samplers by the names that a person gives."""


def _table(
    path: Path,
    *,
    xs: np.ndarray | None = None,
    images: np.ndarray | None = None,
    noises: np.ndarray | None = None,
    predictions: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
    clip: float | None = None,
) -> Table:
    """Columns of weights [steps] or [steps, lags], without the oldest lags that have none."""

    def trimmed(weights: np.ndarray | None) -> np.ndarray:
        weights = np.zeros((path.steps, 0)) if weights is None else weights.reshape(path.steps, -1)
        used = np.flatnonzero(weights.any(0))
        return weights[:, : used[-1] + 1 if len(used) else 0]

    fresh = np.zeros(path.steps) if fresh is None else fresh
    return Table(path, trimmed(xs), trimmed(images), trimmed(noises), trimmed(predictions), fresh, clip)
