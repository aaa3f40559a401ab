"""Decoding token by token with a cache: greedy or sampled, batched, streamed, and compiled once.

Works with any model that has `features(tokens, cache=)`, `logits(hidden)`, `init_cache(batch_size, length)` and
`config.max_length`, `config.vocab_size`, `config.special_tokens` (see zoo.models.decoder), and with those that read a
source first: `encode(sources, segments=)`, and `init_cache(encoded, length)` (see zoo.models.encoder_decoder). A model
whose states depend on where a prompt ends has `read(tokens, lengths, slots)`, the state that follows each prompt and a
cache, and is given one token at a time from there (see zoo.models.xlnet). Prompts of different length share a batch:
each row stands left-aligned and has its own length, the cache's slots behind it are overwritten as the row grows.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from zoo.kernels.memory import loop_options, platform
from zoo.layers.transformer import unstacked
from zoo.sharding import constrain

Callback = Callable[[int, int], None]

SHORTEST = 32
"""Prompts and rows are padded to a power of two, this at least, so that one compilation serves many lengths."""


class GenerationError(ValueError):
    """A request that cannot be met; the message names the value and the mend."""


class Generation(NamedTuple):
    """tokens: what followed each prompt, without the stop token.  stopped: whether a stop token ended it."""

    tokens: list[list[int]]
    stopped: list[bool]


@partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_p"), meta_fields=("top_k",))
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to top_k and top_p.

    temperature: 0 takes the likeliest token.  top_k: only the k likeliest.  top_p: only the fewest likeliest tokens
    that have at least this probability together (nucleus, Holtzman et al. 2019); it applies to what top_k leaves.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, vocab_size: int) -> None:
        """Raises GenerationError."""
        if not 0 <= self.temperature < math.inf:
            raise GenerationError(
                f"temperature {self.temperature} is no finite number from 0: 0 is greedy, 1 the model's distribution"
            )
        if 0 < self.temperature < 1e-6:
            raise GenerationError(f"temperature {self.temperature} is too small to divide by: 0 is greedy")
        if self.top_k is not None and not is_within(self.top_k, vocab_size):
            raise GenerationError(
                f"top_k {self.top_k!r} is no whole number within 1 and the vocabulary's size {vocab_size}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p {self.top_p} is not within 0 (excluded) and 1")


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """logits [B, V] / temperature, -inf where top_k and top_p exclude the token. Ties at the limit all stay."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(descending, axis=-1)
        # A token stays while those before it have less than top_p together: the first always does.
        stays = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        least = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


class State(NamedTuple):
    """tokens: [B, S], prompts and what followed.  lengths: [B], how many of a row's tokens are real.

    done: [B], rows that a stop token ended.  room: for how many more tokens there is.
    cache: of the model; it holds all real tokens but each row's last.
    """

    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    room: jax.Array
    cache: Any


class Padded(NamedTuple):
    """tokens: [B, P], rows padded on the right to one length.  lengths: [B], how many of each row are real."""

    tokens: Any
    lengths: Any


@partial(jax.jit, static_argnames=("slots", "first"))
def _prefill(
    model: Any,
    prompts: Padded,
    sources: Padded | None,
    room: jax.Array,
    sampling: Sampling | None,
    stop_tokens: jax.Array,
    key: jax.Array,
    *,
    slots: int,
    first: int | None,
) -> State:
    """Runs sources and prompts through the model, and appends one of `room` new tokens, which is `first` if any."""
    tokens, lengths = prompts
    last, cache = read(model, prompts, sources, slots)
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    state = State(tokens, lengths, jnp.zeros(len(tokens), bool), room, cache)
    logits = allowed(model.logits(last), model.config.special_tokens, room, first)
    return _readable(_append(state, logits, sampling, stop_tokens, key))


def allowed(scores: jax.Array, tokens: Any, room: jax.Array, first: int | None = None) -> jax.Array:
    """scores [..., V] of the next token, -inf where a model's special tokens forbid it.

    room: for how many tokens there is, this one included.  first: what it must be, if any.
    """
    if tokens.banned:
        scores = scores.at[..., jnp.array(tokens.banned)].set(-jnp.inf)
    for token, must in ((first, True), (tokens.last, room == 1)):
        if token is not None:
            alone = jnp.where(jnp.arange(scores.shape[-1]) == token, 0.0, -jnp.inf)
            scores = jnp.where(must, alone, scores)
    return scores


def read(model: Any, prompts: Padded, sources: Padded | None, slots: int) -> tuple[jax.Array, Any]:
    """The state [B, D] of each prompt's last token, and a cache that holds all of `prompts`, its padding included."""
    if hasattr(model, "read"):
        return model.read(prompts.tokens, prompts.lengths, slots)
    if sources is None:
        cache = model.init_cache(len(prompts.tokens), slots)
    else:
        real = jnp.arange(sources.tokens.shape[1]) < sources.lengths[:, None]
        cache = model.init_cache(model.encode(sources.tokens, segments=real), slots)
    features = model.features(prompts.tokens, cache=cache)
    last = jnp.take_along_axis(features.hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, features.cache


def _decode(
    model: Any, state: State, steps: jax.Array, sampling: Sampling | None, stop_tokens: jax.Array, key: jax.Array
) -> State:
    """Appends `steps` tokens to each row, fewer where a stop token comes."""

    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        count, state = carry
        last = jnp.take_along_axis(state.tokens, (state.lengths - 1)[:, None], axis=1)
        features = model.features(last, cache=state.cache)
        state = state._replace(cache=features.cache)
        logits = allowed(model.logits(features.hidden[:, 0]), model.config.special_tokens, state.room)
        return count + 1, _append(state, logits, sampling, stop_tokens, key)

    return _readable(jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1])


@functools.cache
def _compiled(target: str) -> Callable[..., State]:
    """`_decode` for a platform; the state given is donated."""
    return jax.jit(_decode, donate_argnames=("state",), compiler_options=loop_options(target))


def _readable(state: State) -> State:
    """The state with tokens whole on every device, so that every host can read them."""
    return state._replace(
        tokens=constrain(state.tokens, None, None),
        lengths=constrain(state.lengths, None),
        done=constrain(state.done, None),
    )


def _append(
    state: State, logits: jax.Array, sampling: Sampling | None, stop_tokens: jax.Array, key: jax.Array
) -> State:
    """Chooses a token for each row from logits [B, V] and appends it where the row goes on; sampling None is greedy."""
    tokens, lengths, done, room, cache = state
    rows = jnp.arange(len(lengths))
    if sampling is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        # A key for each row and place: what a row draws does not depend on the number of rows or on how steps are cut.
        keys = jax.vmap(lambda *where: jax.random.fold_in(jax.random.fold_in(key, where[0]), where[1]))(rows, lengths)
        token = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))
    done = done | (token[:, None] == stop_tokens).any(-1)
    place = jnp.where(done, tokens.shape[1], lengths)
    tokens = tokens.at[rows, place].set(token.astype(tokens.dtype), mode="drop")
    lengths = jnp.where(done, lengths, lengths + 1)
    # A row that is done runs along with the others; cutting its cache back keeps it from growing.
    return State(tokens, lengths, done, room - 1, cache.cut(lengths - 1))


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    key: jax.Array | None = None,
    callback: Callback | None = None,
) -> Generation:
    """Continues each prompt (token ids, at least one) by up to max_new_tokens; see Sampling for the distribution.

    sources: what a model with an encoder reads, one for each prompt; its prompts are what the decoder begins with, the
        start token of the model's config unless given, behind which a first token may be forced.
    stop_tokens: any of them ends a row; None: those of the model's config, which a published model has.
    key: needed where temperature is above 0. The same key, prompts and options give the same tokens.
    callback: called as callback(row, token) for every new token as soon as it is there; stop tokens are not passed.
    Without it, the whole continuation is one call to the device.
    Raises GenerationError.
    """
    sampling = Sampling(temperature, top_k, top_p)
    first = model.config.special_tokens.first if prompts is None else None
    prompts = check_request(model, prompts, sources, max_new_tokens)
    sampling.check(model.config.vocab_size)
    if temperature > 0 and key is None:
        raise GenerationError(f"temperature {temperature} draws at random: give a key, or temperature 0")
    padded, slots = laid_out(model.config, prompts, max_new_tokens)
    options = (
        sampling if temperature > 0 else None,
        stops(model.config, stop_tokens),
        jax.random.key(0) if key is None else key,
    )

    padded_sources = None if sources is None else padded_rows(sources, model.config.max_length)
    state = _prefill(model, padded, padded_sources, np.int32(max_new_tokens), *options, slots=slots, first=first)
    model, decode = unstacked(model), _compiled(platform())
    if callback is None:
        state = decode(model, state, np.int32(max_new_tokens - 1), *options)
    else:
        seen = _emit(state, padded.lengths, callback)
        for _ in range(max_new_tokens - 1):
            if state.done.all():
                break
            state = decode(model, state, np.int32(1), *options)
            seen = _emit(state, seen, callback)
    tokens, ends = np.asarray(state.tokens), np.asarray(state.lengths)
    made = [tokens[row, padded.lengths[row] : ends[row]].tolist() for row in range(len(prompts))]
    return Generation(made, np.asarray(state.done).tolist())


def _emit(state: State, seen: np.ndarray, callback: Callback) -> np.ndarray:
    """Passes on the tokens at places from `seen` [B] on; returns the rows' lengths."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    for row in range(len(lengths)):
        for token in tokens[row, seen[row] : lengths[row]]:
            callback(row, int(token))
    return lengths


def power_of_two(length: int) -> int:
    """The length that arrays for `length` tokens have."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def padded_rows(rows: Sequence[Sequence[int]], longest: int | None) -> Padded:
    """Rows in one array, of `longest` tokens at most, which no row has more than."""
    lengths = np.array([len(row) for row in rows], np.int32)
    length = power_of_two(int(lengths.max()))
    tokens = np.zeros((len(rows), length if longest is None else min(length, longest)), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return Padded(tokens, lengths)


def laid_out(config: Any, prompts: Sequence[Sequence[int]], new: int) -> tuple[Padded, int]:
    """Prompts in one array, and the slots of a cache for them and `new` tokens more."""
    slots = power_of_two(max(map(len, prompts)) + new)
    slots = slots if config.max_length is None else min(slots, config.max_length)
    return padded_rows(prompts, slots), slots


def stops(config: Any, stop_tokens: Sequence[int] | None) -> jax.Array:
    """The tokens that end a row: those given, else the config's own. Raises GenerationError."""
    tokens = config.special_tokens.eos if stop_tokens is None else stop_tokens
    try:
        return jnp.array([operator.index(token) for token in tokens], jnp.int32)
    except TypeError:
        raise GenerationError(f"stop_tokens {tokens!r:.60} are no whole numbers: give a list of token ids") from None


def is_within(count: Any, most: int) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return isinstance(count, SupportsIndex) and 1 <= operator.index(count) <= most


def check_request(
    model: Any, prompts: Sequence[Sequence[int]] | None, sources: Sequence[Sequence[int]] | None, new: int
) -> Sequence[Sequence[int]]:
    """The prompts; raises GenerationError where there are none that the model can continue by `new` tokens."""
    config = model.config
    if not (hasattr(model, "init_cache") or hasattr(model, "read")):
        raise GenerationError(f"a {type(model).__name__} generates nothing: it keeps no cache of what it read")
    if (sources is not None) != hasattr(model, "encode"):
        raise GenerationError(
            "sources given to a model without an encoder: give prompts"
            if sources is not None
            else "no sources given to a model with an encoder: give what it reads as sources=, one for each row"
        )
    if sources is not None:
        sources = checked_rows("source", config, sources, 0, getattr(config, "source_vocab_size", None))
        start = config.special_tokens.start
        if prompts is None and start is None:
            raise GenerationError(
                "the model's config names no start token: give prompts, what each decoder begins with"
            )
        prompts = [[start]] * len(sources) if prompts is None else prompts
        if len(prompts) != len(sources):
            raise GenerationError(f"{len(prompts)} prompts for {len(sources)} sources: give as many of both")
    special = config.special_tokens
    forced_or_banned = (special.first, special.last, *special.banned)
    unknown = [token for token in forced_or_banned if token is not None and not 0 <= token < config.vocab_size]
    if unknown:
        raise GenerationError(
            f"the model's config forces or bans the token {unknown[0]}: the vocabulary is 0 to {config.vocab_size - 1}"
        )
    if not isinstance(new, SupportsIndex):
        raise GenerationError(f"max_new_tokens {new!r} is no whole number: ask for at least one")
    if new < 1:
        raise GenerationError(f"max_new_tokens {new} is below 1: ask for at least one")
    return checked_rows("prompt", config, () if prompts is None else prompts, new)


def checked_rows(
    kind: str, config: Any, rows: Sequence[Sequence[int]], new: int, vocab_size: int | None = None
) -> list[list[int]]:
    """Rows of token ids as lists; raises GenerationError for those that a model cannot take."""
    vocabulary = config.vocab_size if vocab_size is None else vocab_size
    try:
        rows = [[operator.index(token) for token in row] for row in rows]
    except TypeError:
        raise GenerationError(f"{kind}s are no rows of whole numbers: give a list of lists of token ids") from None
    if not rows:
        raise GenerationError(f"no {kind}s given: give at least one")
    for row, tokens in enumerate(rows):
        length, longest = len(tokens), config.max_length
        if not length:
            raise GenerationError(f"{kind} {row} is empty: give at least one token, such as the end of a text")
        if longest is not None and length + new > longest:
            beyond = f" and {new} new ones make {length + new}" if new else ""
            mend = f" or ask for at most {max(longest - length, 0)}" if new else ""
            raise GenerationError(
                f"{kind} {row} has {length} tokens{beyond}, more than the model's max_length {longest}: "
                f"shorten the {kind}{mend}"
            )
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise GenerationError(f"{kind} {row} has token {unknown[0]}: the vocabulary is 0 to {vocabulary - 1}")
    return rows
