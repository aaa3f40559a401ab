"""Positions: a learned table, sinusoids, and rotations of queries and keys."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.layers.linear import Initializer, LayerError, Precision, normal
from zoo.sharding import constrain


class SequenceError(ValueError):
    """A sequence that the model cannot take; the message names the lengths and the mend."""


def check_length(length: int, longest: int | None) -> None:
    """Raises SequenceError for a sequence of more tokens than the model has positions; None: it has no limit."""
    if longest is not None and length > longest:
        raise SequenceError(
            f"a sequence of {length} tokens exceeds the model's max_length {longest}: "
            f"cut it, or build the model with a larger max_length"
        )


class LearnedPositions(nnx.Module):
    """One vector for each of `max_length` positions (Gehring et al. 2017)."""

    def __init__(
        self,
        max_length: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
    ):
        self.compute = precision.compute
        table = init(rngs.params(), (max_length, width), jnp.dtype(precision.parameters))
        self.table = nnx.Param(table, axes=("positions", "embed"))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """The vectors of positions [...], int: [..., D]. A position outside the table gives NaN."""
        table = constrain(self.table[...], None, None)
        vectors = table.at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return vectors.astype(self.compute)


def sinusoids(positions: jax.Array, width: int, *, longest: float = 10000.0, halves: bool = False) -> jax.Array:
    """positions [...] to [..., width] float32: sines in even columns, cosines in odd (Vaswani et al. 2017).

    Column pair i turns once in 2 pi longest^(2i / width) positions. width must be even.
    halves: all sines come first, and the cosines after them (Marian).
    """
    angles = positions[..., None] * _frequencies(width, longest)
    if halves:
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


def grid_sinusoids(grid: tuple[int, int], width: int, *, side: int, longest: float = 10000.0) -> jax.Array:
    """[Y X, width] float32 for a grid of (Y, X) places, row by row: half for the column, half for the row.

    Each half is sines, then cosines, as in the code of MAE (He et al. 2022) and DiT (Peebles and Xie 2023). Whatever
    their number, rows and columns are spread evenly over positions from 0 up to `side`. width must be a multiple of 4.
    """
    pairs = width // 4

    def along(count: int) -> np.ndarray:
        # Made on the host, for precision, and rounded where published implementations round.
        positions = np.arange(count, dtype=np.float32) / np.float32(count / side)
        angles = np.outer(positions.astype(np.float64), longest ** (-np.arange(pairs) / pairs))
        return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)

    rows, columns = (jnp.asarray(along(count)) for count in grid)
    shape = (*grid, 2 * pairs)
    halves = [jnp.broadcast_to(columns[None], shape), jnp.broadcast_to(rows[:, None], shape)]
    return jnp.concatenate(halves, -1).reshape(-1, width)


class Scaling(Protocol):
    """How a model turns pairs of rotary positions that reaches beyond the length that it was first trained with."""

    @property
    def magnitude(self) -> float:
        """What turned features are multiplied by."""
        ...

    def __call__(self, frequencies: np.ndarray, longest: float) -> np.ndarray:
        """Radians per position of each pair, float32, from those of Rotary(longest) as they are."""
        ...


@dataclass(frozen=True)
class LinearScaling:
    """All pairs of rotary positions turn `factor` times slower: positions are interpolated (Chen et al. 2023)."""

    factor: float

    magnitude = 1.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def __call__(self, frequencies: np.ndarray, longest: float) -> np.ndarray:
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True)
class DynamicScaling:
    """Pairs turn slower in sequences beyond the trained length alone, by `factor` and their length (dynamic NTK).

    Within a model's max_length, beyond which it takes no sequence, they turn as they are. Published implementations go
    beyond it, with frequencies that depend on the lengths of the calls before.
    """

    factor: float

    magnitude = 1.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def __call__(self, frequencies: np.ndarray, longest: float) -> np.ndarray:
        return frequencies


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow pairs of rotary positions turn `factor` times slower, fast ones as before (Llama 3.1's released code).

    slow, fast: turns within original_length below which a pair is slow, and from which on it is fast; the frequencies
    between are interpolated.
    """

    factor: float
    slow: float = 1.0
    fast: float = 4.0
    original_length: int = 8192

    magnitude = 1.0

    def __post_init__(self) -> None:
        _check_turns(self)

    def __call__(self, frequencies: np.ndarray, longest: float) -> np.ndarray:
        # Rounded where Hugging Face's implementation rounds, which divides by multiplying with a reciprocal.
        wavelengths = np.reciprocal(frequencies) * np.float32(2 * math.pi)
        turns = np.reciprocal(wavelengths) * np.float32(self.original_length)
        share = (turns - np.float32(self.slow)) / np.float32(self.fast - self.slow)
        slower = frequencies / np.float32(self.factor)
        between = (1 - share) * frequencies / np.float32(self.factor) + share * frequencies
        is_slow = wavelengths > np.float32(self.original_length / self.slow)
        is_fast = wavelengths < np.float32(self.original_length / self.fast)
        return np.where(is_slow, slower, np.where(is_fast, frequencies, between))


@dataclass(frozen=True)
class YarnScaling:
    """Slow pairs turn `factor` times slower, fast ones as before, and features grow (YaRN, Peng et al. 2023, 3.2, 3.4).

    slow, fast: turns within original_length up to which a pair is slow, and from which on it is fast; between them the
    share of either falls and rises from pair to pair.
    growth: what turned features are multiplied by; 0.1 ln(factor) + 1 where None, as the paper has it.
    whole_pairs: whether the ramp begins and ends at a pair, as in the released code.
    """

    factor: float
    slow: float = 1.0
    fast: float = 32.0
    original_length: int = 8192
    growth: float | None = None
    whole_pairs: bool = True

    def __post_init__(self) -> None:
        _check_turns(self)
        if self.growth is not None:
            _check_positive(growth=self.growth)

    @property
    def magnitude(self) -> float:
        if self.growth is not None:
            return self.growth
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0

    def __call__(self, frequencies: np.ndarray, longest: float) -> np.ndarray:
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            """The pair, between whole ones, that turns so often within original_length."""
            return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(longest)

        begin, end = pair_of(self.fast), pair_of(self.slow)
        if self.whole_pairs:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, 2 * pairs - 1)
        end += 0.001 if begin == end else 0.0
        slow = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(begin)) / np.float32(end - begin), 0, 1)
        fast = 1 - slow
        return frequencies / np.float32(self.factor) * (1 - fast) + frequencies * fast


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): turns pairs of a head's features by angles proportional to the position.

    Pair i of H features turns longest^(-2i / H) radians per position.

    fraction: share of the head size that is turned, from its start; the rest passes through.
    interleaved: pairs are neighbours (2i, 2i + 1) as in the paper; else (i, i + half) as in Llama and GPT-NeoX.
    scaling: changes the frequencies, so that a model reaches beyond the length that it was trained with.
    """

    longest: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        _check_positive(longest=self.longest)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, T, N, H] turned by positions [B, T] (or any shape that broadcasts to it); computed in float32."""
        width = int(x.shape[-1] * self.fraction) // 2 * 2
        turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
        angles = positions[..., None, None] * self.frequencies(width)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        if self.scaling is not None and self.scaling.magnitude != 1:
            sin, cos = sin * self.scaling.magnitude, cos * self.scaling.magnitude
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
        else:
            a, b = jnp.split(turned, 2, -1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return jnp.concatenate([turned.astype(x.dtype), rest], -1)

    def frequencies(self, width: int) -> np.ndarray:
        """Radians per position of each of width / 2 pairs, float32.

        A constant made on the host: an accelerator's power is off by more than the last digit, which a position of
        100,000 multiplies. Rounded to float32 where published implementations round.
        """
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequencies = np.reciprocal(np.power(self.longest, exponents.astype(np.float64)).astype(np.float32))
        return frequencies if self.scaling is None else self.scaling(frequencies, self.longest)


def _check_turns(scaling: Llama3Scaling | YarnScaling) -> None:
    named = {name: getattr(scaling, name) for name in ("factor", "slow", "fast", "original_length")}
    _check_positive(**named)
    if scaling.fast <= scaling.slow:
        raise LayerError(f"fast {scaling.fast} is not above slow {scaling.slow}: choose more turns for fast pairs")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise LayerError(f"{name} {value} of rotary positions is no finite number above 0: choose one")


def _frequencies(width: int, longest: float) -> np.ndarray:
    """Radians per position of each of width / 2 pairs, float32; made on the host, for precision."""
    if width % 2:
        raise LayerError(f"sinusoids need an even width and got {width}: choose {width + 1}")
    return (longest ** (-np.arange(0, width, 2) / width)).astype(np.float32)
