"""Whether distances between sets of images grow as images get worse: digits with noise, and blurred ones.

    python -m benchmarks.image_distances NETWORK        NETWORK: as `zoo eval --features` has it, such as a run of a ViT

Half of the training digits is disturbed and compared with the other half, as the network sees them.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from zoo.diffusion.distances import KernelDistance, frechet, kernel_distance, moments
from zoo.train.data.images import ImageData
from zoo.train.experiment import Placement
from zoo.train.feature_network import FeatureNetwork, open_network

NOISES = (0.05, 0.1, 0.2, 0.4)
BLURS = (0.3, 0.5, 0.8, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--data", default="digits", help="source of images, as --data.source has it")
    options = parser.parse_args()
    network = open_network(options.network, Placement())
    data = ImageData(source=options.data)
    data.prepare()
    print(f"| {network.name} | FID | KID | +- |\n|---|---:|---:|---:|")
    for name, distance, kernel in ladder(network, data.pixels("train")):
        print(f"| {name} | {distance:.3f} | {kernel.value:.4f} | {kernel.deviation:.4f} |")


def ladder(network: FeatureNetwork, pixels: np.ndarray) -> Iterator[tuple[str, float, KernelDistance]]:
    """Distances of one half of pixels, uint8 [N, Y, X, C], from the other: as it is, and disturbed more and more."""
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    half, other = np.array_split(pixels, 2)
    steps = {"as they are": half}
    steps |= {f"noise of {sigma:g}": noisy(half, sigma) for sigma in NOISES}
    steps |= {f"blur of {sigma:g} pixels": blurred(half, sigma) for sigma in BLURS}
    real = network.features(other)
    for name, images in steps.items():
        seen = network.features(images)
        yield name, frechet(moments([seen]), moments([real])), kernel_distance(seen, real)


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """With Gaussian noise; sigma: of images from -1 to 1."""
    noise = 127.5 * sigma * np.random.default_rng(1).standard_normal(pixels.shape)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """By a Gaussian of deviation `sigma`, in pixels; what lies outside is the pixel at the edge."""
    from scipy.ndimage import gaussian_filter

    return np.round(gaussian_filter(pixels.astype(np.float64), (0, sigma, sigma, 0), mode="nearest")).astype(np.uint8)


if __name__ == "__main__":
    main()
