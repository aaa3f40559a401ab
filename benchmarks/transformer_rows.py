"""Rows of Transformer families: every golden folder of a published class, and a preset of its model_type."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from benchmarks import family_cells, tasks
from benchmarks.family_cells import GOLDEN, difference
from benchmarks.family_table import Table
from benchmarks.tasks import PRESETS
from zoo import models
from zoo.generation import generate

COLUMNS = {"golden files": False, "published class": False, "preset": False, "its parameters": True, "parity": True}
COLUMNS |= {"round trip": False, "cached": True, "sharded": True, "v5e:2x4": True, "speed": True}

OUTPUTS = {
    "logits": lambda out: out.logits,
    "hidden": lambda out: out.intermediates.hidden[-1] if getattr(out, "hidden", None) is None else out.hidden,
    "pooled": lambda out: out.pooled,
    "next_sentence": lambda out: out.next_sentence,
}
"""Golden outputs that are compared, and where a module gives them."""


class Case(NamedTuple):
    """A golden folder: its config.json, and inputs and outputs of the published model."""

    folder: Path
    fields: dict[str, Any]
    golden: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.folder.relative_to(GOLDEN)}"

    @property
    def kind(self) -> str:
        return self.fields["model_type"]

    @property
    def given(self) -> tuple[tuple, dict[str, Any]]:
        g = self.golden
        if "sources" in g:
            return (g["sources"], g.get("tokens")), {"source_segments": g["real"].astype(np.int32)}
        if "images" in g:
            return (g["images"],), {name: g[name] for name in ("masked",) if name in g}
        if "mask" in g:
            return (g["tokens"],), {"segments": g["mask"].astype(np.int32)}
        names = ("token_types", "real", "targets", "perm_mask")
        return (g["tokens"],), {name: g[name] for name in names if name in g}

    def expected(self) -> dict[str, np.ndarray]:
        """Outputs by their names in OUTPUTS, zero where they do not count."""
        found = {name.removeprefix("out_"): x for name, x in self.golden.items() if name.startswith("out_")}
        found = {"logits": self.golden["logits"]} if "logits" in self.golden else found
        for states in ("hidden_states", "hidden"):  # Of every layer, the last being an output.
            of_all = "sources" in self.golden or ("hidden" not in found and "targets" not in self.golden)
            if states in found and of_all:
                found["hidden"] = found[states][-1]
                break
        return {name: self.counted(x) for name, x in found.items() if name in OUTPUTS}

    def counted(self, x: Any) -> np.ndarray:
        """`x`, zero where a token only pads, of outputs by token; BERT's and XLNet's published losses count all."""
        where = self.golden.get("mask", self.golden.get("counted"))
        x = np.asarray(x)
        if where is None or x.shape[: where.ndim] != where.shape:
            return x
        return np.where(where.astype(bool).reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, 0)


def cases() -> Iterator[Case]:
    for path in sorted(GOLDEN.rglob("golden.npz")):
        config = path.parent / "config.json"
        if "flax" not in path.parts and config.exists():
            fields = json.loads(config.read_text())
            if fields.get("model_type") in PRESETS:
                yield Case(path.parent, fields, dict(np.load(path)))


def call(model: Any, case: Case) -> Any:
    positional, named = case.given
    if "before" in case.golden:  # XLNet's memories of an earlier segment.
        before = case.golden["before"]
        named = named | {"memories": model(before, memories=model.init_memories(len(before))).memories}
    named = named | ({"return_intermediates": True} if "sources" in case.golden else {})
    return jax.jit(lambda model: model(*positional, **named))(model)


def parity(case: Case) -> str:
    out = call(zoo.from_pretrained(case.folder), case)
    return family_cells.largest((case.counted(OUTPUTS[name](out)), x) for name, x in case.expected().items())


def cached(case: Case) -> str:
    """Logits of a text in two pieces with a cache, rows of different length, against the whole text."""
    model: Any = zoo.from_pretrained(case.folder)
    g = case.golden
    if not hasattr(model, "features") or case.kind in ("bert", "vit", "dinov2", "dinov2_with_registers"):
        return "no cache"
    if case.kind == "xlnet":
        if "prompts" not in g:
            return "no cache"
        made = generate(model, g["prompts"].tolist(), max_new_tokens=7).tokens
        same = made == g[f"made_{case.fields.get('use_mems_eval', True)}_1"].tolist()
        return "token for token" if same else "DIFFERS"
    if "tokens" not in g:
        return "no cache"
    tokens = g["tokens"][:, :12]
    encoded = model.encode(g["sources"], segments=g["real"]) if "sources" in g else None
    named = {} if encoded is None else {"encoded": encoded}
    # A model that scores no words is told by its states.
    scored = model.logits if getattr(model.config, "head", "lm") == "lm" else np.asarray
    lengths = jnp.arange(len(tokens)) + 3
    whole = np.asarray(scored(model.features(tokens, **named).hidden))
    cache = model.init_cache(len(tokens) if encoded is None else encoded, 16)
    cache = model.features(tokens[:, : int(lengths.max())], cache=cache).cache.cut(lengths)
    worst = 0.0
    for step in range(4):
        place = lengths[:, None] + step
        out = model.features(jnp.take_along_axis(tokens, place, axis=1), cache=cache)
        cache = out.cache
        expected = np.take_along_axis(whole, np.asarray(place)[..., None], axis=1)
        finite = np.isfinite(expected)
        worst = max(worst, difference(np.where(finite, scored(out.hidden), 0), np.where(finite, expected, 0)))
    return f"{worst:.0e}"


def sharded(case: Case) -> str:
    """The case's class in sizes that divide, on four rows of its inputs."""
    config = models.published_config(case.fields)
    config = dataclasses.replace(config, **family_cells.even(config))
    four = case._replace(golden=family_cells.four_rows(case.golden, len(case.given[0][0])))
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    return family_cells.sharded(model, lambda model: jax.tree.map(four.counted, call(model, four)))


def compiled(kind: str, config: Any) -> str:
    """GiB a chip of the training step of a preset, or why there is none."""
    # With AdamW's moments 16 bytes a parameter: a larger model needs more chips than these.
    cut = config
    while models.parameter_count(cut) > 2e9:
        cut = dataclasses.replace(cut, num_layers=cut.num_layers // 4)
    if cut != config:
        return f"{compiled(kind, cut)} ({cut.num_layers} of {config.num_layers} layers)"
    return family_cells.compiled(*training(kind, config))


def training(kind: str, config: Any, length: int = 512) -> tuple[Any, dict[str, np.ndarray]]:
    """An experiment of a preset with its family's own objective, and one row of its batches."""
    from zoo.train import objectives
    from zoo.train.recipes import RECIPES

    config, objective = tasks.task(kind, config)
    row, few = np.ones((1, length), np.int32), np.ones((1, length // 6), np.int32)
    words = {"targets": few, "places": few, "weights": few.astype(np.float32)}
    if isinstance(objective, objectives.MaskedLM):
        batch = {"tokens": row, "token_types": row, "segments": row, "next_sentence": row[:, 0], **words}
    elif isinstance(objective, objectives.PermutationLM):
        batch = {"tokens": row, "token_types": row, "order": row, **words}
    elif isinstance(objective, objectives.Classification):
        images = np.zeros((1, *config.image_size, 3), np.float32)
        batch = {"images": images, "labels": row[:, 0], "weights": np.ones(1, np.float32)}
    elif isinstance(objective, objectives.SequenceToSequence):
        batch = {"sources": row, "tokens": row, "targets": row, "weights": row.astype(np.float32)}
    else:
        names = ("tokens", "targets", "segments", "positions", "bytes")
        batch = dict.fromkeys(names, row) | {"weights": row.astype(np.float32)}
    config = dataclasses.replace(config, remat="attention")
    experiment = dataclasses.replace(
        RECIPES["gpt2"](), model=config, objective=objective, batch_size=16, accumulate=1, compute="bfloat16"
    )
    return experiment, batch


def speed(kind: str) -> str:
    """Of the newest result; older ones do not say how many layers ran: all did."""
    setting = {"model": kind, "dtype": "float32", "batch": 2, "length": 512, "huge_pages": False}
    result = family_cells.newest("train_step.jsonl", setting)
    layers, every = (result or {}).get("layers"), (result or {}).get("preset_layers")
    return family_cells.ratio(result, "" if layers == every else f"{layers} of {every} layers")


@functools.cache
def of_kind(kind: str) -> tuple[str, str]:
    """Parameters of the preset of a model_type, and what its training step takes."""
    config = models.preset(PRESETS[kind])
    return f"{models.parameter_count(config):,}", compiled(kind, config)


def table() -> Table:
    found = {case.name: case for case in cases()}

    def cells(name: str) -> tuple[str, ...]:
        case = found[name]
        parameters, fits = of_kind(case.kind)
        published, preset = f"`{case.fields['architectures'][0]}`", f"`{PRESETS[case.kind]}`"
        round_trip = family_cells.round_trip(case.folder)
        return (published, preset, parameters, parity(case), round_trip, cached(case), sharded(case), fits)

    kinds = {name: case.kind for name, case in found.items()}
    return Table(COLUMNS, kinds, cells, lambda name: speed(kinds[name]))
