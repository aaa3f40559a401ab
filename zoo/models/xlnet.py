"""XLNet: tokens are predicted in any order, each from all that come before it in that order, on either side.

Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding" (arXiv 1906.08237), and the
released weights: post-norm blocks with relative positions (zoo.layers.relative), no bias in attention, every weight and
added vector from N(0, 0.02^2), biases 0.

One module bears every published head; the config says which.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, Head, LayerError, Linear, Precision, check_sizes, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import SequenceError
from zoo.layers.relative import (
    Pairs,
    RelativeAttention,
    RelativeBlock,
    distance_vectors,
    hidden_pairs,
    in_order,
    run_relative,
    segments_differ,
)
from zoo.layers.transformer import Intermediates, Stack
from zoo.models.published import (
    LABELS,
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    activation,
    check_head,
    flag,
    head,
    linear,
    norm,
    number,
    published_activation,
    published_labels,
    read_labels,
    require,
    size,
)
from zoo.sharding import constrain

HEADS = {
    "none": "XLNetModel",
    "lm": "XLNetLMHeadModel",
    "sequence_classification": "XLNetForSequenceClassification",
    "multiple_choice": "XLNetForMultipleChoice",
    "token_classification": "XLNetForTokenClassification",
    "question_answering": "XLNetForQuestionAnsweringSimple",
}
"""Heads, and their classes of Hugging Face transformers."""

SUMMARISED = ("sequence_classification", "multiple_choice")
"""Heads that score a row by tanh of a linear map of its last token's state."""

ATTENTION = {"two_way": "bi", "causal": "uni"}
"""What contents attend to unless an order says otherwise, and what a published config calls it."""

SPECIAL_TOKENS = SpecialTokens(bos=1, eos=(2,), pad=5)


@dataclass(frozen=True)
class XLNetConfig:
    """An XLNet's sizes; the defaults are those of XLNet base, cased, bare.

    head: a name in HEADS.
    attention: a name in ATTENTION; "causal" is Transformer-XL's.
    memory_length: states of a layer that are remembered from one segment to the next, the last ones; None: all.
    reuse_length: states of each segment that are remembered, the first ones; None: all.
    longest_distance: what distances beyond it count as; None: themselves.
    remembers: whether generation keeps the states of what is written, but for the last two tokens, as published models
        do unless told; else they are computed anew for each token, from all that is written by then.
    labels: names of the classes of "sequence_classification" and "token_classification".
    problem_type: how classes are read, a name in PROBLEMS (softmax, sigmoid, or values); None where it is not said.
    dropout: of embeddings, vectors of distances, attention weights, feed-forward layers, residual branches and results.
    summary_dropout: of what rows are scored from.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 32000
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    head: str = "none"
    attention: str = "two_way"
    memory_length: int | None = None
    reuse_length: int | None = None
    longest_distance: int | None = None
    remembers: bool = True
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    summary_dropout: float = 0.1
    special_tokens: SpecialTokens = SPECIAL_TOKENS
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("vocab_size", "num_layers", "width", "num_heads", "mlp_width")
        limits = ("memory_length", "reuse_length", "longest_distance")
        limits = tuple(name for name in limits if getattr(self, name) is not None)
        check_sizes(**{name: getattr(self, name) for name in names + limits})
        check_head(self, HEADS)
        if self.attention not in ATTENTION:
            raise LayerError(f"attention {self.attention!r} is unknown: choose one of {', '.join(ATTENTION)}")
        if self.width % self.num_heads:
            raise LayerError(f"width {self.width} is no multiple of num_heads {self.num_heads}: choose another")

    @property
    def classes(self) -> int:
        """Scores of a row, or of a token, but for those of words."""
        return {"none": 0, "lm": 0, "multiple_choice": 1}.get(self.head, len(self.labels))

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def max_length(self) -> None:
        """There is no limit."""
        return None

    def build(self, rngs: nnx.Rngs) -> "XLNet":
        return XLNet(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example of shape (T,), or (T, P) with P places to predict, without memories.

        Matrix products alone, a multiply-add being two. Pairs that an order hides are counted: their scores of
        distances are computed. Keys of distances, which all rows of a batch share, are not.
        """
        length, *predicted = shape
        queries = predicted[0] if predicted else 0
        distances = 2 * length if self.attention == "two_way" else length + 1
        of_a_row = 2 * self.width**2 + 2 * self.width * self.mlp_width + (2 * length + distances) * self.width
        flops = self.num_layers * ((length + queries) * of_a_row + length * 2 * self.width**2)
        if self.head == "lm":
            flops += (queries if predicted else length) * self.width * self.vocab_size
        elif self.head in SUMMARISED:
            flops += self.width**2 + self.width * self.classes
        else:
            flops += length * self.width * self.classes
        return 2.0 * flops

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "XLNetConfig":
        """From the config.json of an XLNet; raises PublishedError for one that this module cannot be."""
        require(fields, "XLNet", bi_data=False, same_length=False, untie_r=True, tie_word_embeddings=True)
        found = head(fields, "XLNet", HEADS)
        if found in SUMMARISED:
            require(fields, HEADS[found], summary_type="last", summary_use_proj=True, summary_activation="tanh")
        kinds = {published: ours for ours, published in ATTENTION.items()}
        attention = fields.get("attn_type", "bi")
        if attention not in kinds:
            raise PublishedError(f"config.json has attn_type {attention!r}, which is none of {', '.join(kinds)}")
        width, num_heads = size(fields, "d_model"), size(fields, "n_head")
        if width % num_heads:
            raise PublishedError(f"config.json has n_head {num_heads}, which does not divide d_model {width}")
        if fields.get("d_head") is not None:
            require(fields, f"XLNet of d_model {width} and n_head {num_heads}", d_head=width // num_heads)
        clamp = fields.get("clamp_len", -1)
        return cls(
            vocab_size=size(fields, "vocab_size"),
            num_layers=size(fields, "n_layer"),
            width=width,
            num_heads=num_heads,
            mlp_width=size(fields, "d_inner"),
            head=found,
            attention=kinds[attention],
            memory_length=size(fields, "mem_len", optional=True),
            reuse_length=size(fields, "reuse_len", optional=True),
            remembers=flag(fields, "use_mems_eval", True),
            longest_distance=None if clamp == -1 else size(fields, "clamp_len"),
            **read_labels(fields, "XLNet", found),
            activation=activation(fields, "ff_activation", "gelu"),
            norm_epsilon=number(fields, "layer_norm_eps", 1e-12),
            dropout=number(fields, "dropout", 0.1),
            summary_dropout=number(fields, "summary_last_dropout", 0.1),
            special_tokens=SpecialTokens.from_published(SPECIAL_TOKENS.to_published() | dict(fields)),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this XLNet."""
        fields = {
            "architectures": [HEADS[self.head]],
            "model_type": "xlnet",
            "vocab_size": self.vocab_size,
            "n_layer": self.num_layers,
            "d_model": self.width,
            "n_head": self.num_heads,
            "d_head": self.head_dim,
            "d_inner": self.mlp_width,
            "attn_type": ATTENTION[self.attention],
            "mem_len": self.memory_length,
            "reuse_len": self.reuse_length,
            "clamp_len": self.longest_distance or -1,
            "use_mems_eval": self.remembers,
            "bi_data": False,
            "same_length": False,
            "ff_activation": published_activation(self.activation),
            "layer_norm_eps": self.norm_epsilon,
            "dropout": self.dropout,
            "summary_type": "last",
            "summary_use_proj": True,
            "summary_activation": "tanh",
            "summary_last_dropout": self.summary_dropout,
            "tie_word_embeddings": True,
        }
        return fields | published_labels(self) | self.special_tokens.to_published()

    def published_layout(self) -> Layout:
        return _layout(self.head)


@partial(jax.tree_util.register_dataclass, data_fields=("tokens", "lengths", "states"), meta_fields=())
@dataclass(frozen=True)
class Written:
    """The tokens that a row holds so far, [B, slots], of which the first lengths [B] are real: what generation keeps.

    states: [L, B, slots, D], what enters each layer, where the config says that they are kept.
    """

    tokens: jax.Array
    lengths: jax.Array
    states: jax.Array | None

    def cut(self, lengths: jax.Array) -> "Written":
        """With the first lengths [B] tokens of each row alone."""
        return dataclasses.replace(self, lengths=jnp.broadcast_to(lengths, self.lengths.shape))

    def rows(self, rows: jax.Array) -> "Written":
        """A cache whose row r is row rows[r] of this one; rows is int32 of any length, and may repeat."""
        states = None if self.states is None else jnp.take(self.states, rows, axis=1)
        return Written(jnp.take(self.tokens, rows, axis=0), jnp.take(self.lengths, rows, axis=0), states)

    def repeated(self, count: int) -> "Written":
        """With `count` copies of each row, one after another."""
        return self.rows(jnp.repeat(jnp.arange(len(self.lengths)), count))


class XLNetFeatures(NamedTuple):
    """hidden: [B, T, D] of the tokens' contents, or, where there are targets, [B, P, D] of those places.

    memories: [L, B, M', D], those given with what this call appended, and cut.  cache: the one given, likewise.
    intermediates, target_intermediates: of the contents and of the targets, where they were asked for.
    """

    hidden: jax.Array
    memories: jax.Array | None = None
    cache: Written | None = None
    intermediates: Intermediates | None = None
    target_intermediates: Intermediates | None = None


class XLNetOutput(NamedTuple):
    """logits: float32, None where there is no head. "lm": of each word, [B, T, V], or [B, P, V] in the targets' places.
        "sequence_classification": [B, C].  "multiple_choice": of each row as an answer to a question, [B, 1].
        "token_classification": [B, T, C].  "question_answering": that the answer starts, and that it ends, at a token,
        [B, T, 2].

    The others are as in XLNetFeatures.
    """

    logits: jax.Array | None
    hidden: jax.Array
    memories: jax.Array | None = None
    cache: Written | None = None
    intermediates: Intermediates | None = None
    target_intermediates: Intermediates | None = None


def xlnet_block(config: XLNetConfig, *, rngs: nnx.Rngs) -> RelativeBlock:
    """One layer of an XLNet."""
    common = {"rngs": rngs, "dropout": config.dropout, "precision": config.precision}
    attention = RelativeAttention(config.width, config.num_heads, config.head_dim, **common)
    feedforward = FeedForward(config.width, config.mlp_width, activation=config.activation, **common)
    norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
    return RelativeBlock(attention, feedforward, norm, dropout=config.dropout)


class XLNet(nnx.Module):
    """Tokens [B, T] to hidden states, and to the scores of the config's head."""

    def __init__(self, config: XLNetConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.width
        common = {"rngs": rngs, "precision": config.precision}
        self.embed = Embed(config.vocab_size, width, **common)
        unseen = normal(0.02)(rngs.params(), (1, width), jnp.dtype(config.precision.parameters))
        self.unseen = nnx.Param(unseen, axes=("classes", "embed"))
        self.stack = Stack(
            lambda rngs: xlnet_block(config, rngs=rngs), config.num_layers, remat=config.remat, rngs=rngs
        )
        bias = jnp.zeros(self.embed.table.shape[0], jnp.dtype(config.precision.parameters))
        self.bias = nnx.Param(bias, axes=("vocab",), rows=config.vocab_size) if config.head == "lm" else None
        summarised = config.head in SUMMARISED
        self.summary = Linear(width, width, axes=("embed", "embed"), **common) if summarised else None
        # Logits are float32.
        common["precision"] = dataclasses.replace(config.precision, compute="float32")
        scores = partial(Linear, width, config.classes, axes=("embed", "classes"), **common)
        self.classifier = scores() if config.classes else None

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None, **arguments: Any) -> XLNetOutput:
        """What the head says of tokens [B, T] int32. The arguments are those of `features`."""
        features, logits = self.features(tokens, key=key, **arguments), None
        scored = features.hidden
        if self.bias is not None:
            logits = self.logits(scored)[..., : self.config.vocab_size]
        if self.summary is not None:
            # Rows are padded at their beginning, so that each ends with the token that stands for all of it.
            scored = jnp.tanh(self.summary(scored[:, -1]).astype(jnp.float32)).astype(scored.dtype)
            scored = dropout(scored, self.config.summary_dropout, split(key, 5)[4])
        if self.classifier is not None:
            logits = self.classifier(scored)
        return XLNetOutput(logits, *features)

    def features(
        self,
        tokens: jax.Array,
        *,
        token_types: jax.Array | None = None,
        real: jax.Array | None = None,
        order: jax.Array | None = None,
        perm_mask: jax.Array | None = None,
        targets: jax.Array | None = None,
        memories: jax.Array | None = None,
        cache: Written | None = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> XLNetFeatures:
        """The final states of tokens [B, T] int32.

        token_types: [B, T], the segment of each token, any number; attention knows whether two are of the same one.
            Those of memories count as 0.
        real: [B, T], false or 0 where a token only pads: none but itself attends to it.
        order: [B, T] int32, when each token becomes known, in the factorisation of the text: it attends to those known
            before and with it, and what predicts it to those known before it. Tokens that are given, and not
            predicted, have one number together, the least.
        perm_mask: [B, T, T], true or 1 where a token does not attend to another: any pattern, as published.
        targets: [B, P] int32, places that are predicted from what their order, or the perm_mask, lets them see, which
            may be nothing. Where a row has fewer, name any place again and leave it out of the loss.
        memories: [L, B, M, D], of `init_memories` or of the call for the segment before; all tokens attend to them.
        cache: of `read`, alone with tokens [B, 1]; hidden [B, 1, D] is of the place after them.
        key: for dropout; None drops nothing. All rows drop the same of the vectors of distances.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        if cache is not None:
            others = (token_types, real, order, perm_mask, targets, memories)
            if tokens.shape[1] != 1 or any(other is not None for other in others):
                raise SequenceError("a cache takes one token a row, and no other argument: begin with `read`")
            return self._after(cache, tokens[:, 0], key=key, return_intermediates=return_intermediates)
        if targets is not None and order is None and perm_mask is None:
            raise SequenceError("targets given without order or perm_mask: each would see the token that it predicts")
        length, remembered = tokens.shape[1], 0 if memories is None else memories.shape[2]
        differs = None if token_types is None else segments_differ(token_types, targets, remembered)
        hidden = hidden_pairs(length, remembered, targets, real=real, perm_mask=perm_mask, causal=self._causal)
        return self._run(
            tokens,
            Pairs(self._distance_vectors(length, remembered), targets, differs, hidden),
            memories=memories,
            remember=self._remembered,
            mask=Mask() if order is None else in_order(order, targets, remembered),
            key=key,
            return_intermediates=return_intermediates,
        )

    def _run(
        self,
        tokens: jax.Array,
        pairs: Pairs,
        *,
        memories: jax.Array | None,
        remember: Callable[[jax.Array, jax.Array], jax.Array],
        mask: Mask = Mask(),
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> XLNetFeatures:
        """Features of tokens [B, T], or of the targets of pairs; the arguments are those of run_relative."""
        embed_key, distance_key, stack_key, end_key, _ = split(key, 5)  # The fifth is for what `__call__` drops.
        x, length, rate = self.embed(tokens), tokens.shape[1], self.config.dropout
        unseen = jnp.broadcast_to(self.unseen[...].astype(x.dtype), (len(tokens), pairs.queries, x.shape[-1]))
        x = dropout(jnp.concatenate([x, unseen], 1), rate, embed_key)
        x, memories, seen = run_relative(
            self.stack,
            constrain(x, "act_batch", "act_length", "act_embed"),
            pairs._replace(vectors=dropout(pairs.vectors, rate, distance_key)),
            memories=memories,
            remember=remember,
            mask=mask,
            key=stack_key,
            return_intermediates=return_intermediates,
        )
        contents, predicted = slice(length), slice(length, None)
        if pairs.targets is None:
            return XLNetFeatures(dropout(x, rate, end_key), memories, None, seen)
        hidden = dropout(x[:, predicted], rate, end_key)
        return XLNetFeatures(hidden, memories, None, _of_rows(seen, contents), _of_rows(seen, predicted))

    def hidden(self, tokens: jax.Array, **arguments: Any) -> jax.Array:
        """States for a loss that takes them with `head`: those of the targets, where there are any."""
        self._check_words()
        return self.features(tokens, **arguments).hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to [..., V padded to a multiple of 128] float32, -inf at the entries that only pad."""
        return self.embed.attend(hidden) + self._check_words()

    def head(self) -> Head:
        """What `logits` scores with: the embedding's table [D, V padded] and a bias."""
        return self.embed.head()._replace(bias=self._check_words())

    def init_memories(self, batch_size: int) -> jax.Array:
        """Memories of nothing, [L, B, 0, D], for the first segment of a text."""
        shape = (self.config.num_layers, batch_size, 0, self.config.width)
        return jnp.zeros(shape, jnp.dtype(self.config.precision.compute))

    def read(self, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, Written]:
        """The state [B, D] of the place after each prompt, of tokens [B, P] the first lengths [B], and its cache."""
        if self.config.remembers and self.config.reuse_length is not None:
            raise SequenceError(
                f"reuse_length {self.config.reuse_length} forgets the end of what is written: set remembers to False"
            )
        tokens = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, slots - tokens.shape[1])))
        features = self._anew(Written(tokens, jnp.asarray(lengths), None))
        assert features.cache is not None
        return features.hidden[:, 0], features.cache

    def _after(self, cache: Written, tokens: jax.Array, **arguments: Any) -> XLNetFeatures:
        """Features of the place after tokens [B], which stand after what the cache holds."""
        written = cache.tokens.at[jnp.arange(len(tokens)), cache.lengths].set(tokens)
        cache = Written(written, cache.lengths + 1, cache.states)
        return self._anew(cache, **arguments) if cache.states is None else self._from_states(cache, **arguments)

    def _anew(self, cache: Written, **arguments: Any) -> XLNetFeatures:
        """Features of the place after what each row holds, whose tokens all attend to one another."""
        (batch, slots), targets = cache.tokens.shape, cache.lengths[:, None]
        hidden = hidden_pairs(slots, 0, targets, real=None, perm_mask=None, causal=self._causal)
        pairs = Pairs(self._distance_vectors(slots, 0), targets, None, hidden)
        # What stands behind is not known yet.
        order = jnp.where(jnp.arange(slots) < targets, 0, 1)
        features = self._run(
            cache.tokens,
            pairs,
            memories=self.init_memories(batch) if self.config.remembers else None,
            remember=pairs.appended,
            mask=in_order(order, targets, 0),
            **arguments,
        )
        return features._replace(memories=None, cache=dataclasses.replace(cache, states=features.memories))

    def _from_states(self, cache: Written, **arguments: Any) -> XLNetFeatures:
        """The same, where the last two tokens alone attend to all, and all others stay as they are.

        The last but one was the last when its states were made, and is now seen together with what follows it.
        """
        slots, lengths = cache.tokens.shape[1], cache.lengths[:, None]
        places = lengths + jnp.arange(-2, 1)
        ends = places + 1 if self._causal else lengths
        hidden = jnp.arange(slots) >= jnp.minimum(ends, lengths)[..., None]
        if self.config.memory_length is not None:
            hidden |= jnp.arange(slots) < (lengths - max(self.config.memory_length, 2))[..., None]
        pairs = Pairs(self._distance_vectors(slots, 0), places[:, 2:], hidden=hidden, places=places)
        tokens = jnp.take_along_axis(cache.tokens, places[:, :2], axis=1)
        features = self._run(tokens, pairs, memories=cache.states, remember=pairs.appended, **arguments)
        return features._replace(memories=None, cache=dataclasses.replace(cache, states=features.memories))

    @property
    def _causal(self) -> bool:
        return self.config.attention == "causal"

    def _distance_vectors(self, length: int, remembered: int) -> jax.Array:
        """[R, D] of all distances between queries and the keys that they may attend to, the farthest behind first."""
        nearest = -1 if self._causal else -length
        distances = jnp.arange(length + remembered, nearest, -1)
        if self.config.longest_distance is not None:
            distances = distances.clip(-self.config.longest_distance, self.config.longest_distance)
        return distance_vectors(distances, self.config.width)

    def _remembered(self, memory: jax.Array, entering: jax.Array) -> jax.Array:
        """A layer's new memory [B, M', D], from its old one and the states [B, T, D] that enter it; no gradient."""
        memory = jnp.concatenate([memory, entering[:, : self.config.reuse_length].astype(memory.dtype)], 1)
        return jax.lax.stop_gradient(memory[:, -(self.config.memory_length or 0) :])

    def _check_words(self) -> jax.Array:
        """The bias of words; raises LayerError where the head scores none."""
        if self.bias is None:
            raise LayerError(f"head {self.config.head!r} scores no words: build the model with head 'lm'")
        return self.bias[...]


def _of_rows(seen: Intermediates | None, rows: slice) -> Intermediates | None:
    """Those of some of the T + P rows."""
    return None if seen is None else Intermediates(seen.hidden[:, :, rows], seen.attention[:, :, :, rows], None)


def _transformer() -> tuple[Weight, ...]:
    layer, block = "layer.{}", "stack.blocks.*"
    attention = f"{block}.attention"
    projections = {"q": "query", "k": "key", "v": "value", "r": "position"}
    biases = {"r_w_bias": "to_content", "r_r_bias": "to_position", "r_s_bias": "to_segment"}
    return (
        Weight("mask_emb", ("unseen",), "() k d -> k d"),
        Weight("word_embedding.weight", ("embed.table",), "v d -> v d"),
        *(
            Weight(f"{layer}.rel_attn.{name}", (f"{attention}.{ours}.kernel",), "d n h -> d n h")
            for name, ours in projections.items()
        ),
        Weight(f"{layer}.rel_attn.o", (f"{attention}.out.kernel",), "d n h -> n h d"),
        *(
            Weight(f"{layer}.rel_attn.{name}", (f"{attention}.{ours}.bias",), "n h -> n h")
            for name, ours in biases.items()
        ),
        Weight(f"{layer}.rel_attn.seg_embed", (f"{attention}.segments",), "g n h -> g n h"),
        *norm(f"{layer}.rel_attn.layer_norm", f"{block}.attention_norm"),
        *linear(f"{layer}.ff.layer_1", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
        *linear(f"{layer}.ff.layer_2", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
        *norm(f"{layer}.ff.layer_norm", f"{block}.feedforward_norm"),
    )


def _layout(head: str) -> Layout:
    """The class without a head has the transformer's tensors at the top of its names, the others in `transformer`."""
    prefix = "" if head == "none" else "transformer."
    weights = [dataclasses.replace(weight, name=prefix + weight.name) for weight in _transformer()]
    tied, unused = {}, ()
    if head == "lm":
        weights.append(Weight("lm_loss.bias", ("bias",), "v -> v"))
        tied = {"lm_loss.weight": f"{prefix}word_embedding.weight"}
    else:
        # Files of xlnet-base-cased and others hold what they were pretrained with.
        unused = (r"lm_loss\.(weight|bias)",)
    if head in SUMMARISED:
        weights += linear("sequence_summary.summary", "summary", "e d -> d e", "d -> d")
    names = {
        "sequence_classification": "logits_proj",
        "multiple_choice": "logits_proj",
        "token_classification": "classifier",
        "question_answering": "qa_outputs",
    }
    if head in names:
        weights += linear(names[head], "classifier", "c d -> d c", "c -> c")
    return Layout(tuple(weights), prefix=prefix, tied=tied, ignored=unused)


PRESETS = {
    "xlnet-base-cased": XLNetConfig(head="lm"),
    "xlnet-large-cased": XLNetConfig(head="lm", num_layers=24, width=1024, num_heads=16, mlp_width=4096),
}
