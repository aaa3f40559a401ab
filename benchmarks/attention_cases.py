"""The attention that models do: sizes, masks, the work in them, and an independent float64 answer.

Shapes: q [B, T, N, H], k and v [B, S, K, H].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.kernels import AttentionError, Mask

CHECKED_ROWS = 32


class Refused(Exception):
    """A case that an implementation cannot run; the message is the reason that its row shows."""


def reason(problem: Exception) -> str:
    """The first line of what went wrong, with its kind where nobody foresaw it."""
    first = next(iter(str(problem).strip().splitlines()), "")
    return first if isinstance(problem, Refused | AttentionError) else f"{type(problem).__name__}: {first}"


@dataclass(frozen=True)
class Case:
    """One call of attention.

    family: what a plot joins; cases of a family differ in length alone.
    causal: query t stands at the end of the keys, at position S - T + t, and sees what is not after it.
    window: of the last so many keys.  document: length of packed documents, which attend within themselves.
    """

    family: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    window: int | None = None
    document: int | None = None

    @property
    def name(self) -> str:
        return f"{self.family}/{self.keys}"

    def needs_array(self, *, windows: bool) -> bool:
        """Whether flags cannot say the mask: there is one for causal, and with `windows` one for causal windows."""
        from_the_end = self.queries != self.keys and (self.causal or self.window is not None)
        window = self.window is not None and not (windows and self.causal)
        return from_the_end or window or self.document is not None

    def mask(self) -> Mask:
        segments = None
        if self.document is not None:
            segments = np.broadcast_to(1 + np.arange(self.keys) // self.document, (self.batch, self.keys))
        first = self.keys - self.queries
        positions = None if not first else (first + np.arange(self.queries), np.arange(self.keys))
        return Mask(causal=self.causal, window=self.window, segments=segments, positions=positions)

    def allowed(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether queries attend to keys, by their indices; broadcasts."""
        distance = query + self.keys - self.queries - key
        keep = np.ones(np.broadcast_shapes(query.shape, key.shape), bool)
        if self.causal:
            keep &= distance >= 0
        if self.window is not None:
            keep &= distance < self.window
        if self.document is not None:
            keep &= query // self.document == key // self.document
        return keep

    def pairs(self) -> int:
        """Pairs of a query and a key that the mask leaves, of one row and head."""
        keys = np.arange(self.keys)
        return sum(int(self.allowed(np.array(query), keys).sum()) for query in range(self.queries))

    def flops(self, mode: str) -> float:
        """FLOPs of the pairs that the mask leaves: two products forward, four backward, recomputation not counted."""
        products = {"forward": 2, "residuals": 2, "backward": 4, "both": 6}[mode]
        return 2.0 * products * self.batch * self.heads * self.head_dim * self.pairs()


def cases(longest: int) -> list[Case]:
    """The suite, with lengths up to `longest`."""
    lengths = [length for length in (1024, 2048, 4096, 8192, 16384, 32768) if length <= longest]
    found = [
        Case("encoder", 4, 512, 512, 12, 12, 64),
        Case("decoder", 2, 1024, 1024, 12, 12, 64, causal=True),
        *[Case("long", 1, length, length, 8, 8, 64, causal=True) for length in lengths],
        Case("packed", 1, 4096, 4096, 8, 8, 64, causal=True, document=512),
        Case("grouped", 1, 2048, 2048, 32, 8, 128, causal=True),
        Case("window", 1, 8192, 8192, 8, 8, 64, causal=True, window=1024),
        Case("decode", 8, 1, 4096, 32, 8, 128, causal=True),
        Case("cross", 4, 256, 1500, 12, 12, 64),
        Case("unet", 4, 256, 256, 4, 4, 128),
        Case("unet", 1, 4096, 4096, 8, 8, 40),
    ]
    return [case for case in found if case.keys <= longest]


class Arrays(NamedTuple):
    """Arrays, or their shapes."""

    q: Any
    k: Any
    v: Any
    gradient: Any


def shapes(case: Case, dtype: str) -> Arrays:
    """What `draw` gives, without the numbers."""
    wide, narrow = (
        jax.ShapeDtypeStruct((case.batch, length, heads, case.head_dim), jnp.dtype(dtype))
        for length, heads in ((case.queries, case.heads), (case.keys, case.kv_heads))
    )
    return Arrays(wide, narrow, narrow, wide)


def draw(case: Case, dtype: str) -> Arrays:
    """Standard normal arguments, and a gradient of the output."""
    random = np.random.default_rng(0)
    return Arrays(*(jnp.asarray(random.standard_normal(x.shape, np.float32), dtype) for x in shapes(case, dtype)))


class Answer(NamedTuple):
    """output [B, R, N, H] and d_q alike of the rows that are checked; d_k, d_v [B, S, K, H]."""

    output: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    d_v: np.ndarray


def checked_rows(case: Case) -> np.ndarray:
    """Queries whose answer is worked out: the first and last, and some between."""
    return np.unique(np.linspace(0, case.queries - 1, CHECKED_ROWS).astype(int))


def reference(case: Case, arrays: Arrays) -> Answer:
    """In float64 numpy, for a gradient that is zero outside `checked_rows`: then the gradients of k and v are exact."""
    rows = checked_rows(case)
    q, k, v, gradient = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    q, gradient = q[:, rows], gradient[:, rows]
    group = case.heads // case.kv_heads
    keep = case.allowed(rows[:, None], np.arange(case.keys))
    output, d_q = np.zeros_like(q), np.zeros_like(q)
    d_k, d_v = np.zeros_like(k), np.zeros_like(v)
    for b in range(case.batch):
        for n in range(case.heads):
            m = n // group
            scores = np.where(keep, q[b, :, n] @ k[b, :, m].T / np.sqrt(case.head_dim), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            output[b, :, n] = weights @ v[b, :, m]
            d_weights = gradient[b, :, n] @ v[b, :, m].T
            d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(case.head_dim)
            d_q[b, :, n] = d_scores @ k[b, :, m]
            d_k[b, :, m] += d_scores.T @ q[b, :, n]
            d_v[b, :, m] += weights.T @ gradient[b, :, n]
    return Answer(output, d_q, d_k, d_v)


def error(case: Case, arrays: Arrays, run: Callable[[Arrays], tuple]) -> float:
    """Largest |a - b| / max(1, |b|max) over output and gradients; `run` gives (output, (d_q, d_k, d_v))."""
    rows = checked_rows(case)
    kept = np.zeros((case.queries, 1, 1), np.float32)
    kept[rows] = 1
    output, (d_q, d_k, d_v) = run(arrays._replace(gradient=arrays.gradient * jnp.asarray(kept, arrays.gradient.dtype)))
    got = Answer(*(np.asarray(x.astype(jnp.float32), np.float64) for x in (output[:, rows], d_q[:, rows], d_k, d_v)))
    pairs = zip(got, reference(case, arrays), strict=True)
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)
