"""Loss curves of the small recipes beside the published implementations' in torch: same weights, same batches.

    python -m benchmarks.curves --torch-python PATH                PATH: an interpreter with torch and transformers

Each recipe runs its own model, data, objective and step, with AdamW at a constant rate behind a warm-up and without
dropout. The initial model is written with `zoo.save_pretrained`, the batches as arrays; Hugging Face's class loads the
one and trains on the others. Float32 on a CPU. Writes docs/curves/RECIPE.png and prints the largest differences.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sides
from zoo.models.transformer import PRESETS

TORCH = Path(__file__).with_name("torch_curves.py")
PICTURES = Path(__file__).parents[1] / "docs" / "curves"
RECIPES = (
    "gpt-nano",
    "llama-nano",
    "bert-nano",
    "xlnet-nano",
    "t5-nano",
    "bart-nano",
    "transformer-nano",
    "vit-digits",
)
RATE = 1e-3
_MARIAN = ("max_length", "positions", "attention_bias", "logits_bias", "norm_epsilon", "model_type")
CHANGES: dict[str, dict[str, Any]] = {
    "vit-digits": {"pool": "class"},
    "transformer-nano": {name: getattr(PRESETS["opus-mt-en-de"], name) for name in _MARIAN},
}
"""What of a recipe's model has no published form, and what stands for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="interpreter with torch and transformers")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            ours = train(name, options.steps, Path(folder))
            theirs = in_torch([options.torch_python, str(TORCH), folder])
        apart = np.abs(np.array(ours) - theirs)
        print(
            f"{name:12s} loss {ours[0]:.4f} to {ours[-1]:.4f}, torch {theirs[0]:.4f} to {theirs[-1]:.4f}; "
            f"apart at most {apart[:20].max():.1e} in 20 steps, {apart.max():.1e} in {len(apart)}"
        )
        draw(name, ours, theirs)


def in_torch(command: list[str]) -> list[float]:
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=sides.environment(command[0]))
    return json.loads(run.stdout)


def train(name: str, steps: int, folder: Path) -> list[float]:
    """Losses of zoo's steps; leaves the initial model, the batches and the rates in `folder`."""
    import jax

    import zoo
    from zoo import sharding
    from zoo.train import recipes, step
    from zoo.train.experiment import Optimizer

    recipe, mesh = recipes.RECIPES[name](), sharding.make_mesh(None, jax.devices()[:1])
    recipe.data.prepare()
    optimizer = Optimizer(learning_rate=RATE, warmup_steps=20, schedule="constant", weight_decay=0.0)
    changes = {n: 0.0 for n in ("dropout", "attention_dropout") if hasattr(recipe.model, n)} | CHANGES.get(name, {})
    experiment = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.data.fit(recipe.model), **changes),
        objective=type(recipe.objective)(),  # Without label smoothing.
        optimizer=optimizer,
        steps=steps,
        accumulate=1,
        ema=None,
        compute="float32",
    )
    experiment = step.with_compute(experiment, mesh)
    data = experiment.data.open("train", batch_size=experiment.batch_size, seed=experiment.seed)
    batches: list[dict[str, np.ndarray]] = [data.batch(i, range(experiment.batch_size)) for i in range(steps)]
    losses, rates = [], []
    with sharding.use(mesh):
        state: Any = step.init_state(experiment, mesh)
        zoo.save_pretrained(state.model, folder / "model")
        compiled = step.train_step(experiment, mesh)
        for batch in batches:
            state, metrics = compiled(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            losses.append(experiment.objective.summary(*jax.tree.map(float, metrics.loss))["loss"])
            rates.append(float(metrics.learning_rate))
    stacked: dict[str, Any] = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    np.savez(folder / "batches.npz", rates=np.array(rates), **stacked)
    return losses


def draw(name: str, ours: list[float], theirs: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, gap) = pyplot.subplots(2, 1, figsize=(6.4, 4.8), height_ratios=(3, 1), sharex=True)
    curve.plot(theirs, color="#d95f02", linewidth=3.5, alpha=0.5, label="torch")
    curve.plot(ours, color="#1b4f72", linewidth=1.2, label="zoo")
    curve.set_ylabel("training loss")
    curve.set_title(f"{name}: the same weights and batches")
    curve.legend(frameon=False)
    gap.semilogy(np.maximum(np.abs(np.array(ours) - theirs), 1e-8), color="#555555", linewidth=1)
    gap.set_ylabel("apart")
    gap.set_xlabel("step")
    for axes in (curve, gap):
        axes.spines[["top", "right"]].set_visible(False)
    PICTURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.png", dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
