"""The variance of ancestral steps: either of two fixed ones, or what a network says between them.

Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, section 3.1. A network
that says it gives twice the channels of an image: the prediction, and behind it v, elementwise and about -1 to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.paths import Path, posterior
from zoo.diffusion.schedules import Array, ScheduleError

VARIANCES = ("small", "large", "learned")
"""Of the posterior, right for a single image; of the step itself, right for images ~ N(0, 1); the network's."""


class Variances(NamedTuple):
    """Of each step [steps]: the logarithm of the small variance, and how much larger that of the large one is."""

    log_small: Array
    span: Array


def variances(path: Path) -> Variances:
    """The two ends of a path's steps. Nothing is left of the small one where a step ends at the image: there it is
    that of the step before, as in Ho et al.'s own code, for the decoder of the bound."""
    step = posterior(path)
    before = np.append(step.added[:1], step.variance[:-1])
    log_small = np.log(np.where(path.end.sigma > 0, step.variance, before))
    return Variances(log_small, np.log(step.added) - log_small)


def share(said: jax.Array) -> jax.Array:
    """Of the way from the small to the large variance, in logarithms, by what a network says (equation 15)."""
    return (said + 1.0) / 2.0


def divided(predicted: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """A network's output [..., C or 2 C] as its prediction and what it says of the variance, or None; float32."""
    predicted = predicted.astype(jnp.float32)
    if predicted.shape[-1] == channels:
        return predicted, None
    if predicted.shape[-1] != 2 * channels:
        raise ScheduleError(
            f"the network gives {predicted.shape[-1]} channels for images of {channels}: "
            f"a prediction has {channels}, and one with a variance {2 * channels}"
        )
    return predicted[..., :channels], predicted[..., channels:]


def check_variance(variance: str) -> None:
    if variance not in VARIANCES:
        raise ScheduleError(f"variance {variance!r} is unknown: choose one of {', '.join(VARIANCES)}")


def said_by(said: jax.Array | None) -> jax.Array:
    """`said` where a learned variance is asked for; raises ScheduleError where the network says none."""
    if said is None:
        raise ScheduleError("variance 'learned' is asked of a network that says none: choose small or large")
    return said
