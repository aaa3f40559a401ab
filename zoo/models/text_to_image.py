"""A text tower and a U-Net that attends to its states, as one model: what draws a text, trained together from nothing.

Rombach et al. 2022, arXiv 2112.10752, section 3.3, whose text transformer is trained with the network as well. Stable
Diffusion's tower is CLIP's, and stays as it was trained: there the two are parts of a pipeline, see zoo.pipelines.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.dropout import split
from zoo.layers.linear import LayerError, Precision
from zoo.models.clip import CLIPTextConfig
from zoo.models.noising import Noising
from zoo.models.published import SpecialTokens
from zoo.models.unet import UNetConfig


@dataclass(frozen=True)
class TextToImageConfig:
    """text: of the tower that reads the text.  network: of the U-Net, whose context_width is the tower's width.

    precision: of both; theirs are not looked at.
    """

    text: CLIPTextConfig
    network: UNetConfig
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        if self.network.context_width != self.text.width:
            raise LayerError(
                f"network.context_width {self.network.context_width} is not text.width {self.text.width}: the network "
                "attends to the text's states, make them equal"
            )
        if self.network.num_classes is not None:
            raise LayerError(f"network.num_classes {self.network.num_classes}: a network of texts has no classes")

    def build(self, rngs: nnx.Rngs) -> "TextToImage":
        return TextToImage(self, rngs=rngs)

    @property
    def noising(self) -> Noising:
        return self.network.noising

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.network.image_size

    @property
    def image_channels(self) -> int:
        return self.network.image_channels

    @property
    def blank(self) -> tuple[int, ...]:
        """The tokens [S] of the empty text, which stands for none where there is guidance."""
        special = self.text.special_tokens
        begin, (end,), pad = special.bos, special.eos, special.pad
        return (end if begin is None else begin, end, *[end if pad is None else pad] * (self.text.max_length - 2))

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one image's forward pass, `shape` its (Y, X, C), and of its text's, at its greatest length."""
        length = self.text.max_length
        return self.network.forward_flops(shape, context_length=length) + self.text.forward_flops((length,))


class TextToImage(nnx.Module):
    """Predicts the noise in images, or what else it was trained to, from them, the time, and tokens of their texts."""

    def __init__(self, config: TextToImageConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = replace(config.text, precision=config.precision).build(rngs)
        self.network = replace(config.network, precision=config.precision).build(rngs)

    def encode(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The states [B, S, E] of texts [B, S] int32, to be asked about any number of times."""
        return self.text(tokens, key=key).hidden

    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        *,
        tokens: jax.Array | None = None,
        context: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """images [B, Y, X, C] and time [B] (0 the least noisy): the prediction [B, Y, X, out channels], float32.

        tokens [B, S] int32, or context [B, S, E], what `encode` made of them: one of the two, else LayerError.
        key: for dropout; None drops nothing.
        """
        if (tokens is None) == (context is None):
            raise LayerError("a text is given as tokens, or as the context that `encode` made of them: give one")
        text_key, image_key = split(key, 2)
        if tokens is not None:
            context = self.encode(tokens, key=text_key)
        return self.network(images, time, context=jnp.asarray(context), key=image_key)


PRESETS: dict[str, TextToImageConfig] = {
    "text-to-digits": TextToImageConfig(
        text=CLIPTextConfig(
            vocab_size=321,
            max_length=16,
            num_layers=2,
            width=64,
            num_heads=4,
            mlp_width=128,
            special_tokens=SpecialTokens(bos=320, eos=(0,), pad=0),
        ),
        network=UNetConfig(
            image_channels=1,
            image_size=(8, 8),
            channels=(32, 64),
            blocks_per_level=1,
            num_heads=4,
            context_width=64,
            groups=8,
            noising=Noising("cosine", target="velocity"),
        ),
    ),
    "text-to-emoji": TextToImageConfig(
        text=CLIPTextConfig(
            vocab_size=2049,
            max_length=24,
            num_layers=6,
            width=256,
            num_heads=8,
            mlp_width=1024,
            special_tokens=SpecialTokens(bos=2048, eos=(0,), pad=0),
        ),
        network=UNetConfig(
            image_size=(32, 32),
            channels=(128, 256, 256),
            attention_levels=(1, 2),
            num_heads=8,
            context_width=256,
            dropout=0.1,
            noising=Noising("cosine", target="velocity"),
        ),
    ),
}
