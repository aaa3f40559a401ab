"""Captions of scikit-learn's digits, of what is measured of each: which digit, how bold, how slanted.

A digit is bold or thin, and leans, compared with others of its class: 0.8 standard deviations of the class beyond its
mean, in ink, and in slant (the covariance of a pixel's row and column over the variance of its row, weighted by ink).
"""

import numpy as np

from zoo.train.data.splits import content_hash

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FAR = 0.8  # standard deviations


def captions(images: np.ndarray, labels: np.ndarray) -> list[str]:
    """Of digits [N, Y, X] with more ink where values are larger, and their classes [N]; one of three wordings each.

    The wording follows from the image, so that it is the same at every call.
    """
    ink, slant = images.mean((1, 2), dtype=np.float64), slants(images)
    weights = [_far(ink[i], ink[labels == label], "thin", "bold") for i, label in enumerate(labels)]
    leans = [_far(slant[i], slant[labels == label], "left", "right") for i, label in enumerate(labels)]
    rows = zip(images, labels, weights, leans, strict=True)
    return [_worded(content_hash(image.tobytes()), int(label), weight, lean) for image, label, weight, lean in rows]


def slants(images: np.ndarray) -> np.ndarray:
    """How far the ink of images [N, Y, X] goes to the right for each row that it goes up, [N]; no ink, no slant."""
    ink = images.astype(np.float64)
    total = np.maximum(ink.sum((1, 2)), 1e-9)
    y, x = np.mgrid[: ink.shape[1], : ink.shape[2]]
    down = y - (ink * y).sum((1, 2))[:, None, None] / total[:, None, None]
    right = x - (ink * x).sum((1, 2))[:, None, None] / total[:, None, None]
    return -(ink * down * right).sum((1, 2)) / np.maximum((ink * down**2).sum((1, 2)), 1e-9)


def _far(value: float, others: np.ndarray, below: str, above: str) -> str:
    if abs(value - others.mean()) <= _FAR * others.std():
        return ""
    return above if value > others.mean() else below


def _worded(draw: int, digit: int, weight: str, lean: str) -> str:
    leaning = f"leaning {lean}" if lean else ""
    if draw % 3 == 0:
        return ", ".join(part for part in (f"the digit {digit}", weight, leaning) if part)
    words = ("a", weight, "handwritten" if draw % 3 == 1 else "", NAMES[digit], leaning)
    return " ".join(word for word in words if word)
