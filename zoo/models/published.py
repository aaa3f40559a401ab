"""What families say of their published checkpoints: how tensors are named and laid out, what a config.json may ask.

The published layouts are those that Hugging Face transformers and diffusers write, for every family that they have.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.layers.linear import LayerError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Published names of activations, and ours; the first published name of each of ours is the one written."""


LABELS = ("LABEL_0", "LABEL_1")
"""What Hugging Face transformers calls labels that nobody named."""

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""How classes are read: softmax, sigmoid, or values."""


class PublishedError(ValueError):
    """A published config that a family cannot be, or a model with no published form; names the field and its value."""


@dataclass(frozen=True)
class Weight:
    """A published tensor, or one of each layer, and the parameters that it holds.

    name: of the tensor; "{}" stands for the layer's number where there is one of each.
    parameters: paths in the module, split by ".", in which "*" is the block of a stack's period. Several parameters
        lie in the tensor side by side, along `part` of the layout.
    layout: the einops pattern from the tensor to a parameter: "(n h) d -> d n h", or with several parameters
        "d (part n h) -> part d n h". Axes of size 1 that only the tensor has are 1: "1 t d -> t d". Read from right to
        left it is the way back.
    """

    name: str
    parameters: tuple[str, ...]
    layout: str

    def tensor_shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape, from that of a parameter of one layer."""
        sizes = self.sizes(parameter_shape)
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.layout.split("->")[0])
        sizes["1"] = 1
        return tuple(math.prod(sizes[axis] for axis in (group or single).split()) for group, single in groups)

    def sizes(self, parameter_shape: tuple[int, ...]) -> dict[str, int]:
        """Size of each axis of the layout."""
        axes = self.layout.split("->")[1].split()
        shape = (len(self.parameters), *parameter_shape) if axes[0] == "part" else parameter_shape
        return dict(zip(axes, shape, strict=True))


def linear(name: str, modules: str | tuple[str, ...], kernel: str, bias: str | None = None) -> tuple[Weight, ...]:
    """The tensors of one projection, or of several in one tensor, by the layouts of kernel and bias (None: none)."""
    modules = (modules,) if isinstance(modules, str) else modules
    weights = (Weight(f"{name}.weight", tuple(f"{module}.kernel" for module in modules), kernel),)
    if bias is not None:
        weights += (Weight(f"{name}.bias", tuple(f"{module}.bias" for module in modules), bias),)
    return weights


def norm(name: str, module: str, *, bias: bool = True) -> tuple[Weight, ...]:
    """The tensors of one normalisation."""
    weights = (Weight(f"{name}.weight", (f"{module}.scale",), "d -> d"),)
    return (*weights, Weight(f"{name}.bias", (f"{module}.bias",), "d -> d")) if bias else weights


@dataclass(frozen=True)
class Layout:
    """All tensors of a published class.

    prefix: what the names of the class with a head begin with; files of the class without one leave it out.
    tied: names that some files have for a tensor a second time, and the tensor's own.
    renamed: how names ended in older files, and how they end now.
    ignored: regular expressions of names, as they stand in a file, of what files hold besides: constants of the torch
        module, and parameters of another head than the class has.
    stem: how the names of the files with weights begin.
    """

    weights: tuple[Weight, ...]
    prefix: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    stem: str = "model"


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens with a meaning to generation, by their ids; None or () where there is none.

    bos begins a text, pad fills rows, any of eos ends a text, and start is what a decoder with an encoder begins with.
    first and last are what the first new token must be, where no prompt says what the decoder begins with, and the last
    that there is room for.  banned ones are never generated.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    start: int | None = None
    first: int | None = None
    last: int | None = None
    banned: tuple[int, ...] = ()

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "SpecialTokens":
        kinds = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
        bos, eos, pad, start, first, last = (fields.get(f"{kind}_token_id") for kind in kinds)
        ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        words = fields.get("bad_words_ids") or []
        if not isinstance(words, list) or not all(isinstance(word, list) and len(word) == 1 for word in words):
            raise PublishedError(f"config.json has bad_words_ids {words!r}: words of one token alone are banned here")
        banned = tuple(word[0] for word in words)
        for token in (bos, pad, start, first, last, *ends, *banned):
            if token is not None and not isinstance(token, int):
                raise PublishedError(f"config.json has the special token {token!r}: their ids are whole numbers")
        # As published: a ban of what ends a text is void.
        return cls(bos, ends, pad, start, first, last, tuple(token for token in banned if token not in ends))

    def to_published(self) -> dict[str, Any]:
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        fields = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}
        for name, token in (("decoder_start", self.start), ("forced_bos", self.first), ("forced_eos", self.last)):
            if token is not None:
                fields[f"{name}_token_id"] = token
        return fields | {"bad_words_ids": [[token] for token in self.banned]} if self.banned else fields


def require(fields: Mapping[str, Any], family: str, **only: Any) -> None:
    """Raises PublishedError where a field of config.json is there and is not the one value that the family has."""
    for name, value in only.items():
        found = fields.get(name, value)
        if found != value:
            raise PublishedError(f"config.json has {name} {found!r}, and a {family} here has {value!r} alone")


def check_head(config: Any, known: Collection[str]) -> None:
    """Raises LayerError unless a config's head is one of `known`, and its labels and problem_type fit such a head."""
    for name, names in (("head", known), ("problem_type", (None, *PROBLEMS))):
        value = getattr(config, name)
        if value not in names:
            raise LayerError(f"{name} {value!r} is unknown: choose one of {', '.join(filter(None, names))}")
    if not config.labels:
        raise LayerError("labels () are none: name each class")
    if config.head == "question_answering" and len(config.labels) != 2:
        raise LayerError(
            f"labels {config.labels}: question_answering scores the start and the end of an answer, so that it has 2"
        )


def head(fields: Mapping[str, Any], family: str, classes: Mapping[str, str], default: str | None = None) -> str:
    """Our name of the head whose class `architectures` names; `default` where it is left out, unless there is none.

    classes: published classes by our names of their heads.
    """
    found = fields.get("architectures", None if default is None else [classes[default]])
    for ours, published in classes.items():
        if found == [published]:
            return ours
    raise PublishedError(
        f"config.json has architectures {found!r}, and a {family} here is one of {', '.join(classes.values())}"
    )


def size(fields: Mapping[str, Any], name: str, *, optional: bool = False) -> Any:
    """A field of config.json that is a whole number from 1; None where it may be left out and is."""
    value = fields.get(name)
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PublishedError(f"config.json has {name} {value!r}: the model needs a whole number from 1 there")
    return value


def number(fields: Mapping[str, Any], name: str, default: float) -> float:
    """A field of config.json that is a number from 0; its default where it is left out."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise PublishedError(f"config.json has {name} {value!r}: the model needs a number from 0 there")
    return value


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """A field of config.json that is true or false; its default where it is left out."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise PublishedError(f"config.json has {name} {value!r}: the model needs true or false there")
    return value


def activation(fields: Mapping[str, Any], name: str, default: str) -> str:
    """Our name of the activation that a field names."""
    published = fields.get(name, default)
    if not isinstance(published, str) or published not in ACTIVATIONS:
        raise PublishedError(f"config.json has {name} {published!r}, which is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[published]


def published_activation(ours: str) -> str:
    return next(published for published, name in ACTIVATIONS.items() if name == ours)


def read_labels(fields: Mapping[str, Any], family: str, head: str) -> dict[str, Any]:
    """labels and problem_type of a config.json whose class has our `head`."""
    names, problem = labels(fields, family), fields.get("problem_type")
    if head == "question_answering" and len(names) != 2:
        raise PublishedError(f"config.json has {len(names)} labels, and a {family} that answers questions has 2")
    if problem not in (None, *PROBLEMS):
        raise PublishedError(f"config.json has problem_type {problem!r}, which is none of {', '.join(PROBLEMS)}")
    return {"labels": names, "problem_type": problem}


def labels(fields: Mapping[str, Any], family: str) -> tuple[str, ...]:
    """The names of classes, from id2label, or from their number where none are named. Two may bear the same name."""
    named = fields.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(size({"num_labels": 2} | dict(fields), "num_labels")))
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not numbers or set(named) != set(numbers) or not all(isinstance(label, str) for label in named.values()):
        raise PublishedError(f"config.json has id2label {named!r}, which does not name classes by their numbers from 0")
    names = tuple(named[i] for i in numbers)
    if len(set(names)) == len(names):
        require(fields, f"{family} with id2label {named!r}", label2id={name: i for i, name in enumerate(names)})
    return names


def published_labels(config: Any, *, always: bool = False) -> dict[str, Any]:
    """The fields that `read_labels` reads; the two names that nobody gave are left out unless `always`."""
    fields: dict[str, Any] = {}
    if always or config.labels != LABELS:
        fields["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        fields["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return fields if config.problem_type is None else fields | {"problem_type": config.problem_type}
