"""Whether a run on digits draws the digits it is asked for: a classifier of real digits counts.

    python -m benchmarks.digits RUN          RUN: a folder of zoo train ddpm-digits, text-to-digits or latent-digits

The classifier is scikit-learn's SVC, fitted to the training digits. It looks at digits held out, and at samples drawn
as the run's sampler draws: as many of each class as of any other, or as many of each held-out caption; of a network of
pixels and classes, also at as many of no class. Bits per dimension are the variational bound of held-out digits given
what is told of them, as images of 8 bits, of whose 256 greys they use 17: see zoo.diffusion.losses. Distances are root
mean square differences of pixels from -1 to 1; samples that copied training digits would be much nearer to them than
held-out digits are.
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
from zoo.train.caption_sampler import CaptionSampler
from zoo.train.data.images import Images
from zoo.train.data.latents import LatentData
from zoo.train.evaluate import evaluate_run
from zoo.train.experiment import Placement
from zoo.train.image_sampler import ImageSampler
from zoo.train.latent_sampler import LatentSampler

CLASSES = 10

Classify = Callable[[np.ndarray], np.ndarray]
"""images [N, Y, X, C] in [-1, 1] to classes [N]."""


class Drawn(NamedTuple):
    """images [N, Y, X, C], and classes [N] that they were asked to be.  blank: images of no class, [N, Y, X, C]; None
    where the run's sampler draws none.
    """

    images: np.ndarray
    asked: np.ndarray
    blank: np.ndarray | None = None


class Figures(NamedTuple):
    """known: share of held-out digits that the classifier knows.  asked: share of samples that are what was asked for.
    each [classes]: shares of samples of no class.  near_samples, near_held_out: median distance from the nearest
    training digit.  None: there is no such figure of this run.
    """

    step: int
    known: float
    asked: float
    each: np.ndarray | None
    bits_per_dimension: float | None
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
        "samples that it finds to be what was asked for": f"{found.asked:.1%}",
    }
    if found.each is not None:
        rows["least and most of a class among samples of none"] = f"{found.each.min():.1%}, {found.each.max():.1%}"
    if found.bits_per_dimension is not None:
        rows["bits per dimension of held-out digits, given what is told of them"] = f"{found.bits_per_dimension:.3f}"
    rows["median distance from the nearest training digit, of samples"] = f"{found.near_samples:.3f}"
    rows["the same, of held-out digits"] = f"{found.near_held_out:.3f}"
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def measure(run: Path, each: int = 100, guidance: float | None = None, seed: int = 0) -> Figures:
    """each: samples of each class, about.  guidance: None is the run's own."""
    session = sessions.reopen(run, Placement())
    model, step = sessions.trained_model(run, session)
    data, sampler = session.experiment.data, session.experiment.sampler
    sampler = sampler if guidance is None else replace(sampler, guidance=guidance)
    (digits, labels), (others, other_labels) = (real(data, split) for split in ("train", "validation"))
    classify = fitted(digits, labels)
    with sharding.use(session.mesh):
        found = drawn(model, sampler, data, jax.random.key(seed), each=each)
    # Those of latents say nothing of pixels.
    bits = None
    if not isinstance(data, LatentData):
        bits = evaluate_run(run, Placement(), bits_per_dimension=True)[0]["bits_per_dimension"]
    return Figures(
        step=step,
        known=float(np.mean(classify(others) == other_labels)),
        asked=float(np.mean(classify(found.images) == found.asked)),
        each=None if found.blank is None else shares(classify(found.blank)),
        bits_per_dimension=bits,
        near_samples=float(np.median(nearest(found.images, digits))),
        near_held_out=float(np.median(nearest(others, digits))),
    )


def real(data: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split, [N, Y, X, C] in [-1, 1], and their classes [N], whatever else is told of them."""
    found = data.open(split, batch_size=1, seed=0)
    images: Images = getattr(found, "images", found)
    return images.pixels.astype(np.float32) / 127.5 - 1, np.asarray(images.labels)


def fitted(images: np.ndarray, labels: np.ndarray) -> Classify:
    """A classifier of digits; it is scikit-learn's example for them, of 64 pixels from 0 to 16."""
    from sklearn.svm import SVC

    def pixels(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1)
        return (flat + 1) * 8 * (64 / flat.shape[1]) ** 0.5

    classifier = SVC(gamma=0.001).fit(pixels(images), labels)
    return lambda images: classifier.predict(pixels(images))


def drawn(model: Any, sampler: Any, data: Any, key: jax.Array, *, each: int) -> Drawn:
    """`each` samples of every class and as many in all of none, or so many images of every held-out caption."""
    asked_key, blank_key = jax.random.split(key)
    if isinstance(sampler, CaptionSampler):
        told = data.open("validation", batch_size=1, seed=0)
        labels = np.asarray(told.images.labels)
        sampler = replace(sampler, columns=-(-each * CLASSES // len(labels)))
        tokens = told.batch(0, range(len(labels)))["tokens"]
        return Drawn(sampler.draw(model, tokens, asked_key), labels.repeat(sampler.columns))
    classes = model.config.num_classes
    asked = np.arange(each * classes) % classes
    if isinstance(sampler, LatentSampler):
        sampler = replace(sampler, rows=each, columns=classes)
        return Drawn(data.decoded(sampler.draw(model, data.example_shape, asked_key)), asked)
    sampler: ImageSampler = replace(sampler, rows=each, columns=classes, classes="all")
    blank = replace(sampler, classes="none").draw(model, data.example_shape, blank_key)
    return Drawn(sampler.draw(model, data.example_shape, asked_key), asked, blank)


def shares(found: np.ndarray) -> np.ndarray:
    """The share of each class [classes] among classes [N]."""
    return np.bincount(found, minlength=CLASSES) / len(found)


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Root mean square difference of each image [N, Y, X, C] from the nearest one of `among` [M, Y, X, C]: [N]."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (images, among))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares.min(1), 0) / a.shape[1])


if __name__ == "__main__":
    main()
