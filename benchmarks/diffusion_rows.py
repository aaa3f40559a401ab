"""Rows of diffusion families: golden folders of networks with the presets that they stand for, and of pipelines."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

import zoo
from benchmarks import diffusion_tasks, family_cells
from benchmarks.family_cells import GOLDEN
from benchmarks.family_table import Table
from zoo import models
from zoo.image_generation import draw

NETWORKS = {"golden files": False, "published class": False, "preset": False, "its parameters": True, "parity": True}
NETWORKS |= {"round trip": False, "sharded": True, "v5e:2x4": True, "speed": True}
PIPELINES = {"golden files": False, "published class": False, "steps": True, "parity": True, "round trip": False}
PIPELINES |= {"sharded": True}

PRESETS = {
    "unet/ddpm": ("ddpm-cifar10", "ddpm-celebahq-256"),
    "unet/classes": ("ddpm-digits",),
    "unet/text": ("stable-diffusion-v1-5",),
    "unet/text_and_classes": ("stable-diffusion-2-1",),
    "autoencoder/plain": ("sd-vae-ft-mse",),
    "autoencoder/bare": ("sd-vae-ft-mse",),
    "clip/text": ("clip-vit-large-patch14-text",),
    "clip/text_projection": ("stable-diffusion-2-text",),
    "dit/each": ("dit-xl-2",),
    "dit/shared": ("dit-xl-2",),
}
"""Presets of published sizes for each golden folder of a network."""

Arrays = dict[str, Any]
PIXELS_FIRST = ("images", "out")
"""Arrays that DiT's golden files have as [B, C, Y, X]."""


def denoised(model: Any, given: Arrays) -> Arrays:
    told = {name: given[name] for name in ("classes", "context") if name in given}
    return {"out": model(given["images"], given["time"], **told)}


def autoencoded(model: Any, given: Arrays) -> Arrays:
    out = model(given["images"])
    mean, log_variance = out.posterior
    decoded = model.decode(mean + jnp.exp(0.5 * log_variance) * given["noise"])
    found = {"mean": mean, "log_variance": log_variance, "kl": out.posterior.kl()}
    return found | {"images": out.images, "decoded": decoded}


def in_tiles(model: Any, given: Arrays, encoded: np.ndarray) -> Arrays:
    """What an autoencoder makes of an image that is large, which no jit may be around; `encoded` is then decoded."""
    mean, log_variance = model.encode_tiled(given["large"])
    decoded = model.decode_tiled(encoded)
    return {"tiled_mean": mean, "tiled_log_variance": log_variance, "tiled_decoded": decoded}


def read(model: Any, given: Arrays) -> Arrays:
    out = model(given["tokens"], return_intermediates=True)
    found = {name: getattr(out, name) for name in ("hidden", "pooled", "projected")}
    return {name: x for name, x in found.items() if x is not None} | {"states": out.intermediates.hidden}


CALLS: dict[str, Callable[[Any, Arrays], Arrays]] = {
    "AutoencoderKL": autoencoded,
    "CLIPTextModel": read,
    "CLIPTextModelWithProjection": read,
    "DiTTransformer2DModel": denoised,
    "UNet2DConditionModel": denoised,
    "UNet2DModel": denoised,
}
"""What a module of each published class makes of a golden file's inputs, by the names of its outputs there."""


def published(folder: Path) -> str:
    fields = json.loads((folder / "config.json").read_text())
    return fields.get("_class_name") or fields["architectures"][0]


def golden(folder: Path) -> tuple[Arrays, Arrays]:
    """Inputs and outputs of a golden file."""
    arrays = dict(np.load(folder / "golden.npz"))
    if published(folder) == "DiTTransformer2DModel":
        arrays |= {name: rearrange(arrays[name], "b c y x -> b y x c") for name in PIXELS_FIRST}
    outputs = {name.removeprefix("out_"): x for name, x in arrays.items() if name.partition("_")[0] == "out"}
    return arrays, outputs


def called(folder: Path, given: Arrays) -> Callable[[Any], Arrays]:
    return jax.jit(lambda model: CALLS[published(folder)](model, given))


def parity(folder: Path) -> str:
    given, outputs = golden(folder)
    model: Any = zoo.from_pretrained(folder)
    found = called(folder, given)(model)
    if "large" in given:
        found |= in_tiles(model, given, outputs["tiled_mean"])
    return family_cells.largest((found[name], x) for name, x in outputs.items())


def sharded(folder: Path) -> str:
    """The folder's class in sizes that divide, no parameter at zero, on four rows of its inputs."""
    config = models.published_config(json.loads((folder / "config.json").read_text()))
    channels = tuple(16 + 8 * level for level in range(len(getattr(config, "channels", ()))))
    config = dataclasses.replace(config, **family_cells.even(config, channels=channels, groups=4))
    given, _ = golden(folder)
    given = family_cells.four_rows(given, len(given["images" if "images" in given else "tokens"]))
    draw, model = np.random.default_rng(0), jax.jit(lambda: config.build(nnx.Rngs(0)))()
    model = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), model)
    return family_cells.sharded(model, lambda model: called(folder, given)(model))


@functools.cache
def of_preset(name: str) -> tuple[str, str]:
    """Parameters of a preset, and what its training step takes."""
    experiment = diffusion_tasks.trained(name)
    example = diffusion_tasks.batch(experiment.model, 1, diffusion_tasks.TASKS[name].pod)
    return f"{models.parameter_count(models.preset(name)):,}", family_cells.compiled(experiment, example)


def speed(name: str) -> str:
    result = family_cells.newest("diffusion.jsonl", {"what": "train", "model": name})
    return family_cells.ratio(result, (result or {}).get("ran", ""))


def networks() -> Table:
    found = {
        f"{case} | `{published(GOLDEN / case)}` | `{preset}`": (GOLDEN / case, preset)
        for case, presets in sorted(PRESETS.items())
        for preset in presets
    }

    @functools.cache
    def of_folder(folder: Path) -> tuple[str, str, str]:
        return parity(folder), family_cells.round_trip(folder), sharded(folder)

    def cells(name: str) -> tuple[str, ...]:
        folder, preset = found[name]
        parameters, fits = of_preset(preset)
        return (parameters, *of_folder(folder), fits)

    return Table(
        NETWORKS, {name: preset for name, (_, preset) in found.items()}, cells, lambda name: speed(found[name][1])
    )


def drawn(folder: Path) -> tuple[str, str, str, str]:
    """Steps; images as diffusers draws them, from 0 to 1; the round trip of all parts; four images on a mesh."""
    golden, asked = np.load(folder / "golden.npz"), json.loads((folder / "asked.json").read_text())
    pipeline = zoo.from_pretrained(folder)

    def images(pipeline: Any, noise: np.ndarray, asked: Arrays) -> jax.Array:
        return (draw(pipeline, jax.random.key(0), noise=noise, **asked) + 1) / 2

    twice = {n: x * 2 if n in ("prompts", "classes", "count") else x for n, x in asked.items()}
    four = np.concatenate([golden["noise"], golden["noise"][:, ::-1]])
    return (
        str(asked["steps"]),
        family_cells.largest([(images(pipeline, golden["noise"], asked), golden["images"])]),
        family_cells.round_trip(folder),
        family_cells.sharded(pipeline, lambda pipeline: images(pipeline, four, twice)),
    )


def pipelines() -> Table:
    folders = {path.parent.name: path.parent for path in sorted((GOLDEN / "pipelines").glob("*/model_index.json"))}
    kinds = {
        name: json.loads((folder / "model_index.json").read_text())["_class_name"] for name, folder in folders.items()
    }
    rows = {f"pipelines/{name} | `{kind}`": kind for name, kind in kinds.items()}
    found = dict(zip(rows, folders.values(), strict=True))
    return Table(PIPELINES, rows, lambda name: drawn(found[name]))
