"""Fused linear map and softmax cross entropy: the loss of a vocabulary whose logits are never held at once.

The positions are scored a chunk at a time, and a chunk's gradients are computed with its loss: the total is a scalar,
its cotangent only scales them, so that nothing is scored twice (as in Liger Kernel, Hsu et al. 2024,
https://arxiv.org/abs/2410.10989). A call that is not differentiated computes no gradient.

Over a mesh all of it runs inside one shard_map. Of a sharded vocabulary every device scores its slice; what the
devices exchange of it are maxima, sums of exponentials and target logits (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3), and the gradient of `hidden`, once a chunk. The kernel's gradient is
summed in float32 over the chunks of a device, and over the devices once, at the end.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.typing import ArrayLike

from zoo import sharding
from zoo.kernels import layout
from zoo.kernels.layout import Names
from zoo.kernels.memory import from_bits, materialized, to_bits
from zoo.kernels.problem import varying_axes, varying_over

CHUNK_BYTES = 2**27
"""Float32 logits of one chunk on one device: some hundred tokens of a large vocabulary, whose products are wide enough
to be bound by arithmetic, and all tokens of a small one."""

_TWO_WAYS = (
    "name their axes with partition=PartitionSpec(batch, length, vocabulary) or call it under zoo.sharding.use(mesh)"
)

Sums = dict[str, jax.Array]


class LossError(ValueError):
    """Arguments of a loss that do not fit; one line that names the thing, the value and the mend."""


class Cut(NamedTuple):
    """Mesh axes that cut B, T, V, and D of the kernel; those of `width` are among those of `batch` and `length`."""

    batch: Names = ()
    length: Names = ()
    vocabulary: Names = ()
    width: Names = ()

    @property
    def tokens(self) -> Names:
        return self.batch + self.length


class _Call(NamedTuple):
    """What is fixed of a call; padded: whether V exceeds the vocabulary.  mesh: of the shard_map, None for none."""

    label_smoothing: float
    z_loss: float
    vocabulary: int
    padded: bool
    precision: str | None
    chunk: int | None
    mesh: Mesh | AbstractMesh | None
    cut: Cut


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocabulary: int | None = None,
    chunk: int | None = None,
    precision: str | None = None,
    partition: layout.Partition = None,
) -> tuple[jax.Array, Sums]:
    """Weighted sum of token losses under the logits `hidden @ kernel + bias`, differentiable once, in these three.

    hidden [B, T, D], kernel [D, V], targets [B, T] int32, weights [B, T], bias [V] or none; operands of the products
    are of the dtype of hidden, logits, sums and reductions over devices float32.
    Loss of a token: -sum_v q_v log p_v + z_loss * log(Z)^2, where q puts 1 - label_smoothing on the target and spreads
    the rest evenly over the vocabulary (Szegedy et al. 2016, section 7), Z normalises p (PaLM, section 5).
    Returns the total and the sums `nll` (nats, without smoothing and z), `correct`, `z` (log(Z)^2), all [] float32; the
    sums are figures and have no gradient.

    vocabulary: entries of V that are real; those behind only pad: no probability, no gradient. All where None.
    chunk: positions of a row that are scored at a time; where None, as many as keep a device's logits in CHUNK_BYTES.
    precision: of the products, as in jax.lax.dot_general.
    partition: how [B, T, V] are cut over the mesh: a PartitionSpec, or a NamedSharding where no mesh is set. Not needed
        under `zoo.sharding.use` or an Explicit mesh, which also say how the kernel is cut over D. Inside a caller's
        shard_map the sums are of its part of the tokens, and V must be whole.

    Raises LossError, one line, where arguments do not fit.
    """
    arrays = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    arrays += () if bias is None else (jnp.asarray(bias),)
    entries = arrays[1].shape[-1]
    vocabulary = entries if vocabulary is None else vocabulary
    _check(*arrays, vocabulary=vocabulary, chunk=chunk)
    mesh, cut = _find(*arrays[:2], partition)
    call = _Call(label_smoothing, z_loss, vocabulary, vocabulary < entries, precision, chunk, mesh, cut)
    return _laid_out(call, *arrays)


@partial(jax.jit, static_argnums=0, inline=True)
def _laid_out(call: _Call, *arrays: jax.Array) -> tuple[jax.Array, Sums]:
    """The loss of arrays that lie as it wants them: what brings them there is differentiated as it stands."""
    if call.mesh is not None and AxisType.Explicit in call.mesh.axis_types:
        arrays = layout.resharded(call.mesh, _specs(call.cut)[: len(arrays)], arrays)
    return _loss(call, *varying_over(arrays, varying_axes(arrays)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(call: _Call, *arrays: jax.Array) -> Any:
    return _run(call, False, *arrays)[0]


def _forward(call: _Call, *arrays: jax.Array) -> tuple[Any, Any]:
    return _run(call, True, *arrays)


def _backward(call: _Call, gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    hidden, kernel, *bias = ((cotangents[0] * g).astype(g.dtype) for g in gradients)
    return hidden, kernel, None, None, *bias


_loss.defvjp(_forward, _backward)


def _run(call: _Call, differentiated: bool, *arrays: jax.Array) -> tuple[Any, Any]:
    """(total, sums) and the gradients of hidden, kernel and a bias, or (), over all devices."""
    local = partial(_local, call, differentiated)
    if call.mesh is None:
        return local(*arrays)
    hidden, kernel, _, _, *bias = specs = _specs(call.cut)[: len(arrays)]
    out_specs = PartitionSpec(), (hidden, kernel, *bias) if differentiated else ()
    # Its derivative is written out, with every reduction in it: nobody asks what varies over which axes.
    return jax.shard_map(local, mesh=call.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def _local(call: _Call, differentiated: bool, *arrays: jax.Array) -> tuple[Any, Any]:
    """What `_run` gives, on one device of its shard_map."""
    cut, (hidden, kernel, targets, weights, *bias) = call.cut, arrays
    # As an embedding's table lies: that of a tied head is read in place, and its gradient summed in place.
    table = kernel.T.astype(hidden.dtype)
    if cut.width:
        table = jax.lax.all_gather(table, cut.width, axis=1, tiled=True)
    count, size = _chunks(call.chunk, hidden.shape[0], hidden.shape[1], kernel.shape[1])

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        x, targets, weights = xs
        x = from_bits(x, hidden.dtype)
        each, d_logits = _score(call, table, x, targets, weights, *bias)
        if not differentiated:
            return carry, (each, ())
        d_table, *d_bias = carry
        d_exact = d_logits()
        d_logits = d_exact.astype(x.dtype)
        d_x = _sum_over(cut.vocabulary, _dot(call, d_logits, table, (2,), (0,)))
        d_table += _dot(call, d_logits, x, (0, 1), (0, 1))
        return (d_table, *(d + d_exact.sum((0, 1)) for d in d_bias)), (each, to_bits(d_x.astype(x.dtype)))

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (table, *bias)) if differentiated else ()
    start = varying_over(start, varying_axes(arrays))
    pieces = tuple(_cut(x, count, size) for x in (to_bits(hidden), targets, weights))
    summed, (each, d_pieces) = jax.lax.scan(body, start, pieces, unroll=count == 1)
    each = jax.tree.map(lambda x: _sum_over(cut.tokens, x.sum(0)), each)
    if not differentiated:
        return each, ()
    d_table, *d_bias = summed
    d_hidden = from_bits(_joined(d_pieces, hidden.shape[1]), hidden.dtype)
    if cut.width:
        d_table = jax.lax.psum_scatter(d_table, cut.width, scatter_dimension=1, tiled=True)
    d_table = _sum_over(tuple(axis for axis in cut.tokens if axis not in cut.width), d_table)
    d_bias = [_sum_over(cut.tokens, d).astype(x.dtype) for d, x in zip(d_bias, bias, strict=True)]
    # Written first: XLA's CPU library lacks the bfloat16 product that a transpose merged into it would make.
    return each, (d_hidden, materialized(d_table).T.astype(kernel.dtype), *d_bias)


def _score(
    call: _Call,
    table: jax.Array,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[Any, Any]:
    """(total, sums) of one chunk x [B, t, D], and a function that gives the gradient of its logits [B, t, V]."""
    axes, smoothing = call.cut.vocabulary, call.label_smoothing
    first = jax.lax.axis_index(axes) * len(table) if axes else 0
    index = first + jnp.arange(len(table))
    real = index < call.vocabulary
    logits = _dot(call, x, table, (2,), (1,))
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if call.padded:
        logits = materialized(jnp.where(real, logits, -jnp.inf))

    largest = logits.max(-1)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    sums = [jnp.exp(logits - largest[..., None]).sum(-1), _at(logits, targets - first)]
    if smoothing:
        sums.append(jnp.where(real, logits, 0).sum(-1))
    z, at_target, *of_logits = _sum_over(axes, tuple(sums))
    lse = largest + jnp.log(z)
    losses = lse - at_target + call.z_loss * lse**2
    if smoothing:
        losses += smoothing * (at_target - of_logits[0] / call.vocabulary)
    figures = {"nll": lse - at_target, "correct": at_target == largest, "z": lse**2}
    each = jax.tree.map(lambda x: jnp.sum(weights * x), (losses, figures))

    def d_logits() -> jax.Array:
        """w ((1 + 2 z log Z) p - q), in one pass over the logits."""
        p = jnp.exp(logits - lse[..., None])
        q = jnp.where(index == targets[..., None], 1 - smoothing, 0) + smoothing / call.vocabulary * real
        return weights[..., None] * ((1 + 2 * call.z_loss * lse)[..., None] * p - q)

    return each, d_logits


def _at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits[..., targets], and 0 where the target is not among them: another device's, or none."""
    inside = (targets >= 0) & (targets < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[..., None], -1, mode="promise_in_bounds")
    return jnp.where(inside, found[..., 0], 0)


def _dot(call: _Call, a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(
        a, b, ((a_axes, b_axes), ((), ())), precision=call.precision, preferred_element_type=jnp.float32
    )


def _sum_over(axes: Names, x: Any) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _chunks(chunk: int | None, rows: int, length: int, vocabulary: int) -> tuple[int, int]:
    """Number and size of the chunks of `length` positions: `chunk`, or the first of halves that CHUNK_BYTES hold."""
    if chunk is None:
        chunk = length
        while chunk > 1 and 4 * rows * chunk * vocabulary > CHUNK_BYTES:
            chunk = -(-chunk // 2)
    size = min(chunk, length)
    return -(-length // size), size


def _cut(x: jax.Array, count: int, size: int) -> jax.Array:
    """[B, T, ...] as [count, B, size, ...], with zeros behind T.

    Chunk j holds the positions congruent to j, which leaves them where they are should T be cut over a mesh.
    """
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], size, count, *x.shape[2:]), 2, 0)


def _joined(pieces: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(pieces, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _find(hidden: jax.Array, kernel: jax.Array, partition: layout.Partition) -> tuple[Mesh | AbstractMesh | None, Cut]:
    """The mesh to cut over, None for none, and how: from what `layout.find` goes by for attention."""
    mesh, spec = layout.given(hidden, partition, LossError)
    if mesh is None:
        return None, Cut()
    if spec is not None and len(spec) > 3:
        raise LossError(f"partition {spec} has {len(spec)} entries: name the mesh axes of [B, T, V]")
    if manual := layout.axes_of_type(mesh, AxisType.Manual):
        _check_manual(spec or PartitionSpec(), mesh, manual)
        return None, Cut()
    shape = (*hidden.shape[:2], kernel.shape[1])
    explicit, rules, width = layout.axes_of_type(mesh, AxisType.Explicit), sharding.active(), None
    if spec is None and explicit:
        width, columns = jax.typeof(kernel).sharding.spec
        rows = jax.typeof(hidden).sharding.spec[:2]
        taken = {axis for entry in rows for axis in layout.names_of(entry)}
        spec = PartitionSpec(*rows, tuple(axis for axis in layout.names_of(columns) if axis not in taken))
    elif spec is None and rules is not None:
        spec = sharding.partition_spec(("act_batch", "act_length", "act_vocab"), shape, *rules)
        width = sharding.partition_spec(("embed", None), kernel.shape, *rules)[0]
    elif spec is None and layout.maybe_sharded(mesh, hidden, kernel):
        raise LossError(f"a loss of arrays on a mesh of {layout.sizes(mesh)}: {_TWO_WAYS}")
    cut = Cut(*layout.named(spec or PartitionSpec(), mesh, LossError))
    layout.check_divides(mesh, LossError, zip(("B", "T", "V"), shape, cut[:3], strict=True))
    # A width cut over other axes is gathered before: there is nothing to reduce over them.
    cut = cut._replace(width=tuple(axis for axis in layout.names_of(width) if axis in cut.tokens))
    return (mesh, cut) if any(cut) or explicit else (None, Cut())


def _check_manual(spec: PartitionSpec, mesh: Mesh | AbstractMesh, manual: Names) -> None:
    cut = Cut(*layout.named(spec, mesh, LossError))
    if axes := [axis for axis in cut.vocabulary if axis in manual]:
        raise LossError(
            f"V is cut over {'/'.join(axes)} inside shard_map: gather the kernel first with "
            "jax.lax.all_gather(..., axis=1, tiled=True), or call linear_cross_entropy outside"
        )


def _specs(cut: Cut) -> tuple[PartitionSpec, ...]:
    """Of hidden, kernel, targets, weights and a bias."""
    batch, length, vocabulary, width = (names or None for names in cut)
    tokens = PartitionSpec(batch, length)
    of_vocabulary = PartitionSpec(vocabulary)
    return PartitionSpec(batch, length, None), PartitionSpec(width, vocabulary), tokens, tokens, of_vocabulary


def _check(
    hidden: Any, kernel: Any, targets: Any, weights: Any, *bias: Any, vocabulary: int, chunk: int | None
) -> None:
    if hidden.ndim != 3:
        raise LossError(f"hidden has shape {hidden.shape}: it must be [B, T, D]")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[2]:
        raise LossError(f"the kernel has shape {kernel.shape}: it must be [D, V] with hidden's D={hidden.shape[2]}")
    for name, x in (("targets", targets), ("weights", weights)):
        if x.shape != hidden.shape[:2]:
            raise LossError(f"{name} have shape {x.shape}: they must be {hidden.shape[:2]}, one for each of hidden")
    for x in bias:
        if x.shape != kernel.shape[1:]:
            raise LossError(f"the bias has shape {x.shape}: it must be [V] with the kernel's V={kernel.shape[1]}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise LossError(f"targets are {targets.dtype}: they must be integers, entries of the vocabulary")
    if not 1 <= vocabulary <= kernel.shape[1]:
        raise LossError(
            f"vocabulary {vocabulary} is not within the kernel's V={kernel.shape[1]}: give what is real of V"
        )
    if chunk is not None and chunk < 1:
        raise LossError(f"chunk {chunk} is too small: choose a whole number from 1")
