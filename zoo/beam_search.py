"""Beam search: the likeliest continuations, found W at a time, with a cache and compiled once.

The search is that of Hugging Face's `generate(num_beams=W)`, without its rules of n-grams and least lengths. At each
step the continuations of all beams compete; one that ends with a stop token and is among the W best leaves the beam for
the W best that ended, whose scores are divided by their length to the power of a penalty (Wu et al. 2016, arXiv
1609.08144, section 7, has a like one).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.generation import (
    GenerationError,
    Padded,
    allowed,
    check_request,
    is_within,
    laid_out,
    padded_rows,
    power_of_two,
    read,
    stops,
)
from zoo.layers.transformer import unstacked
from zoo.sharding import constrain


class Beams(NamedTuple):
    """For each prompt, best first: the tokens that followed it, without the stop token, and their scores.

    There are fewer than num_beams where the model's forced tokens leave no others.
    A score is the sum of log-probabilities, the stop token's included, over the number of tokens ^ length_penalty.
    """

    tokens: list[list[list[int]]]
    scores: list[list[float]]


class Hypotheses(NamedTuple):
    """W continuations of each prompt.  tokens: [B, W, S].  lengths: [B, W], stop token included.  scores: [B, W]."""

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array

    def best(self, count: int) -> tuple["Hypotheses", jax.Array]:
        """The `count` best of them, best first, and which they are [B, count]."""
        chosen = jax.lax.top_k(self.scores, count)[1]
        return self.take(chosen), chosen

    def take(self, chosen: jax.Array) -> "Hypotheses":
        rows = jnp.arange(len(chosen))[:, None]
        return Hypotheses(*(x[rows, chosen] for x in self))


class State(NamedTuple):
    """running: those that go on, scores not yet divided.  ended: the best that have ended, -inf where there is none.

    open: [B], whether a prompt's ended ones can still be bettered.  cache: of the model, B * W rows.
    """

    running: Hypotheses
    ended: Hypotheses
    open: jax.Array
    cache: Any


@partial(jax.jit, static_argnames=("slots", "num_beams", "room", "early", "first"))
def _search(
    model: Any,
    prompts: Padded,
    sources: Padded | None,
    steps: jax.Array,
    stop_tokens: jax.Array,
    penalty: jax.Array,
    *,
    slots: int,
    num_beams: int,
    room: int,
    early: bool,
    first: int | None,
) -> Hypotheses:
    """Continues prompts by up to `steps` tokens, of which `first` is the first if any; `room` is the S of them."""
    batch_size = len(prompts.tokens)
    last, cache = read(model, prompts, sources, slots)
    shape = (batch_size, num_beams)
    none = Hypotheses(jnp.zeros((*shape, room), jnp.int32), jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf))
    # All beams are alike at first: the continuations of one compete.
    one = none._replace(scores=none.scores.at[:, 0].set(0.0))
    state = State(one, none, jnp.ones(batch_size, bool), cache.cut(prompts.lengths).repeated(num_beams))
    model, special = unstacked(model), model.config.special_tokens

    def grow(state: State, logits: jax.Array, first: int | None = None) -> State:
        logp = allowed(jax.nn.log_softmax(logits), special, steps - state.running.lengths[0, 0], first)
        return _grow(state, logp, stop_tokens=stop_tokens, steps=steps, penalty=penalty, early=early)

    def unfinished(state: State) -> jax.Array:
        return (state.running.lengths[0, 0] < steps) & state.open.any()

    def step(state: State) -> State:
        tokens, length = state.running.tokens, state.running.lengths[0, 0]
        newest = jax.lax.dynamic_index_in_dim(tokens, length - 1, axis=2).reshape(-1, 1)
        features = model.features(newest, cache=state.cache)
        return grow(state._replace(cache=features.cache), model.logits(features.hidden[:, 0]))

    state = grow(state, jnp.repeat(model.logits(last), num_beams, axis=0), first)
    ended = jax.lax.while_loop(unfinished, step, state).ended
    # Whole on every device, so that every host can read them.
    return Hypotheses(*(constrain(x, *(None,) * x.ndim) for x in ended))


def _grow(
    state: State,
    logp: jax.Array,
    *,
    stop_tokens: jax.Array,
    steps: jax.Array,
    penalty: jax.Array,
    early: bool,
) -> State:
    """One more token for each running hypothesis, from its log-probabilities [B W, V]."""
    running, ended = state.running, state.ended
    batch_size, num_beams, _ = running.tokens.shape
    length = running.lengths[0, 0] + 1
    logp = logp.reshape(batch_size, num_beams, -1) + running.scores[..., None]
    # So many that W of them go on, even if every beam's best continuations are stop tokens.
    kept = max(2, 1 + len(stop_tokens)) * num_beams
    scores, chosen = jax.lax.top_k(logp.reshape(batch_size, -1), min(kept, logp[0].size))
    parents, token = chosen // logp.shape[-1], chosen % logp.shape[-1]
    grown = running.take(parents)
    tokens = jax.lax.dynamic_update_index_in_dim(grown.tokens, token[..., None], length - 1, axis=2)
    grown = Hypotheses(tokens, jnp.full_like(token, length), scores)

    ends = (token[..., None] == stop_tokens).any(-1) | (length >= steps)
    going_on = grown._replace(scores=jnp.where(ends, -jnp.inf, scores))
    running, survivors = going_on.best(num_beams)
    admitted = ends & (jnp.arange(ends.shape[1]) < num_beams) & state.open[:, None]
    new = grown._replace(scores=jnp.where(admitted, scores / length**penalty, -jnp.inf))
    ended, _ = Hypotheses(*(jnp.concatenate(both, axis=1) for both in zip(ended, new, strict=True))).best(num_beams)

    complete = jnp.isfinite(ended.scores).all(1)
    betterable = running.scores[:, 0] / length**penalty > ended.scores[:, -1]
    open = state.open & (~complete | (betterable & (not early)))
    beams = jnp.arange(batch_size)[:, None] * num_beams + jnp.take_along_axis(parents, survivors, axis=1)
    return State(running, ended, open, state.cache.rows(beams.reshape(-1)))


def beam_search(
    model: Any,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    stop_tokens: Sequence[int] | None = None,
) -> Beams:
    """The num_beams likeliest continuations found of each prompt (token ids, at least one), by up to max_new_tokens.

    length_penalty: 0 compares sums of log-probabilities, 1 their means; above it, longer ones win more often.
    early_stopping: end with a prompt as soon as num_beams continuations have ended; else when none that is running
        looks better, at its present length, than the worst of those.
    stop_tokens: any of them ends a continuation; None: those of the model's config.
    Models and sources are those that `generate` takes. Raises GenerationError.
    """
    first = model.config.special_tokens.first if prompts is None else None
    prompts = check_request(model, prompts, sources, max_new_tokens)
    if not is_within(num_beams, model.config.vocab_size):
        raise GenerationError(
            f"num_beams {num_beams!r} is no whole number within 1 and the vocabulary's {model.config.vocab_size}"
        )
    if not np.isfinite(length_penalty):
        raise GenerationError(f"length_penalty {length_penalty} is no finite number: 1 compares means, 0 sums")
    padded, slots = laid_out(model.config, prompts, max_new_tokens)
    stop_array = stops(model.config, stop_tokens)
    found = _search(
        model,
        padded,
        None if sources is None else padded_rows(sources, model.config.max_length),
        np.int32(max_new_tokens),
        stop_array,
        np.float32(length_penalty),
        slots=slots,
        num_beams=num_beams,
        room=power_of_two(max_new_tokens),
        early=early_stopping,
        first=first,
    )
    stop = set(np.asarray(stop_array).tolist())
    tokens, ends, scores = (np.asarray(x) for x in found)
    real = np.isfinite(scores)
    made = [
        [_cut(row[:end].tolist(), stop) for row, end in zip(tokens[i, real[i]], ends[i, real[i]], strict=True)]
        for i in range(len(prompts))
    ]
    return Beams(made, [scores[i, real[i]].tolist() for i in range(len(prompts))])


def _cut(tokens: list[int], stop: set[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] in stop else tokens
