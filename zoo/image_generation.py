"""Images from the published pipelines of zoo.pipelines: of nothing in particular, of classes, or of what a text says.

`draw` takes what a person says and checks it; `generate` is the pure function over arrays that it compiles.
"""

import difflib
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from zoo.diffusion import schedules
from zoo.diffusion.samplers import DDIM, DDPM, SAMPLERS, Sampler, Table
from zoo.diffusion.sampling import Callback, guided, sample
from zoo.models.noising import Noising
from zoo.pipelines import PIPELINES, Pipeline, scheduler_of
from zoo.sharding import constrain


class DrawingError(ValueError):
    """A request that a pipeline cannot meet; the message names the value and the mend."""


class Usual(NamedTuple):
    """How a pipeline samples where nothing else is asked for."""

    steps: int
    guidance: float = 1.0


USUAL: Mapping[str, Usual] = {
    "DDIMPipeline": Usual(50),
    "DDPMPipeline": Usual(1000),
    "DiTPipeline": Usual(50, 4.0),
    "StableDiffusionPipeline": Usual(50, 7.5),
}
"""By kind, as diffusers has it."""

STRENGTH, STRENGTH_WITH_MASK = 0.8, 1.0
"""Of changes to an image, and of painting parts of it, where none is asked for; as diffusers has it too."""


def generate(
    pipeline: Pipeline,
    key: jax.Array,
    *,
    shape: tuple[int, int, int],
    table: Table,
    given: jax.Array | None = None,
    blank: jax.Array | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    image: jax.Array | None = None,
    mask: jax.Array | None = None,
    noise: jax.Array | None = None,
    callback: Callback | None = None,
) -> jax.Array:
    """Images [B, Y, X, C], float32 in [-1, 1]; `shape` is (B, Y, X). A pure function, to be called under `jax.jit`.

    given: what the network is told: tokens [B, S] of texts, framed and padded, or classes [B], or None.
    blank: of the same shape, what guidance leads away from (see zoo.diffusion.sampling.guided).
    image [B, Y, X, C] in [-1, 1], mask [B, Y, X, 1]: see zoo.diffusion.sampling.sample. A latent is painted where any
        of its pixels is; pixels that are not come back as they were given.
    noise: that which sampling begins with, as the network takes it, [B, y, x, C]; None draws it.
    callback: told of every step, and of what the network takes then.
    """
    network, vae = denoiser(pipeline), pipeline.vae
    draw_key, encode_key = jax.random.split(key)
    factor = 1 if vae is None else vae.config.factor
    start, painted = image, mask
    if vae is not None and image is not None:
        start = vae.config.scaled(vae.encode(image).sample(encode_key))
    if mask is not None:
        painted = reduce(mask, "b (y i) (x j) c -> b y x c", "max", i=factor, j=factor)
    name = told_by(pipeline)
    if name == "context":
        given, blank = (None if a is None else pipeline.text_encoder(a).hidden for a in (given, blank))

    def ask(x: jax.Array, time: jax.Array, told: Any) -> jax.Array:
        return network(x, time, **({} if name is None else {name: told}))

    denoise = guided(ask, given, blank, scale=guidance, rescale=rescale)
    size = latent_shape(pipeline, shape)
    images = sample(denoise, table, size, draw_key, image=start, mask=painted, noise=noise, callback=callback)
    if vae is not None:
        images = vae.decode(vae.config.unscaled(images))
    if image is not None and mask is not None:
        images = jnp.where(mask > 0, images, image)
    # Whole on every device, so that each process has them.
    return constrain(jnp.clip(images, -1, 1), None, None, None, None)


_generate = jax.jit(generate, static_argnames=("shape", "table", "guidance", "rescale", "callback"))


def draw(
    pipeline: Pipeline,
    key: jax.Array,
    *,
    prompts: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    classes: Sequence[int] | None = None,
    count: int | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    guidance: float | None = None,
    rescale: float = 0.0,
    size: tuple[int, int] | None = None,
    image: Any = None,
    mask: Any = None,
    strength: float | None = None,
    noise: Any = None,
    callback: Callback | None = None,
) -> jax.Array:
    """Images [B, Y, X, C], float32 in [-1, 1]. Over a mesh within `zoo.sharding.use`; the same on any.

    prompts, classes: one for each image, for pipelines that are told them; `count` images take them in turn. Class
        num_classes is none of them, where the network has one for none.
    negative_prompt: what guidance leads away from, nothing said where None.
    steps, guidance: None: USUAL.  sampler: a name in SAMPLERS; None: that of the pipeline's scheduler.
    size: (Y, X); None: that of `image`, else what the network was trained on.
    image [Y, X, C] or [B, Y, X, C] in [-1, 1]: what to begin with, `strength` of the steps from the end.
    mask [Y, X, 1] or [B, Y, X, 1]: 1 where to paint that image anew and 0 where it stays.
    rescale, noise, callback: see `generate`. Another callback is another compilation.
    Raises DrawingError, or ScheduleError for steps and strengths that there are not.
    """
    _check_parts(pipeline)
    if image is not None and np.ndim(image) not in (3, 4):
        raise DrawingError(f"the image has shape {np.shape(image)}: give [Y, X, C], or [B, Y, X, C]")
    sizes = wanted_size(pipeline, np.shape(image)[-3:-1] if size is None and image is not None else size)
    scale = _checked_guidance(pipeline, USUAL[pipeline.kind].guidance if guidance is None else guidance)
    table = table_of(pipeline, steps=steps, sampler=sampler, strength=share_of_steps(image, mask, strength))
    given, blank, rows = _told(pipeline, prompts, negative_prompt, classes, count)
    if negative_prompt and scale == 1.0:
        raise DrawingError("guidance 1 leads away from nothing: raise it, or leave the negative prompt out")
    shape = (rows, *sizes)
    return _generate(
        pipeline,
        key,
        shape=shape,
        table=table,
        given=given,
        blank=None if scale == 1.0 else blank,
        guidance=scale,
        rescale=rescale,
        image=_rows("image", image, (*shape, image_channels(pipeline))),
        mask=_rows("mask", mask, (*shape, 1)),
        noise=_rows("noise", noise, latent_shape(pipeline, shape)),
        callback=callback,
    )


def denoiser(pipeline: Pipeline) -> Any:
    """The network that predicts."""
    return pipeline.transformer if pipeline.unet is None else pipeline.unet


def told_by(pipeline: Pipeline) -> str | None:
    """What the network is told beside the time: "context" of a text, "classes", or nothing."""
    if pipeline.text_encoder is not None:
        return "context"
    return "classes" if getattr(denoiser(pipeline).config, "num_classes", None) is not None else None


def image_channels(pipeline: Pipeline) -> int:
    return (pipeline.vae or denoiser(pipeline)).config.image_channels


def latent_shape(pipeline: Pipeline, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """[B, y, x, C] of what the network takes for images of (B, Y, X)."""
    (rows, y, x), factor = shape, 1 if pipeline.vae is None else pipeline.vae.config.factor
    return rows, y // factor, x // factor, denoiser(pipeline).config.image_channels


def size_multiple(pipeline: Pipeline) -> int:
    """Pixels whose multiples the sides of an image must be."""
    config = denoiser(pipeline).config
    of_network = config.patch_size if pipeline.transformer is not None else 2 ** (len(config.channels) - 1)
    return of_network * (1 if pipeline.vae is None else pipeline.vae.config.factor)


def wanted_size(pipeline: Pipeline, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(Y, X) of images: `size`, or what the network was trained on; raises DrawingError where it does not fit."""
    if size is None:
        trained = denoiser(pipeline).config.image_size
        if trained is None:
            raise DrawingError(f"this {pipeline.kind} does not say what size it was trained on: give a size")
        factor = 1 if pipeline.vae is None else pipeline.vae.config.factor
        y, x = (trained, trained) if isinstance(trained, int) else trained
        size = (y * factor, x * factor)
    multiple = size_multiple(pipeline)
    if min(size) < 1 or size[0] % multiple or size[1] % multiple:
        near = " x ".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise DrawingError(
            f"images of {size[0]} x {size[1]} do not fit this {pipeline.kind}, which halves them or cuts them into "
            f"patches: choose multiples of {multiple}, such as {near}"
        )
    return size


def table_of(
    pipeline: Pipeline, *, steps: int | None = None, sampler: str | Sampler | None = None, strength: float = 1.0
) -> Table:
    """How the pipeline samples, under the noise that its scheduler says; the same object for the same request.

    A sampler by name is the scheduler's own where that is of its kind, else that of SAMPLERS, bounds no latents, and
    has the network's variance where it says one.
    """
    noising, published = scheduler_of(pipeline)
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            nearest = difflib.get_close_matches(sampler, SAMPLERS, n=1, cutoff=0.0)[0]
            raise DrawingError(
                f"unknown sampler {sampler!r}: did you mean {nearest}? (there are {', '.join(SAMPLERS)})"
            )
        named = SAMPLERS[sampler]
        if type(named) is type(published):
            named = published
        else:
            if pipeline.vae is not None and isinstance(named, DDPM | DDIM):
                named = replace(named, clip=None)
            if isinstance(named, DDPM) and getattr(denoiser(pipeline).config, "learned_sigma", False):
                named = replace(named, variance="learned")
        sampler = named
    steps = usual_steps(pipeline) if steps is None else steps
    return _table(noising, sampler or published, steps, strength)


def usual_steps(pipeline: Pipeline) -> int:
    return min(USUAL[pipeline.kind].steps, denoiser(pipeline).config.noising.timesteps)


@functools.lru_cache
def _table(noising: Noising, sampler: Sampler, steps: int, strength: float) -> Table:
    return sampler.table(schedules.make(noising), steps, strength=strength)


def text_tokens(pipeline: Pipeline, texts: Sequence[str]) -> np.ndarray:
    """Token ids of texts [N, S], framed and padded to what the text encoder reads; longer ones are cut, with a warning
    that names the words that are left out."""
    words, encoder = pipeline.tokenizer, pipeline.text_encoder
    if words is None or encoder is None:
        raise DrawingError(f"a {pipeline.kind} reads no text: leave prompts out")
    told, limit = words.settings.fields.get("model_max_length"), encoder.config.max_length
    limit = int(min(limit, told)) if isinstance(told, int | float) and told > 0 else limit
    if "pad_token" not in words.special_ids:
        raise DrawingError(f"{words.settings.folder} names no pad_token: texts are padded with one")
    rows = np.full((len(texts), limit), words.special_ids["pad_token"], np.int32)
    frame = len(words.encode([""])[0])
    for row, ids, bare in zip(rows, words.encode(texts), words.encode(texts, special=False), strict=True):
        if len(ids) > limit:
            lost = words.decode(bare[limit - frame :])
            warnings.warn(
                f"the text encoder reads {limit} tokens and a prompt has {len(ids)}: it is cut before {lost!r}",
                stacklevel=4,
            )
            ids = [*ids[: limit - 1], ids[-1]]  # The last one ends the text.
        row[: len(ids)] = ids
    if rows.size and rows.max() >= encoder.config.vocab_size:
        raise DrawingError(
            f"the tokenizer gives token {rows.max()}, and the text encoder has {encoder.config.vocab_size}: "
            "they are not of one pipeline"
        )
    return rows


def _told(
    pipeline: Pipeline,
    prompts: str | Sequence[str] | None,
    negative_prompt: str | None,
    classes: Sequence[int] | None,
    count: int | None,
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """What the network is told, what guidance leads away from, and of how many images."""
    kind, name, config = pipeline.kind, told_by(pipeline), denoiser(pipeline).config
    prompts = [prompts] if isinstance(prompts, str) else prompts
    last = 0 if name != "classes" else config.num_classes - 1
    wanted = {"context": "a text: give a prompt", "classes": f"classes: give them, each 0 to {last}", None: "nothing"}
    for what, value, reader in (
        ("a prompt", prompts, "context"),
        ("a negative prompt", negative_prompt, "context"),
        ("classes", classes, "classes"),
    ):
        if value is not None and name != reader:
            raise DrawingError(f"{what} cannot be told to a {kind}, which is told {wanted[name]}: leave {what} out")
    told = {"context": prompts, "classes": classes, None: [None]}[name]
    if told is None or not len(told):
        raise DrawingError(f"a {kind} is told {wanted[name]}")
    rows = len(told) if count is None else count
    if rows < 1:
        raise DrawingError(f"{rows} images are none: choose a number from 1")
    if prompts is not None:
        given, blank = text_tokens(pipeline, prompts), text_tokens(pipeline, [negative_prompt or ""])
    elif classes is not None:
        # The row behind the classes is that of none.
        wrong = [c for c in classes if not 0 <= c <= last + config.null_class]
        if wrong:
            raise DrawingError(f"class {wrong[0]} is none of this {kind}'s: choose from 0 to {last}")
        given, blank = np.asarray(classes, np.int32), np.array([config.num_classes], np.int32)
    else:
        return None, None, rows
    turns = np.arange(rows)
    return given[turns % len(given)], blank[turns % len(blank)], rows


def _check_parts(pipeline: Pipeline) -> None:
    if pipeline.kind not in USUAL:
        raise DrawingError(f"a {pipeline.kind} is not known: pipelines here are {', '.join(USUAL)}")
    for name in PIPELINES[pipeline.kind]:
        if getattr(pipeline, name) is None:
            raise DrawingError(f"a {pipeline.kind} has a {name}, and this one has None: give it one")
    network, latent = denoiser(pipeline).config, image_channels(pipeline)
    if pipeline.vae is not None:
        latent = pipeline.vae.config.latent_channels
    predicted = network.image_channels if pipeline.transformer is not None else network.predicted_channels
    if (network.image_channels, predicted) != (latent, latent):
        raise DrawingError(
            f"the network reads {network.image_channels} channels and predicts {predicted}, and there are {latent} to "
            "draw: no such pipeline is known here"
        )


def _checked_guidance(pipeline: Pipeline, scale: float) -> float:
    if not 0 <= scale < float("inf"):
        raise DrawingError(f"guidance {scale} does not lead to what is asked for: choose a number from 0, 1 is none")
    if scale == 1.0 or told_by(pipeline) == "context":
        return float(scale)
    if told_by(pipeline) is None:
        raise DrawingError(f"guidance {scale} leads a {pipeline.kind} nowhere, which is told nothing: leave it at 1")
    if not denoiser(pipeline).config.null_class:
        raise DrawingError(f"guidance {scale} needs a class that stands for none, and there is no such: leave it at 1")
    return float(scale)


def share_of_steps(image: Any, mask: Any, strength: float | None) -> float:
    """`strength`, or the usual one; raises DrawingError for what has no image to begin with."""
    if image is None and mask is not None:
        raise DrawingError("a mask says which parts of an image stay, and no image is given: give one")
    if image is None and strength is not None:
        raise DrawingError(f"strength {strength} is of changes to an image, and none is given: give one")
    if strength is not None and not 0 < strength <= 1:
        raise DrawingError(f"strength {strength} is no share of the steps: choose from above 0 to 1")
    usual = 1.0 if image is None else STRENGTH if mask is None else STRENGTH_WITH_MASK
    return usual if strength is None else strength


def _rows(name: str, array: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """An image [Y, X, C] for every row, or one for each, of `shape` [B, Y, X, C]."""
    if array is None:
        return None
    if np.shape(array) not in (shape, shape[1:]):
        raise DrawingError(f"the {name} has shape {np.shape(array)}, and those drawn {shape}: give {shape[1:]}")
    return jnp.broadcast_to(jnp.asarray(array, jnp.float32), shape)
