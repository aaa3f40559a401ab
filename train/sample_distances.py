"""How far the samples of a run are from real images, and these from one another, as a feature network sees them."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from zoo import sharding
from zoo.diffusion.distances import KernelDistance, frechet, kernel_distance, moments
from zoo.train import run_folder
from zoo.train import session as sessions
from zoo.train.experiment import Placement, UserError
from zoo.train.feature_network import FeatureNetwork, open_network
from zoo.train.processes import on_first
from zoo.train.progress import waiting

FEWEST = 100
"""Images of a set; of fewer, neither distance says anything. Those of training are also halved."""

PART = 256  # real images read at once


class Distance(NamedTuple):
    """Between two sets, `of` one and `to` another, which are named with their numbers of images."""

    of: str
    to: str
    frechet: float
    kernel: KernelDistance


class Distances(NamedTuple):
    """network: what the features are of.  width: numbers of one image.

    rows: of samples from held-out images and from training images; behind each, as nearly as there are images for it,
    the same of as many training images in the place of samples: what there is between real ones.
    """

    network: str
    width: int
    rows: list[Distance]


def distances(
    folder: Path,
    placement: Placement,
    features: str,
    *,
    samples: int,
    real: int,
    seed: int = 0,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Distances:
    """Of `samples` images that the newest checkpoint of a run draws, as its own sampler does.

    features: names a network, see zoo.train.feature_network.  real: held-out and training images that are looked at,
    each at most; where there are more, `seed` chooses.  changes: fields of the sampler that are to be others.
    Raises UserError, or what reading and drawing raise.
    """
    session = sessions.reopen(folder, placement)
    experiment = session.experiment
    sampler, data = experiment.sampler, experiment.data
    if not hasattr(sampler, "draws"):
        raise UserError(f"--features is of runs that draw images, and {experiment.name} draws none: leave it out")
    _check_enough("--samples", samples, FEWEST)
    _check_enough("--real-images", real, 2 * FEWEST)
    sampler = replace(sampler, **changes)
    sampler.check(experiment.model, data)
    network = open_network(features, placement)
    on_first(data.prepare)
    on_first(lambda: run_folder.check_data(folder, session.dataset("train").info))
    held_out, train = (data.pixels(split) for split in ("validation", "train"))
    _check_enough("held-out images:", len(held_out), FEWEST)
    _check_enough("training images:", len(train), 2 * FEWEST)
    seen = [_seen(network, *_chosen(pixels, real, seed), "real image") for pixels in (held_out, train)]
    model, _ = sessions.trained_model(folder, session)
    ways = sharding.batch_ways(session.mesh)
    rows = min(samples, experiment.batch_size // experiment.accumulate)
    with sharding.use(session.mesh):
        drawn = sampler.draws(model, data, jax.random.key(seed), samples, -(-rows // ways) * ways)
        of_samples = _seen(network, samples, map(_as_stored, drawn), "sample")
    return compared(network, of_samples, *seen)


def _check_enough(what: str, count: int, fewest: int) -> None:
    if count < fewest:
        raise UserError(f"{what} {count} are too few for a distance: it takes {fewest} or more")


def compared(network: FeatureNetwork, samples: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> Distances:
    """By features [N, D] of the three sets; those of training are in no order."""
    half = min(len(samples), len(train) // 2)
    rows = [
        _distance("samples", samples, "held out", held_out),
        _distance("training", train[: len(samples)], "held out", held_out),
        _distance("samples", samples, "training", train),
        _distance("training", train[:half], "others", train[half:]),
    ]
    return Distances(network.name, samples.shape[1], rows)


def _distance(of: str, a: np.ndarray, to: str, b: np.ndarray) -> Distance:
    # In parts, so that no float64 copy of all is made.
    found = [moments(np.array_split(features, -(-len(features) // 4096))) for features in (a, b)]
    return Distance(f"{len(a):,} {of}", f"{len(b):,} {to}", frechet(*found), kernel_distance(a, b))


def _chosen(pixels: np.ndarray, most: int, seed: int) -> tuple[int, Iterator[np.ndarray]]:
    """How many of the images are looked at, and these, in any order and in parts."""
    chosen = np.random.default_rng(seed).permutation(len(pixels))[:most]
    return len(chosen), (pixels[chosen[first : first + PART]] for first in range(0, len(chosen), PART))


def _as_stored(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as a file holds them, uint8."""
    if not np.isfinite(images).all():
        raise UserError("samples are not finite: the run did not learn to draw")
    return np.round((images + 1) * 127.5).astype(np.uint8)


def _seen(network: FeatureNetwork, count: int, batches: Iterator[np.ndarray], kind: str) -> np.ndarray:
    """Features [count, D] of images that come in batches; a terminal shows how far it is."""
    found, done, began = [], 0, time.perf_counter()
    display = waiting(count, kind)
    try:
        for batch in batches:
            found.append(network.features(batch))
            done += len(batch)
            display.update(done, {"step_seconds": (time.perf_counter() - began) / done})
    finally:
        display.close()
    return np.concatenate(found)
