"""For each preset of diffusion families: what trains it, at what size on a pod and on a CPU, and random batches."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tasks
from zoo import models
from zoo.train.experiment import Batch, Loss, Optimizer
from zoo.train.objectives import Denoising
from zoo.train.recipes import RECIPES

TOKENS = 77
"""Of a text, as Stable Diffusion reads it."""

ROWS_A_CHIP = 8
CHIPS = 8


@dataclass(frozen=True)
class DenoisingOfTexts(Denoising):
    """Denoising by a network whose texts come as their states, `context` [B, S, E]: the tower stays as it is."""

    def _given(self, config: Any, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        return {"context": batch["context"]}


@dataclass(frozen=True)
class States:
    """Mean squared error of the states of texts, over batches of tokens [B, T], targets [B, T, D], weights [B].

    What a text tower learns from another. zoo has no objective of its own for one that is alone.
    """

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        errors = jnp.square(model(batch["tokens"], key=key).hidden - batch["targets"]).mean((1, 2))
        return Loss(jnp.sum(batch["weights"] * errors), jnp.sum(batch["weights"]), {})

    def summary(self, total: float, weight: float, metrics: Any) -> dict[str, float]:
        """loss: squared error of a state's entry."""
        return {"loss": total / max(weight, 1.0)}


class Task(NamedTuple):
    """recipe: what trains it, but for what it is told; None: nothing in zoo does alone, see States.

    pod: pixels a side of images, or of latents, on a pod.  side, rows: of images on a CPU, and how many, or texts.
    levels: how many stay on a CPU; None: all.
    """

    recipe: str | None
    rows: int
    side: int | None = None
    pod: int | None = None
    levels: int | None = None


TASKS = {
    "ddpm-cifar10": Task("ddpm-cifar10", rows=8, side=32, pod=32),
    "ddpm-celebahq-256": Task("ddpm-cifar10", rows=2, side=64, pod=256),
    "ddpm-digits": Task("ddpm-digits", rows=64, side=8, pod=8),
    "stable-diffusion-v1-5": Task("text-to-emoji", rows=1, side=32, pod=64, levels=2),
    "stable-diffusion-2-1": Task("text-to-emoji", rows=1, side=32, pod=64, levels=2),
    "sd-vae-ft-mse": Task("autoencoder-digits", rows=1, side=128, pod=256),
    "clip-vit-large-patch14-text": Task(None, rows=4),
    "stable-diffusion-2-text": Task(None, rows=4),
    "dit-xl-2": Task("dit-xl-2", rows=2, side=32, pod=32),
}


def denoises(name: str) -> bool:
    return hasattr(models.preset(name), "noising")


def trained(name: str) -> Any:
    """The experiment of a preset at its published size, ROWS_A_CHIP on each of CHIPS."""
    task, config = TASKS[name], models.preset(name)
    recipe = RECIPES[task.recipe or "text-to-emoji"]()
    objective = recipe.objective
    if task.recipe is None:
        objective = States()
    elif getattr(config, "context_width", None) is not None:
        objective = DenoisingOfTexts()
    if name == task.recipe:
        config = recipe.model  # A recipe says what its backward pass keeps, too.
    return dataclasses.replace(recipe, model=config, objective=objective, batch_size=ROWS_A_CHIP * CHIPS)


def on_a_cpu(name: str) -> tuple[Any, str]:
    """The config of a preset without dropout, and cut to fit; what of it ran, where it is not all at its own size."""
    task, whole = TASKS[name], models.preset(name)
    config, ran = tasks.undropped(whole), []
    if getattr(config, "learned_sigma", False):
        config = dataclasses.replace(config, learned_sigma=False)
    if hasattr(config, "num_layers"):
        config = tasks.cut(config)
        if config.num_layers < whole.num_layers:
            ran.append(f"{config.num_layers} of {whole.num_layers} layers")
    if task.levels is not None:
        config = of_levels(config, task.levels)
        ran.append(f"{task.levels} of {len(whole.channels)} levels")
    if task.side != task.pod:
        ran.append(f"{task.side} x {task.side}")
    return config, ", ".join(ran)


def of_levels(config: Any, levels: int) -> Any:
    """A U-Net's config with its first levels alone."""
    heads = config.num_heads if isinstance(config.num_heads, int) else config.num_heads[:levels]
    attention = tuple(level for level in config.attention_levels if level < levels)
    return dataclasses.replace(config, channels=config.channels[:levels], num_heads=heads, attention_levels=attention)


def step_on_a_cpu(name: str, fields: dict[str, Any], rows: int) -> Any:
    """The experiment of a training step, float32, of a preset as its config.json `fields` say."""
    model, experiment = models.published_config(fields), trained(name)
    objective = experiment.objective
    if isinstance(objective, Denoising):
        # No config.json says the noise; torch drops no class but DiT's, which costs nothing.
        model = dataclasses.replace(model, noising=models.preset(name).noising)
        objective = dataclasses.replace(objective, class_dropout=0.0)
    if hasattr(model, "remat"):
        model = dataclasses.replace(model, remat="products")
    return dataclasses.replace(
        experiment,
        model=model,
        objective=objective,
        batch_size=rows,
        ema=None,
        compute="float32",
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=0, schedule="constant", weight_decay=0.0),
    )


def batch(config: Any, rows: int, side: int | None) -> dict[str, np.ndarray]:
    """Random inputs of one step, by the names that objectives read: images of side x side, or texts where it is None.

    With images stand their classes, or the states of their texts, where the model is told those.
    """
    draw, made = np.random.default_rng(0), {"weights": np.ones(rows, np.float32)}
    if side is None:
        made["tokens"] = draw.integers(config.vocab_size, size=(rows, TOKENS), dtype=np.int32)
        made["targets"] = draw.standard_normal((rows, TOKENS, config.width), np.float32)
        return made
    made["images"] = draw.uniform(-1, 1, (rows, side, side, config.image_channels)).astype(np.float32)
    if (classes := getattr(config, "num_classes", None)) is not None:
        made["labels"] = draw.integers(classes, size=rows, dtype=np.int32)
    if (width := getattr(config, "context_width", None)) is not None:
        made["context"] = draw.standard_normal((rows, TOKENS, width), np.float32)
    return made
