"""Whether a run of ddpm-digits draws the digits it is asked for: a classifier of real digits counts.

    python -m benchmarks.digits RUN                                RUN: a folder that `zoo train ddpm-digits` made

The classifier is scikit-learn's SVC, fitted to the training digits. It looks at digits held out, at as many samples of
each class as of any other, drawn as the run's sampler draws, and at as many of no class. Bits per dimension are the
variational bound of held-out digits given their classes, as images of 8 bits, of whose 256 greys they use 17: see
zoo.diffusion.losses. Distances are root mean square differences of pixels from -1 to 1; samples that copied training
digits would be much nearer to them than held-out digits are.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from zoo import sharding
from zoo.train import session as sessions
from zoo.train.evaluate import evaluate_run
from zoo.train.experiment import Placement
from zoo.train.image_sampler import ImageSampler

Classify = Callable[[np.ndarray], np.ndarray]
"""images [N, Y, X, C] in [-1, 1] to classes [N]."""


class Counts(NamedTuple):
    """asked: share of conditional samples found to be what they were asked to be.  each [classes]: shares of
    unconditional ones.  conditional: the samples of classes, [N, Y, X, C].
    """

    asked: float
    each: np.ndarray
    conditional: np.ndarray


class Figures(NamedTuple):
    """known: share of held-out digits that the classifier knows.  asked, each: as `Counts` has them.
    near_samples, near_held_out: median distance from the nearest training digit.
    """

    step: int
    known: float
    asked: float
    each: np.ndarray
    bits_per_dimension: float
    near_samples: float
    near_held_out: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--each", type=int, default=100, help="samples of each class")
    parser.add_argument("--guidance", type=float, help="in place of the run's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = measure(options.run, options.each, options.guidance, options.seed)
    rows = {
        f"held-out digits that the classifier knows, at step {found.step}": f"{found.known:.1%}",
        "samples of classes that it finds to be of theirs": f"{found.asked:.1%}",
        "least and most of a class among samples of none": f"{found.each.min():.1%}, {found.each.max():.1%}",
        "bits per dimension of held-out digits, given their classes": f"{found.bits_per_dimension:.3f}",
        "median distance from the nearest training digit, of samples": f"{found.near_samples:.3f}",
        "the same, of held-out digits": f"{found.near_held_out:.3f}",
    }
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def measure(run: Path, each: int = 100, guidance: float | None = None, seed: int = 0) -> Figures:
    """each: samples of each class.  guidance: None is the run's own."""
    session = sessions.reopen(run, Placement())
    model, step = sessions.trained_model(run, session)
    data, sampler = session.experiment.data, session.experiment.sampler
    sampler = sampler if guidance is None else replace(sampler, guidance=guidance)
    train, held_out = (data.open(split, batch_size=1, seed=0) for split in ("train", "validation"))
    digits, others = (split.pixels.astype(np.float32) / 127.5 - 1 for split in (train, held_out))
    classify = fitted(digits, train.labels)
    with sharding.use(session.mesh):
        found = counted(model, sampler, data.example_shape, classify, jax.random.key(seed), each=each)
    return Figures(
        step=step,
        known=float(np.mean(classify(others) == held_out.labels)),
        asked=found.asked,
        each=found.each,
        bits_per_dimension=evaluate_run(run, Placement(), bits_per_dimension=True)[0]["bits_per_dimension"],
        near_samples=float(np.median(nearest(found.conditional, digits))),
        near_held_out=float(np.median(nearest(others, digits))),
    )


def fitted(images: np.ndarray, labels: np.ndarray) -> Classify:
    """A classifier of digits; it is scikit-learn's example for them, of pixels from 0 to 16."""
    from sklearn.svm import SVC

    def pixels(images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1) + 1) * 8

    classifier = SVC(gamma=0.001).fit(pixels(images), labels)
    return lambda images: classifier.predict(pixels(images))


def counted(
    model: Any, sampler: ImageSampler, shape: tuple[int, ...], classify: Classify, key: jax.Array, *, each: int
) -> Counts:
    """Draws `each` samples of every class, and as many in all of none, and counts what they are."""
    classes = model.config.num_classes
    asked_key, blank_key = jax.random.split(key)
    sampler = replace(sampler, rows=each, columns=classes, classes="all")
    conditional = sampler.draw(model, shape, asked_key)
    unconditional = replace(sampler, classes="none").draw(model, shape, blank_key)
    right = classify(conditional) == np.arange(each * classes) % classes
    shares = np.bincount(classify(unconditional), minlength=classes) / len(unconditional)
    return Counts(float(right.mean()), shares, conditional)


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Root mean square difference of each image [N, Y, X, C] from the nearest one of `among` [M, Y, X, C]: [N]."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (images, among))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares.min(1), 0) / a.shape[1])


if __name__ == "__main__":
    main()
