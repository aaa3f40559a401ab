"""Every family and head: parity with the published implementation, round trips, caches, sharding, compiling for a pod.

    python -m benchmarks.families --out docs/models.md             half an hour
    python -m benchmarks.families --out docs/models.md --kinds t5  the rows of one model_type, written anew

Cells come from runs on eight simulated CPU devices, over the golden files of tests/parity, which transformers on torch
made, and over presets of published size. Parity is the largest difference of any output, relative to its largest value
or 1. Compiling needs the extra `aot` (libtpu): it is of the training step, on 8 chips of a v5e, mesh fsdp=8, bfloat16.
Speed is the newest result of `benchmarks.train_step --save`, zoo over torch, in rows that stay as well.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track
from safetensors.numpy import load_file

import zoo
from benchmarks import pod, tasks
from benchmarks.tasks import PRESETS
from zoo import models, sharding
from zoo.generation import generate

GOLDEN = Path(__file__).parents[1] / "tests" / "parity"
SPEEDS = Path(__file__).with_name("results") / "train_step.jsonl"
BEGIN, END = "<!-- made by python -m benchmarks.families -->", "<!-- end -->"

EVEN = {"width": 32, "num_heads": 4, "num_kv_heads": 2, "num_decoder_heads": 4, "head_dim": 8, "mlp_width": 48}
EVEN |= {"decoder_mlp_width": 48}
"""Sizes that a mesh of two in every direction divides; golden files have awkward ones."""


COLUMNS = ("golden files", "published class", "preset", "its parameters")
COLUMNS += ("parity", "round trip", "cached", "sharded", "v5e:2x4", "speed")


OUTPUTS = {
    "logits": lambda out: out.logits,
    "hidden": lambda out: out.intermediates.hidden[-1] if getattr(out, "hidden", None) is None else out.hidden,
    "pooled": lambda out: out.pooled,
    "next_sentence": lambda out: out.next_sentence,
}
"""Golden outputs that are compared, and where a module gives them."""


class Row(NamedTuple):
    """One line of the table."""

    golden: str
    published: str
    preset: str
    parameters: str
    parity: str
    round_trip: str
    cached: str
    sharded: str
    compiled: str
    speed: str


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
            if fields.get("model_type") in models.PUBLISHED:
                yield Case(path.parent, fields, dict(np.load(path)))


def call(model: Any, case: Case) -> Any:
    positional, named = case.given
    if "before" in case.golden:  # XLNet's memories of an earlier segment.
        before = case.golden["before"]
        named = named | {"memories": model(before, memories=model.init_memories(len(before))).memories}
    named = named | ({"return_intermediates": True} if "sources" in case.golden else {})
    return jax.jit(lambda model: model(*positional, **named))(model)


def difference(a: Any, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max() / max(1.0, float(np.abs(b).max())))


def parity(case: Case) -> str:
    out = call(zoo.from_pretrained(case.folder), case)
    expected = case.expected()
    return f"{max(difference(case.counted(OUTPUTS[name](out)), x) for name, x in expected.items()):.0e}"


def round_trip(case: Case) -> str:
    with tempfile.TemporaryDirectory() as parent:
        zoo.save_pretrained(zoo.from_pretrained(case.folder), Path(parent) / "out")
        found, expected = (load_file(place / "model.safetensors") for place in (Path(parent) / "out", case.folder))
    same = found.keys() == expected.keys() and all(found[n].tobytes() == x.tobytes() for n, x in expected.items())
    return "same bits" if same else "DIFFERS"


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
    """On data=2,fsdp=2,tensor=2 against one device: the case's class in sizes that divide, four rows of its inputs."""
    config = models.published_config(case.fields)
    fields = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) is not None}
    config = dataclasses.replace(config, **{name: size for name, size in EVEN.items() if name in fields})
    count = len(case.given[0][0])
    rows = {n: np.concatenate([x] * 4)[:4] if x.ndim and len(x) == count else x for n, x in case.golden.items()}
    four, mesh = case._replace(golden=rows), sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    whole = call(model, four)
    with sharding.use(mesh):
        parts = call(jax.device_put(model, sharding.shardings(model, mesh)), four)
    pairs = zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True)
    return f"{max(difference(four.counted(a), four.counted(b)) for a, b in pairs):.0e}"


def compiled(kind: str, config: Any) -> str:
    """GiB a chip of the training step of a preset, or why there is none."""
    # With AdamW's moments 16 bytes a parameter: a larger model needs more chips than these.
    cut = config
    while models.parameter_count(cut) > 2e9:
        cut = dataclasses.replace(cut, num_layers=cut.num_layers // 4)
    if cut != config:
        return f"{compiled(kind, cut)} ({cut.num_layers} of {config.num_layers} layers)"
    try:
        pod.devices()
    except Exception as problem:
        return f"not run: {str(problem).splitlines()[0][:40]}"
    return f"{pod.held(*training(kind, config), 'fsdp=8'):.1f} GiB"


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
    found = [json.loads(line) for line in SPEEDS.read_text().splitlines()] if SPEEDS.exists() else []
    setting = {"model": kind, "dtype": "float32", "batch": 2, "length": 512, "huge_pages": False}
    mine = [one for one in found if "torch" in one and setting.items() <= one.items()]
    if not mine:
        return "not measured"
    newest = mine[-1]
    ratio = f"{newest['zoo']['per_second'] / newest['torch']['per_second']:.2f}"
    layers, every = newest.get("layers"), newest.get("preset_layers")
    return ratio if layers == every else f"{ratio} ({layers} of {every} layers)"


def table(kinds: list[str]) -> dict[str, str]:
    """The line of every golden folder of these model_types."""
    rows, of_kind = {}, {}
    for case in track([case for case in cases() if case.kind in kinds], description="families"):
        if case.kind not in of_kind:
            config = models.preset(PRESETS[case.kind])
            size = f"{models.parameter_count(config):,}"
            of_kind[case.kind] = (size, compiled(case.kind, config), speed(case.kind))
        parameters, fits, ratio = of_kind[case.kind]
        row = Row(
            golden=case.name,
            published=f"`{case.fields['architectures'][0]}`",
            preset=f"`{PRESETS[case.kind]}`",
            parameters=parameters,
            parity=parity(case),
            round_trip=round_trip(case),
            cached=cached(case),
            sharded=sharded(case),
            compiled=fits,
            speed=ratio,
        )
        rows[row.golden] = f"| {' | '.join(row)} |"
    return rows


def with_speed(line: str, kind: str) -> str:
    """A line made before, with the speed that was measured since."""
    return " | ".join([*line.split(" | ")[:-1], f"{speed(kind)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a page whose table, between its marks, is written anew")
    parser.add_argument("--kinds", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="MODEL_TYPE")
    options = parser.parse_args()
    before, _, rest = (options.out.read_text() if options.out else "").partition(BEGIN)
    held, _, after = rest.partition(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in held.splitlines() if "`" in line}
    kinds = {case.name: case.kind for case in cases()}
    rows = {name: with_speed(line, kinds[name]) for name, line in rows.items() if name in kinds}
    rows |= table(options.kinds)
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|",
        *(rows[name] for name in sorted(rows)),
    ]
    made = "\n".join(lines)
    if options.out is None:
        print(made)
    else:
        options.out.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
