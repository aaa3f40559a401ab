"""BERT: a bidirectional encoder with post-norm blocks, pretrained to fill in masked words and to pair sentences.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", and the released
weights, whose code settles what the paper leaves open: embeddings are normalised, the gelu is exact, the score of a
masked word is that of a transformed state against the word embeddings, plus a bias, and initialisation is
N(0, 0.02^2) cut at two standard deviations, biases 0.

One encoder bears every published head; the config says which.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import ACTIVATIONS, FeedForward
from zoo.layers.linear import Embed, Head, LayerError, Linear, Precision, check_sizes
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions, SequenceError, check_length
from zoo.layers.transformer import Block, Intermediates, Stack
from zoo.models.published import (
    LABELS,
    Layout,
    SpecialTokens,
    Weight,
    activation,
    check_head,
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


class HeadKind(NamedTuple):
    """published: the class of Hugging Face transformers.  The others: what stands on the encoder's hidden states.

    pooler: tanh of a linear map of the first token's.  words: scores of every word at each token.
    next_sentence: scores of the pooled state.  classifier: scores of "pooled" or of "hidden", by name, or None.
    """

    published: str
    pooler: bool = False
    words: bool = False
    next_sentence: bool = False
    classifier: str | None = None


HEADS = {
    "none": HeadKind("BertModel", pooler=True),
    "pretraining": HeadKind("BertForPreTraining", pooler=True, words=True, next_sentence=True),
    "masked_lm": HeadKind("BertForMaskedLM", words=True),
    "next_sentence": HeadKind("BertForNextSentencePrediction", pooler=True, next_sentence=True),
    "sequence_classification": HeadKind("BertForSequenceClassification", pooler=True, classifier="pooled"),
    "token_classification": HeadKind("BertForTokenClassification", classifier="hidden"),
    "question_answering": HeadKind("BertForQuestionAnswering", classifier="hidden"),
}

init = jax.nn.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class BertConfig:
    """A BERT's sizes; the defaults are those of BERT base, uncased, bare.

    head: a name in HEADS; "none" has the pooler alone.
    labels: names of the classes of "sequence_classification" and "token_classification".
    problem_type: how classes are read, a name in PROBLEMS (softmax, sigmoid, or values); None where it is not said.
    token_types: kinds of token, as of a first and a second sentence.
    dropout: of embeddings and residual branches.  attention_dropout: of attention weights.
    classifier_dropout: of what classes are scored from, the same as dropout where None.
    special_tokens: pad fills rows, and its word embedding gets no gradient from there.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 30522
    max_length: int = 512
    token_types: int = 2
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    head: str = "none"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    special_tokens: SpecialTokens = SpecialTokens(pad=0)
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("vocab_size", "max_length", "token_types", "num_layers", "width", "num_heads", "mlp_width")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_head(self, HEADS)

    @property
    def kind(self) -> HeadKind:
        return HEADS[self.head]

    def build(self, rngs: nnx.Rngs) -> "Bert":
        return Bert(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example of shape (T,): matrix products alone, a multiply-add being two.

        Words are scored at every token. Looking up the kinds of tokens is not counted.
        """
        (length,) = shape
        of_a_token = self.num_layers * (4 * self.width**2 + 2 * self.width * self.mlp_width + 2 * length * self.width)
        of_a_row = 0
        if self.kind.words:
            of_a_token += self.width**2 + self.width * self.vocab_size
        if self.kind.classifier == "hidden":
            of_a_token += self.width * len(self.labels)
        if self.kind.pooler:
            of_a_row += self.width**2
        if self.kind.next_sentence:
            of_a_row += self.width * 2
        if self.kind.classifier == "pooled":
            of_a_row += self.width * len(self.labels)
        return 2.0 * (length * of_a_token + of_a_row)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "BertConfig":
        """From the config.json of a BERT; raises PublishedError for one that this module cannot be."""
        require(
            fields,
            "BERT",
            is_decoder=False,
            add_cross_attention=False,
            position_embedding_type="absolute",
            directionality="bidi",
            pruned_heads={},
            tie_word_embeddings=True,
        )
        found = head(fields, "BERT", {name: kind.published for name, kind in HEADS.items()})
        classifier_dropout = fields.get("classifier_dropout")
        return cls(
            vocab_size=size(fields, "vocab_size"),
            max_length=size(fields, "max_position_embeddings"),
            token_types=size({"type_vocab_size": 2} | dict(fields), "type_vocab_size"),
            num_layers=size(fields, "num_hidden_layers"),
            width=size(fields, "hidden_size"),
            num_heads=size(fields, "num_attention_heads"),
            mlp_width=size(fields, "intermediate_size"),
            head=found,
            **read_labels(fields, "BERT", found),
            activation=activation(fields, "hidden_act", "gelu"),
            norm_epsilon=number(fields, "layer_norm_eps", 1e-12),
            dropout=number(fields, "hidden_dropout_prob", 0.1),
            attention_dropout=number(fields, "attention_probs_dropout_prob", 0.1),
            classifier_dropout=None if classifier_dropout is None else number(fields, "classifier_dropout", 0.1),
            special_tokens=SpecialTokens.from_published({"pad_token_id": 0} | dict(fields)),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this BERT."""
        fields = {
            "architectures": [self.kind.published],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "type_vocab_size": self.token_types,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.mlp_width,
            "hidden_act": published_activation(self.activation),
            "layer_norm_eps": self.norm_epsilon,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "classifier_dropout": self.classifier_dropout,
            "tie_word_embeddings": True,
        }
        return fields | published_labels(self) | self.special_tokens.to_published()

    def published_layout(self) -> Layout:
        return _layout(self.kind)


class BertOutput(NamedTuple):
    """hidden: [B, T, D], after the last block.  pooled: [B, D] of the first token, None where there is no pooler.

    logits: float32, None where there are none. "pretraining" and "masked_lm": of each word in a token's place,
        [B, T, V].  "sequence_classification": [B, C].  "token_classification": [B, T, C].  "question_answering": that
        the answer starts, and that it ends, at a token, [B, T, 2].
    next_sentence: [B, 2] float32 with "pretraining" and "next_sentence": that the second sentence follows the first
        (entry 0), or is another (1).
    intermediates: where they were asked for.
    """

    hidden: jax.Array
    pooled: jax.Array | None
    logits: jax.Array | None
    next_sentence: jax.Array | None
    intermediates: Intermediates | None = None


class BertFeatures(NamedTuple):
    """hidden: [B, T, D], after the last block.  pooled: [B, D] of the first token, None where there is no pooler.

    intermediates: where they were asked for.
    """

    hidden: jax.Array
    pooled: jax.Array | None
    intermediates: Intermediates | None = None


def bert_block(config: BertConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a BERT."""
    common = {"rngs": rngs, "precision": config.precision, "init": init}
    attention = MultiHeadAttention(config.width, config.num_heads, dropout=config.attention_dropout, **common)
    feedforward = FeedForward(config.width, config.mlp_width, activation=config.activation, **common)
    norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
    return Block(attention, feedforward, norm, norm_first=False, dropout=config.dropout)


class Words(nnx.Module):
    """What scores words in the place of each token, but for the embeddings that it shares: norm(f(dense(x))), a bias.

    The bias is padded as the vocabulary is.
    """

    def __init__(self, config: BertConfig, padded: int, *, rngs: nnx.Rngs):
        self.activation = config.activation
        shape = (config.width, config.width)
        self.dense = Linear(*shape, axes=("embed", "embed"), rngs=rngs, precision=config.precision, init=init)
        self.norm = LayerNorm(config.width, epsilon=config.norm_epsilon, precision=config.precision)
        dtype = jnp.dtype(config.precision.parameters)
        self.bias = nnx.Param(jnp.zeros(padded, dtype), axes=("vocab",), rows=config.vocab_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] to [..., D], to be scored against the embeddings."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x).astype(jnp.float32)))


class Bert(nnx.Module):
    """Tokens [B, T] to hidden states, and to the scores of the config's head.

    Raises SequenceError where a sequence is longer than config.max_length.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        kind, width = config.kind, config.width
        common = {"rngs": rngs, "precision": config.precision, "init": init}
        self.embed = Embed(config.vocab_size, width, **common)
        self.positions = LearnedPositions(config.max_length, width, **common)
        # A product with one of few rows: its gradient is a product too, where that of a look-up would add up each row
        # token by token.
        self.token_types = Linear(config.token_types, width, axes=("classes", "embed"), bias=False, **common)
        self.embed_norm = LayerNorm(width, epsilon=config.norm_epsilon, precision=config.precision)
        self.stack = Stack(lambda rngs: bert_block(config, rngs=rngs), config.num_layers, remat=config.remat, rngs=rngs)
        self.pooler = Linear(width, width, axes=("embed", "embed"), **common) if kind.pooler else None
        self.words = Words(config, self.embed.table.shape[0], rngs=rngs) if kind.words else None
        # Logits are float32.
        common["precision"] = dataclasses.replace(config.precision, compute="float32")
        scores = partial(Linear, width, axes=("embed", "classes"), **common)
        self.next_sentence = scores(2) if kind.next_sentence else None
        self.classifier = scores(len(config.labels)) if kind.classifier else None

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None, **arguments: Any) -> BertOutput:
        """What the head says of tokens [B, T] int32. The arguments are those of `features`."""
        hidden, pooled, intermediates = self.features(tokens, key=key, **arguments)
        *_, head_key = split(key, 3)
        logits = next_sentence = None
        if self.words is not None:
            logits = self.logits(self.words(hidden))[..., : self.config.vocab_size]
        if self.classifier is not None:
            scored = hidden if pooled is None else pooled
            logits = self.classifier(dropout(scored, self._classifier_dropout, head_key))
        if self.next_sentence is not None and pooled is not None:
            next_sentence = self.next_sentence(pooled)
        return BertOutput(hidden, pooled, logits, next_sentence, intermediates)

    def features(
        self,
        tokens: jax.Array,
        *,
        token_types: jax.Array | None = None,
        real: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: Mask | None = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> BertFeatures:
        """The final hidden states of tokens [B, T] int32, and the pooled state where there is a pooler.

        token_types: [B, T], of the table; 0 unless given.
        real: [B, T], false or 0 where a token only pads: no token attends to it. Where rows are padded at their ends
            alone, mask=Mask(lengths=...) says the same.
        positions: [B, T], of the table; counted from 0 unless given.
        segments: [B, T], the text of each token of a packed row, 0 where there is none: tokens attend within their
            text alone. Instead of `real`; pooled is then of the row's first text.
        mask: restricts attention further.
        key: for dropout; None drops nothing.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        check_length(tokens.shape[1], self.config.max_length)
        if real is not None and segments is not None:
            raise SequenceError("real given with segments, which say it too: make segments 0 where a token only pads")
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        token_types = jnp.zeros((1, tokens.shape[1]), jnp.int32) if token_types is None else token_types
        mask = (mask or Mask()) & Mask(segments=segments)
        if real is not None:
            # What pads attends to what is real, as published: the loss of answers counts its scores.
            keys = jnp.broadcast_to(real, tokens.shape).astype(jnp.int32)
            mask = mask & Mask(segments=(jnp.ones_like(keys), keys))
        embed_key, stack_key, _ = split(key, 3)  # The third is for what `__call__` drops of the results.
        x = (
            self.embed(tokens, pad=self.config.special_tokens.pad)
            + self._vectors_of_types(token_types)
            + self.positions(positions)
        )
        x = dropout(self.embed_norm(x), self.config.dropout, embed_key)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        x, _, intermediates = self.stack(x, masks=[mask], key=stack_key, return_intermediates=return_intermediates)
        if self.pooler is None:
            return BertFeatures(x, None, intermediates)
        pooled = jnp.tanh(self.pooler(x[:, 0]).astype(jnp.float32)).astype(x.dtype)
        return BertFeatures(x, constrain(pooled, "act_batch", "act_embed"), intermediates)

    def hidden(self, tokens: jax.Array, **arguments: Any) -> jax.Array:
        """States [B, T, D] that `logits` and `head` score words of; the arguments are those of `features`."""
        return self._word_head()(self.features(tokens, **arguments).hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of words from what `hidden` gave, [..., D], or from some of it: the masked tokens alone, say.

        [..., V padded to a multiple of 128] float32, -inf at the entries that only pad.
        """
        return self.embed.attend(hidden) + self._word_head().bias[...]

    def head(self) -> Head:
        """What `logits` scores with: the embedding's table [D, V padded] and a bias."""
        return self.embed.head()._replace(bias=self._word_head().bias[...])

    def _vectors_of_types(self, token_types: jax.Array) -> jax.Array:
        """[..., D]; NaN for a type outside the table, as for a token outside the vocabulary."""
        rows = jax.nn.one_hot(token_types, self.config.token_types)
        return self.token_types(jnp.where(rows.sum(-1, keepdims=True) > 0, rows, jnp.nan))

    def _word_head(self) -> Words:
        if self.words is None:
            heads = ", ".join(head for head, kind in HEADS.items() if kind.words)
            raise LayerError(f"head {self.config.head!r} scores no words: build the model with one of {heads}")
        return self.words

    @property
    def _classifier_dropout(self) -> float:
        if self.config.head == "question_answering":  # It alone has none, as published.
            return 0.0
        given = self.config.classifier_dropout
        return self.config.dropout if given is None else given


def _encoder() -> tuple[Weight, ...]:
    layer, block = "encoder.layer.{}", "stack.blocks.*"
    heads = [
        weight
        for part in ("query", "key", "value")
        for weight in linear(
            f"{layer}.attention.self.{part}", f"{block}.attention.{part}", "(n h) d -> d n h", "(n h) -> n h"
        )
    ]
    return (
        Weight("embeddings.word_embeddings.weight", ("embed.table",), "v d -> v d"),
        Weight("embeddings.position_embeddings.weight", ("positions.table",), "t d -> t d"),
        Weight("embeddings.token_type_embeddings.weight", ("token_types.kernel",), "c d -> c d"),
        *norm("embeddings.LayerNorm", "embed_norm"),
        *heads,
        *linear(f"{layer}.attention.output.dense", f"{block}.attention.out", "d (n h) -> n h d", "d -> d"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{block}.attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
        *linear(f"{layer}.output.dense", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
        *norm(f"{layer}.output.LayerNorm", f"{block}.feedforward_norm"),
    )


def _layout(kind: HeadKind) -> Layout:
    """The class without a head has the encoder's tensors at the top of its names, the others have them in `bert`."""
    prefix = "" if kind == HEADS["none"] else "bert."
    weights, tied, unused = list(_encoder()), {}, []
    if kind.pooler:
        weights += linear("pooler.dense", "pooler", "e d -> d e", "d -> d")
    else:
        # Files of bert-base-uncased and many others hold what they were pretrained with; the class leaves it out.
        unused.append(r"bert\.pooler\.dense\.(weight|bias)")
    weights = [dataclasses.replace(weight, name=prefix + weight.name) for weight in weights]
    if kind.words:
        weights += [
            Weight("cls.predictions.bias", ("words.bias",), "v -> v"),
            *linear("cls.predictions.transform.dense", "words.dense", "e d -> d e", "d -> d"),
            *norm("cls.predictions.transform.LayerNorm", "words.norm"),
        ]
        tied = {
            "cls.predictions.decoder.weight": f"{prefix}embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
        if not kind.next_sentence:
            unused.append(r"cls\.seq_relationship\.(weight|bias)")
    if kind.next_sentence:
        weights += linear("cls.seq_relationship", "next_sentence", "c d -> d c", "c -> c")
    if kind.classifier:
        name = "qa_outputs" if kind == HEADS["question_answering"] else "classifier"
        weights += linear(name, "classifier", "c d -> d c", "c -> c")
    return Layout(
        tuple(weights),
        prefix=prefix,
        tied=tied,
        renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        ignored=(r"(bert\.)?embeddings\.position_ids", *unused),
    )


_LARGE = BertConfig(num_layers=24, width=1024, num_heads=16, mlp_width=4096)

PRESETS = {
    "bert-base-uncased": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-large-uncased": _LARGE,
    "bert-large-cased": dataclasses.replace(_LARGE, vocab_size=28996),
    "all-MiniLM-L6-v2": BertConfig(num_layers=6, width=384, mlp_width=1536),
}
