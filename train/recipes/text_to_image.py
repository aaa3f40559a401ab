"""Images from texts, trained from nothing: digits that every install has, and emoji that you fetch."""

from zoo.models.text_to_image import PRESETS, TextToImageConfig
from zoo.train.caption_sampler import CaptionSampler
from zoo.train.data.captions import CaptionedImageData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import Denoising

TextToImage = Experiment[TextToImageConfig, CaptionedImageData, Denoising, CaptionSampler]


def text_to_digits() -> TextToImage:
    """A U-Net that reads captions, on scikit-learn's digits: five minutes on two CPU cores, ends in a grid of prompts.

    Command:  zoo train text-to-digits
              zoo sample RUN --prompt "a bold seven" "the digit 4, leaning left" --guidance 5
    Data:     digits (1797 handwritten digits of 8 x 8 pixels, part of scikit-learn), with captions of what is measured
              of them: which one, bold or thin, leaning left or right; a byte-pair encoding of 320 is trained on those
    Model:    CLIP's text tower in 2 layers of width 64, and the U-Net of ddpm-digits attending to its states; a tenth
              of the captions are left empty, for guidance; cosine noise schedule, velocity predicted
    Result:   a classifier that knows 99.4 % of held-out digits finds all of 1,068 samples, six of each held-out
              caption, to be the digit that it names; 4.59 bits per dimension of held-out digits of 8 bits, given their
              captions (python -m benchmarks.digits RUN), seed 0, on a CPU
    """
    return Experiment(
        name="text-to-digits",
        model=PRESETS["text-to-digits"],
        data=CaptionedImageData(source="digits", train_bpe=320, length=16),
        objective=Denoising(caption_dropout=0.1),
        sampler=CaptionSampler(
            prompt=("a bold handwritten three", "a thin seven", "the digit 4, leaning left", "a one leaning right")
        ),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, b2=0.99, weight_decay=0.01),
        steps=1200,
        batch_size=64,
        ema=0.995,
        eval_every=400,
        checkpoint_every=400,
    )


def text_to_emoji() -> TextToImage:
    """A U-Net that reads captions, on a folder of captioned pictures such as emoji and their names.

    Command:   zoo train text-to-emoji --data.source FOLDER     FOLDER: pictures and captions.jsonl, see docs/data.md
    Data:      ./emoji unless given: pictures scaled to 32 x 32, and a byte-pair encoding of 2048 of their captions
    Model:     CLIP's text tower in 6 layers of width 256, and a U-Net of width 128 to 256 that attends to its states at
               16 x 16 and 8 x 8
    Result:    not run by this project; its data is read: 1,911 of Google's emoji, 190 of them held out
    Hardware:  one accelerator of 16 GB or more
    """
    return Experiment(
        name="text-to-emoji",
        model=PRESETS["text-to-emoji"],
        data=CaptionedImageData(source="./emoji", train_bpe=2048, length=24, size=32),
        objective=Denoising(caption_dropout=0.1),
        sampler=CaptionSampler(prompt=("red heart", "smiling cat face", "green apple", "blue car")),
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=1000, b2=0.99, weight_decay=0.01),
        steps=50_000,
        batch_size=128,
        ema=0.999,
        eval_every=2000,
        checkpoint_every=2000,
    )
