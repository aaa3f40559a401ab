"""What looks at images where sets of them are compared: a ViT of a run or a published one, or the Inception of the FID.

Products are of float32 whatever the hardware and whatever the network was trained in, so that distances compare.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import sharding
from zoo.layers.linear import Precision
from zoo.models.inception import SIDE, InceptionConfig
from zoo.models.vit import ViT, ViTConfig
from zoo.pretrained import from_pretrained, read_weights
from zoo.published_folder import find_model, is_on_hub, read_json
from zoo.sharding import constrain
from zoo.train import run_folder
from zoo.train import session as sessions
from zoo.train.experiment import Placement, UserError

ROWS = 32  # images at once

KINDS = "a run of vit-digits or another ViT, a folder of a published ViT, or Inception weights (safetensors)"


@dataclass(frozen=True)
class FeatureNetwork:
    """name: for a person to read.  size: (Y, X) of the images it takes.  channels: of them.

    see: images [B, Y, X, C] in [-1, 1] of that size to features [B, D]; pure.
    """

    name: str
    model: Any
    size: tuple[int, int]
    channels: int
    see: Callable[[Any, jax.Array], jax.Array]
    mesh: jax.sharding.Mesh

    def features(self, images: np.ndarray) -> np.ndarray:
        """Of images uint8 [N, Y, X, C]: float32 [N, D]. Another size is brought to the network's, and grey to colour.

        Raises UserError where their channels are not the network's.
        """
        if images.shape[-1] not in (1, self.channels):
            raise UserError(
                f"images of {images.shape[-1]} channels are shown to {self.name}, which takes {self.channels}: "
                "name another feature network"
            )
        rows = -(-ROWS // sharding.batch_ways(self.mesh)) * sharding.batch_ways(self.mesh)
        found = []
        with sharding.use(self.mesh), jax.default_matmul_precision("highest"):
            for first in range(0, len(images), rows):
                batch = images[first : first + rows]
                filled = np.pad(batch, ((0, rows - len(batch)), (0, 0), (0, 0), (0, 0)))
                found.append(np.asarray(self._seen(self.model, filled))[: len(batch)])
        return np.concatenate(found)

    @cached_property
    def _seen(self) -> Callable[[Any, np.ndarray], jax.Array]:
        @jax.jit
        def seen(model: Any, pixels: jax.Array) -> jax.Array:
            images = constrain(pixels.astype(jnp.float32) / 127.5 - 1, "act_batch", None, None, None)
            images = jnp.broadcast_to(images, (*images.shape[:-1], self.channels))
            return constrain(self.see(model, images).astype(jnp.float32), None, None)

        return seen


def open_network(source: str, placement: Placement) -> FeatureNetwork:
    """The network that `source` names, one of KINDS; raises UserError, or what reading it raises."""
    path = Path(source).expanduser()
    if path.is_file():
        return _inception(path, placement)
    if run_folder.is_run(path) and not run_folder.is_published(path):
        return _of_run(path, placement)
    if not path.is_dir() and not is_on_hub(source):
        raise UserError(f"--features {source} is not there: name {KINDS}")
    return _published(source, placement)


def _inception(path: Path, placement: Placement) -> FeatureNetwork:
    mesh = sharding.make_mesh(placement.mesh)
    model = read_weights(path, InceptionConfig(), mesh=mesh)
    return FeatureNetwork(f"Inception-v3 ({path})", model, (SIDE, SIDE), 3, lambda model, x: model(x), mesh)


def _of_run(folder: Path, placement: Placement) -> FeatureNetwork:
    session = sessions.reopen(folder, placement)
    experiment = session.experiment
    if not isinstance(experiment.model, ViTConfig):
        raise UserError(f"--features {folder} is a run of {experiment.name}, which is no ViT: name {KINDS}")
    exact = dataclasses.replace(experiment.model, precision=Precision(experiment.model.precision.parameters))
    session = sessions.Session(dataclasses.replace(experiment, model=exact), session.mesh)
    model, step = sessions.trained_model(folder, session)
    return _vit(f"{experiment.name} ({folder}, step {step:,})", model, session.mesh)


def _published(source: str, placement: Placement) -> FeatureNetwork:
    mesh = sharding.make_mesh(placement.mesh)
    folder = find_model(source)
    model = from_pretrained(folder, mesh=mesh)
    if not isinstance(model, ViT):
        raise UserError(f"--features {source} is a {type(model).__name__}, which is no ViT: name {KINDS}")
    return _vit(source, model, mesh, normalisation(folder))


def _vit(
    name: str, model: ViT, mesh: jax.sharding.Mesh, normalised: tuple[np.ndarray, np.ndarray] | None = None
) -> FeatureNetwork:
    """What a ViT pools. normalised: mean and deviation of channels, from 0 to 1, that it was trained with; None: its
    images are from -1 to 1.
    """
    size = model.config.image_size

    def see(model: ViT, x: jax.Array) -> jax.Array:
        if x.shape[1:3] != size:
            x = jax.image.resize(x, (len(x), *size, x.shape[-1]), "cubic")
        if normalised is not None:
            x = ((x + 1) / 2 - normalised[0]) / normalised[1]
        return model(x).pooled

    return FeatureNetwork(name, model, size, model.config.image_channels, see, mesh)


def normalisation(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation of the channels of pixels from 0 to 1, by preprocessor_config.json; None where there is none.

    Raises UserError where the file says something else of them.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    fields = read_json(path)
    found = [fields.get(name) for name in ("image_mean", "image_std")]
    try:
        mean, deviation = np.array(found, np.float32)
    except (ValueError, TypeError):
        mean, deviation = np.zeros(()), np.zeros(())
    if fields.get("do_normalize") is False or mean.ndim != 1 or not (deviation > 0).all():
        raise UserError(
            f"{path} has image_mean {found[0]} and image_std {found[1]}: pixels are normalised by both here"
        )
    return mean, deviation
