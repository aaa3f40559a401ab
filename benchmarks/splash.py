"""The splash attention of JAX and of tokamax at given block sizes, and how their kernels walk their grids.

tokamax's grids run over the blocks that a static mask leaves; JAX's are as wide as the fullest row of blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.attention_cases import Case, Refused
from benchmarks.tpu_bound import Operand, Step
from benchmarks.tpu_walks import BF16, F32, LANES, SUBLANES, row_bytes

Kernel = Callable[..., Any]
"""Of q [N, T, H], scaled, k and v [K, S, H], and segments of queries and keys or None."""


@dataclass(frozen=True)
class Sizes:
    """queries x keys of a block, keys of a tile; steps: `dq_reduction_steps` of tokamax's backward pass."""

    queries: int
    keys: int
    tile: int
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.queries} x {self.keys} / {self.tile}{', 3 parts' if self.steps else ''}"

    @property
    def area(self) -> int:
        return self.queries * self.keys


def jax_kernel(case: Case, forward: Sizes, backward: Sizes | None = None, fused: bool = True) -> Kernel:
    """JAX's. fused: one kernel for all gradients, which keeps a part of the gradient of q for each block of keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = _block_sizes(forward, backward)
    if backward is not None:
        sizes |= {"use_fused_bwd_kernel": fused}
        sizes |= {} if fused else {"block_q_dq": backward.queries, "block_kv_dq": backward.keys}
    mask = masks.MultiHeadMask([_mask(masks, case)] * case.heads)
    kernel = splash.make_splash_mha(mask, block_sizes=splash.BlockSizes(**sizes), head_shards=1, q_seq_shards=1)
    return lambda q, k, v, segments: kernel(q, k, v, segments and splash.SegmentIds(*segments))


def tokamax_kernel(case: Case, forward: Sizes, backward: Sizes | None = None) -> Kernel:
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    sizes = _block_sizes(forward, backward)
    if backward is not None:
        sizes |= {"dq_reduction_steps": backward.steps}
    config = splash.SplashConfig(**sizes, use_experimental_scheduler=True)
    kernel = splash.make_splash_mha_single_device(_mask(masks, case), config=config)
    return lambda q, k, v, segments: kernel(q, k, v, segments and splash.SegmentIds(*segments))


def _block_sizes(forward: Sizes, backward: Sizes | None) -> dict[str, Any]:
    sizes: dict[str, Any] = {"block_q": forward.queries, "block_kv": forward.keys, "block_kv_compute": forward.tile}
    if backward is not None:
        sizes |= {"block_q_dkv": backward.queries, "block_kv_dkv": backward.keys, "block_kv_dkv_compute": backward.tile}
    return sizes


def _mask(masks: Any, case: Case) -> Any:
    """Of one head; documents come as segments."""
    if case.queries != case.keys:
        raise Refused("its causal mask is that of a square")
    square = (case.queries, case.keys)
    if case.window:
        return masks.LocalMask(square, (case.window - 1, 0), 0)
    return masks.CausalMask(square) if case.causal else masks.FullMask(square)


class Splash:
    """Walks of tokamax's splash attention over what a causal mask, with a window, leaves."""

    FORWARD = ("init", "whole", "partial", "end")

    def __init__(self, case: Case, sizes: Sizes) -> None:
        self.heads, self.group = case.batch * case.heads, case.heads // case.kv_heads
        self.row, self.window, self.segments = row_bytes(case, BF16), case.window, case.document is not None
        self.counts, self.sizes = (case.queries // sizes.queries, case.keys // sizes.keys), sizes

    @property
    def backward_regions(self) -> tuple[str, ...]:
        """Two blocks of queries or fewer are written in every step, as the kernel has it."""
        always = self.sizes.steps is None and self.counts[0] <= 2
        return ("init", "whole", "partial") + (() if always else ("write",))

    @property
    def wide(self) -> bool:
        """Whether the parts of the gradient of q are in float32."""
        return self.sizes.steps is None and self.counts[1] > 4

    def _kind(self, i: int, j: int) -> str | None:
        """Of a block of queries and one of keys: "whole", "partial", or None where the static mask empties it."""
        q, k, window = self.sizes.queries, self.sizes.keys, self.window
        first_q, last_q, first_k, last_k = i * q, i * q + q - 1, j * k, j * k + k - 1
        if first_k > last_q or (window and last_k <= first_q - window):
            return None
        inside = last_k <= first_q and not (window and first_k <= last_q - window)
        return "whole" if inside else "partial"

    def forward(self, residuals: bool) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.row, self.segments
        inputs = [Operand(q * row), Operand(k * row), Operand(k * row), Operand(q * LANES * F32)]
        if segments:
            inputs += [Operand(q * LANES * F32), Operand(SUBLANES * k * F32)]
        results = [Operand(q * row, written=True)] + [Operand(q * LANES * F32, written=True)] * residuals
        return inputs + results, self._forward(segments, residuals)

    def _forward(self, segments: bool, residuals: bool) -> Iterator[Step]:
        queries, keys = self.counts
        for n in range(self.heads):
            for i in range(queries):
                active = [(j, kind) for j in range(keys) if (kind := self._kind(i, j))]
                for at, (j, kind) in enumerate(active):
                    runs = {kind: None} | ({"init": None} if at == 0 else {})
                    runs |= {"end": None} if at == len(active) - 1 else {}
                    kv = n // self.group, j
                    yield Step(runs, ((n, i), kv, kv, i, *((i, j) if segments else ()), *[(n, i)] * (1 + residuals)))

    def backward(self) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.row, self.segments
        per_row = Operand(SUBLANES * q * F32)
        inputs = [*[Operand(q * row)] * 2, *[per_row] * 3, Operand(k * row), Operand(k * row)]
        if segments:
            inputs += [per_row, Operand(k * LANES * F32)]
        part = Operand(q * row * (2 if self.wide else 1), written=True)
        before = [] if self.sizes.steps is None else [Operand(q * row)]
        return [*inputs, *before, part, *[Operand(k * row, written=True)] * 2], self._backward(segments)

    def _backward(self, segments: bool) -> Iterator[Step]:
        for n, i, j, kind, first, last in self._order():
            runs = {kind: None} if kind else {}
            runs |= ({"init": None} if first else {}) | ({"write": None} if last else {})
            kv, query = (n // self.group, j), (n, i)
            part = (n, i, j) if self.sizes.steps is None else (n, i, j % 3)
            parts = [part] * (1 if self.sizes.steps is None else 2)
            yield Step(runs, (*[query] * 4, i, kv, kv, *((i, j) if segments else ()), *parts, kv, kv))

    def _order(self) -> Iterator[tuple[int, int, int, str | None, bool, bool]]:
        """(head, block of queries, of keys, kind, whether sums start and end here)."""
        queries, keys = self.counts
        if self.sizes.steps is None:
            for j in range(keys):
                for n in range(self.heads):
                    for i in range(queries):
                        first = n % self.group == 0 and i == 0
                        last = queries > 2 and n % self.group == self.group - 1 and i == queries - 1
                        yield n, i, j, self._kind(i, j), first, last
            return
        for n in range(self.heads):
            for j in range(keys):
                active = [(i, kind) for i in range(queries) if (kind := self._kind(i, j))]
                for at, (i, kind) in enumerate(active):
                    yield n, i, j, kind, at == 0, at == len(active) - 1


class JaxSplash(Splash):
    """Of JAX's: one body for whole and partial blocks, and steps without one, in which the next block is fetched."""

    FORWARD = ("init", "run", "end")
    wide = False

    @property
    def backward_regions(self) -> tuple[str, ...]:
        return ("init", "run", "end")

    def _forward(self, segments: bool, residuals: bool) -> Iterator[Step]:
        """The grid is as wide as the row of blocks that has the most."""
        queries, keys = self.counts
        rows = [[j for j in range(keys) if self._kind(i, j)] for i in range(queries)]
        width = max(map(len, rows))
        for n in range(self.heads):
            for i, row in enumerate(rows):
                for at in range(width):
                    j = row[at] if at < len(row) else 0
                    runs = ({"init": None} if at == 0 else {}) | ({"run": None} if at < len(row) else {})
                    runs |= {"end": None} if at == width - 1 else {}
                    kv = n // self.group, j
                    yield Step(runs, ((n, i), kv, kv, i, *((i, j) if segments else ()), *[(n, i)] * (1 + residuals)))

    def _backward(self, segments: bool) -> Iterator[Step]:
        """Each block of keys meets all of queries: where the kernel is fused, the grid is not cut."""
        queries, keys = self.counts
        columns = [[i for i in range(queries) if self._kind(i, j)] for j in range(keys)]
        for j, column in enumerate(columns):
            after = columns[(j + 1) % keys][0]
            for n in range(self.heads):
                member = n % self.group
                for i in range(queries):
                    ahead = next((x for x in column if x >= i), after)
                    runs = ({"init": None} if i == 0 and member == 0 else {}) | ({"run": None} if i in column else {})
                    runs |= {"end": None} if i == queries - 1 and member == self.group - 1 else {}
                    kv, query, sides = (n // self.group, j), (n, ahead), (ahead, j) if segments else ()
                    yield Step(runs, (*[query] * 4, ahead, kv, kv, *sides, (n, i, j), kv, kv))
