"""The KL autoencoder that latent diffusion works in (Rombach et al. 2022, arXiv 2112.10752, section 3.1, appendix G).

Sizes and parts are those of the released weights, Stable Diffusion's and later ones. What a latent is scaled by before
a diffusion model sees it is in the config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.convolution import Conv, GroupNorm, fan_average
from zoo.layers.linear import LayerError, Linear, Precision, check_sizes
from zoo.layers.unet import Downsample, ResidualBlock, SpatialAttention, Upsample, check_images, constrain_image
from zoo.models.autoencoder_layout import entering, layout
from zoo.models.published import Layout, PublishedError, flag, number, require, size
from zoo.models.tiling import tiled

EPSILON = 1e-6
"""Of every normalisation: published configs do not name it."""

LOG_VARIANCES = (-30.0, 20.0)
"""Beyond which log variances are cut, as published."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Level i works on images of 1 / 2^i of the size, with channels[i] channels; a latent has the last level's size.

    blocks_per_level: residual blocks of a level on the way down; there is one more on the way up.
    groups: of every normalisation.  middle_attention: whether pixels attend to each other at the smallest size.
    moment_map, latent_map: whether a linear map of the channels ends the encoder, and whether one begins the decoder.
    sample_size: pixels a side of the images trained on, and of tiles unless told.
    scaling_factor, shift_factor, latent_mean, latent_deviation: what `scaled` applies; the last two by channel.
    force_upcast: that the weights overflow in float16, which is for people to heed: computing follows `precision`.
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    groups: int = 32
    middle_attention: bool = True
    moment_map: bool = True
    latent_map: bool = True
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latent_mean: tuple[float, ...] | None = None
    latent_deviation: tuple[float, ...] | None = None
    force_upcast: bool = True
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("image_channels", "latent_channels", "blocks_per_level", "groups", "sample_size")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_sizes(**{f"channels[{i}]": channels for i, channels in enumerate(self.channels)})
        if not self.channels:
            raise LayerError("channels () make no level: give one for each level, such as (32, 64)")
        if not self.scaling_factor > 0:
            raise LayerError(f"scaling_factor {self.scaling_factor} scales nothing: choose a number above 0")
        counts = {len(values or ()) for values in (self.latent_mean, self.latent_deviation)}
        if counts not in ({0}, {self.latent_channels}):
            raise LayerError(
                f"latent_mean {self.latent_mean} and latent_deviation {self.latent_deviation} are not both of "
                f"{self.latent_channels} channels: give both, or neither"
            )
        if self.latent_mean is not None and self.shift_factor is not None:
            raise LayerError(f"latent_mean is given with shift_factor {self.shift_factor}: give one of them")

    @property
    def factor(self) -> int:
        """Pixels a side for one of a latent."""
        return 2 ** (len(self.channels) - 1)

    def build(self, rngs: nnx.Rngs) -> "Autoencoder":
        return Autoencoder(self, rngs=rngs)

    def scaled(self, latents: jax.Array) -> jax.Array:
        """Latents [..., C] as a diffusion model takes them, of about unit variance."""
        shift, factor = self._affine()
        return (latents - shift) * factor

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """What `scaled` made, [..., C], as `decode` takes it."""
        shift, factor = self._affine()
        return latents / factor + shift

    def _affine(self) -> tuple[Any, Any]:
        if self.latent_mean is not None and self.latent_deviation is not None:
            return jnp.array(self.latent_mean), self.scaling_factor / jnp.array(self.latent_deviation)
        return self.shift_factor or 0.0, self.scaling_factor

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one image's reconstruction, `shape` its (Y, X, C): convolutions, maps, attention's products."""
        height, width, image_channels = shape
        c, latent = self.channels, self.latent_channels
        pixels = [(height >> level) * (width >> level) for level in range(len(c))]

        def conv(pixels: int, inputs: int, outputs: int, size: int = 3) -> float:
            return 2.0 * pixels * inputs * outputs * size**2

        def residual(pixels: int, inputs: int, outputs: int) -> float:
            shortcut = 0.0 if inputs == outputs else conv(pixels, inputs, outputs, 1)
            return conv(pixels, inputs, outputs) + conv(pixels, outputs, outputs) + shortcut

        total = conv(pixels[0], image_channels, c[0]) + conv(pixels[0], c[0], image_channels)
        for level, (n, outputs) in enumerate(zip(pixels, c, strict=True)):
            for inputs, blocks in ((entering(c)[level], 0), (entering(c[::-1])[len(c) - 1 - level], 1)):
                total += residual(n, inputs, outputs)
                total += (self.blocks_per_level - 1 + blocks) * residual(n, outputs, outputs)
        for level in range(1, len(c)):
            total += conv(pixels[level], c[level - 1], c[level - 1]) + conv(pixels[level - 1], c[level], c[level])
        n, outputs = pixels[-1], c[-1]
        total += 4 * residual(n, outputs, outputs) + conv(n, outputs, 2 * latent) + conv(n, latent, outputs)
        if self.middle_attention:
            total += 2 * (4 * conv(n, outputs, outputs, 1) + 2 * 2.0 * n**2 * outputs)
        total += self.moment_map * conv(n, 2 * latent, 2 * latent, 1) + self.latent_map * conv(n, latent, latent, 1)
        return total

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "AutoencoderConfig":
        """From the config.json of diffusers' AutoencoderKL; raises PublishedError for one that this module cannot be.

        What older files leave out is as diffusers has it then.
        """
        channels = _numbers(fields, "block_out_channels", [64])
        image_channels = size({"in_channels": 3} | dict(fields), "in_channels")
        require(
            {"out_channels": 3} | dict(fields),
            "KL autoencoder",
            out_channels=image_channels,
            act_fn="silu",
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
        )
        defaults = {"layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 4, "sample_size": 32}
        sizes = {name: size(defaults | dict(fields), name) for name in defaults}
        shift, mean, deviation = (fields.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
        return cls(
            image_channels=image_channels,
            latent_channels=sizes["latent_channels"],
            channels=tuple(size({"block_out_channels": c}, "block_out_channels") for c in channels),
            blocks_per_level=sizes["layers_per_block"],
            groups=sizes["norm_num_groups"],
            middle_attention=flag(fields, "mid_block_add_attention", True),
            moment_map=flag(fields, "use_quant_conv", True),
            latent_map=flag(fields, "use_post_quant_conv", True),
            sample_size=sizes["sample_size"],
            scaling_factor=number(fields, "scaling_factor", 0.18215),
            shift_factor=None if shift is None else _numbers({"shift_factor": [shift]}, "shift_factor", [])[0],
            latent_mean=None if mean is None else _numbers(fields, "latents_mean", []),
            latent_deviation=None if deviation is None else _numbers(fields, "latents_std", []),
            force_upcast=flag(fields, "force_upcast", True),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this autoencoder."""
        levels = len(self.channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": self.force_upcast,
            "in_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "latents_mean": None if self.latent_mean is None else list(self.latent_mean),
            "latents_std": None if self.latent_deviation is None else list(self.latent_deviation),
            "layers_per_block": self.blocks_per_level,
            "mid_block_add_attention": self.middle_attention,
            "norm_num_groups": self.groups,
            "out_channels": self.image_channels,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": self.latent_map,
            "use_quant_conv": self.moment_map,
        }

    def published_layout(self) -> Layout:
        return layout(self)


def _numbers(fields: Mapping[str, Any], name: str, default: list) -> tuple[Any, ...]:
    value = fields.get(name, default)
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise PublishedError(f"config.json has {name} {value!r}: the model needs numbers there")
    return tuple(value)


class Posterior(NamedTuple):
    """A normal distribution of an image's latent, each entry by itself: mean and log_variance [B, Y, X, C] float32."""

    mean: jax.Array
    log_variance: jax.Array

    @classmethod
    def of(cls, moments: jax.Array) -> "Posterior":
        """From what the encoder gives, [B, Y, X, 2 C]."""
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, -1)
        return cls(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def sample(self, key: jax.Array) -> jax.Array:
        """A latent [B, Y, X, C]."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> jax.Array:
        """Divergence from the standard normal distribution, nats for each image, [B]."""
        each = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * each.sum((1, 2, 3))


class Reconstruction(NamedTuple):
    """images: [B, Y, X, C] float32, decoded from `latents`.  latents: [B, y, x, C] of `posterior`."""

    images: jax.Array
    latents: jax.Array
    posterior: Posterior


class Level(nnx.Module):
    """Residual blocks, and behind them what leads to the next level's size; None at the last level."""

    def __init__(
        self,
        config: AutoencoderConfig,
        inputs: int,
        outputs: int,
        blocks: int,
        resample: Downsample | Upsample | None,
        *,
        rngs: nnx.Rngs,
    ):
        make = _residual(config, rngs)
        self.blocks = nnx.List([make(outputs if i else inputs, outputs) for i in range(blocks)])
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """Two residual blocks at the smallest size, with attention between them where the config has it."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        channels, make = config.channels[-1], _residual(config, rngs)
        options = {"groups": config.groups, "epsilon": EPSILON, "precision": config.precision, "rngs": rngs}
        self.block_in = make(channels, channels)
        self.attention = SpatialAttention(channels, num_heads=1, **options) if config.middle_attention else None
        self.block_out = make(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block_in(x)
        return self.block_out(x if self.attention is None else self.attention(x))


class Encoder(nnx.Module):
    """Images [B, Y, X, C] to [B, Y / factor, X / factor, 2 * latent_channels]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        channels, options = config.channels, {"rngs": rngs, "precision": config.precision}
        self.conv_in = Conv(config.image_channels, channels[0], in_axis=None, **options)
        self.levels = nnx.List()
        for i, (inputs, outputs) in enumerate(zip(entering(channels), channels, strict=True)):
            down = Downsample(outputs, **options) if i < len(channels) - 1 else None
            self.levels.append(Level(config, inputs, outputs, config.blocks_per_level, down, rngs=rngs))
        self.middle = Middle(config, rngs=rngs)
        self.norm_out = GroupNorm(channels[-1], config.groups, epsilon=EPSILON, precision=config.precision)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, out_axis=None, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = constrain_image(self.conv_in(images))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents [B, y, x, C] to images [B, y * factor, x * factor, image_channels]; its first level is the smallest."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        channels, options = config.channels[::-1], {"rngs": rngs, "precision": config.precision}
        self.conv_in = Conv(config.latent_channels, channels[0], in_axis=None, **options)
        self.middle = Middle(config, rngs=rngs)
        self.levels = nnx.List()
        for i, (inputs, outputs) in enumerate(zip(entering(channels), channels, strict=True)):
            up = Upsample(outputs, **options) if i < len(channels) - 1 else None
            self.levels.append(Level(config, inputs, outputs, config.blocks_per_level + 1, up, rngs=rngs))
        self.norm_out = GroupNorm(channels[-1], config.groups, epsilon=EPSILON, precision=config.precision)
        self.conv_out = Conv(channels[-1], config.image_channels, out_axis=None, **options)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.middle(constrain_image(self.conv_in(latents)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Images in [-1, 1] to distributions of latents, and latents to images.

    Raises LayerError for images and latents that do not fit the network.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": (None, None), "init": fan_average, "precision": config.precision, "rngs": rngs}
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.moment_map = Linear(moments, moments, **options) if config.moment_map else None
        self.latent_map = Linear(latents, latents, **options) if config.latent_map else None
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> Reconstruction:
        """images [B, Y, X, C] through a latent and back. key: draws the latent; None takes the mean."""
        posterior = self.encode(images)
        latents = posterior.mean if key is None else posterior.sample(key)
        return Reconstruction(self.decode(latents), latents, posterior)

    def encode(self, images: jax.Array) -> Posterior:
        """The latents of images [B, Y, X, C]."""
        return Posterior.of(self.moments(images))

    def moments(self, images: jax.Array) -> jax.Array:
        """Means and log variances of latents, not cut yet, [B, y, x, 2 C] float32."""
        self._check_images(images)
        x = self.encoder(images.astype(self.config.precision.compute))
        return (x if self.moment_map is None else self.moment_map(x)).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """The images [B, y * factor, x * factor, C] float32 of latents [B, y, x, C], unscaled."""
        self._check_latents(latents)
        x = latents.astype(self.config.precision.compute)
        return self.decoder(x if self.latent_map is None else self.latent_map(x)).astype(jnp.float32)

    def encode_tiled(self, images: jax.Array, *, tile: int | None = None, overlap: float = 0.25) -> Posterior:
        """As `encode`, for images of any size in the memory that a tile takes: see `zoo.models.tiling.tiled`.

        Each tile is normalised by itself, and its pixels attend to each other alone, so that latents differ a little
        from those of the whole. An image that is no larger than a tile is encoded whole.
        tile: pixels a side, a multiple of config.factor; config.sample_size where None.  overlap: share of a tile.
        """
        self._check_images(images)
        tile, latent_tile = self._tile(tile)
        if max(images.shape[1:3]) <= tile:
            return self.encode(images)
        moments = tiled(partial(_moments, self), images, tile=tile, out_tile=latent_tile, overlap=overlap)
        return Posterior.of(jnp.asarray(moments))

    def decode_tiled(self, latents: jax.Array, *, tile: int | None = None, overlap: float = 0.25) -> jax.Array:
        """As `decode`, for latents of any size in the memory that a tile takes; the arguments as in `encode_tiled`."""
        self._check_latents(latents)
        tile, latent_tile = self._tile(tile)
        if max(latents.shape[1:3]) <= latent_tile:
            return self.decode(latents)
        return jnp.asarray(tiled(partial(_decoded, self), latents, tile=latent_tile, out_tile=tile, overlap=overlap))

    def _tile(self, tile: int | None) -> tuple[int, int]:
        factor, tile = self.config.factor, self.config.sample_size if tile is None else tile
        if tile < factor or tile % factor:
            raise LayerError(f"tiles of {tile} pixels hold no whole latents: choose a multiple of {factor}")
        return tile, tile // factor

    def _check_images(self, images: jax.Array) -> None:
        factor = self.config.factor
        check_images(images, self.config.image_channels)
        if images.shape[1] % factor or images.shape[2] % factor:
            raise LayerError(
                f"images are {images.shape[1]} x {images.shape[2]}, which {len(self.config.channels)} levels do not "
                f"halve evenly: choose multiples of {factor}, or fewer channels"
            )

    def _check_latents(self, latents: jax.Array) -> None:
        if latents.ndim != 4 or latents.shape[-1] != self.config.latent_channels:
            raise LayerError(
                f"latents have shape {latents.shape}: the network takes [B, y, x, {self.config.latent_channels}]"
            )


@jax.jit
def _moments(model: Autoencoder, images: jax.Array) -> jax.Array:
    return model.moments(images)


@jax.jit
def _decoded(model: Autoencoder, latents: jax.Array) -> jax.Array:
    return model.decode(latents)


def _residual(config: AutoencoderConfig, rngs: nnx.Rngs) -> partial[ResidualBlock]:
    options = {"groups": config.groups, "epsilon": EPSILON, "precision": config.precision, "rngs": rngs}
    return partial(ResidualBlock, time_width=None, **options)


PRESETS: dict[str, AutoencoderConfig] = {
    "sd-vae-ft-mse": AutoencoderConfig(sample_size=256),
    "autoencoder-digits": AutoencoderConfig(
        image_channels=1,
        channels=(16, 32, 32),
        blocks_per_level=1,
        groups=8,
        sample_size=16,
        scaling_factor=1.0,
    ),
}
