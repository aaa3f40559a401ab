"""T5 from scratch: 1.1 base on the paper's schedule, and one for a laptop."""

from dataclasses import replace

from zoo.models.t5 import PRESETS, T5Config
from zoo.train.data.span_corruption import SpanCorruptionData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler

T5 = Experiment[T5Config, SpanCorruptionData, SequenceToSequence, TargetSampler]


def t5_nano() -> T5:
    """A small T5 on the language reference of this Python: three minutes on two busy CPU cores.

    Command:  zoo train t5-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics;
              30 % of the bytes in spans of 8, since 15 % in spans of 3 are few and short ones
    Model:    2 layers of width 128 and 4 heads a side, gated, 128 bytes to read and 59 to write, 0.9 M parameters
    Result:   held out, 2.32 nats a token (3.48 by frequencies), 34 % right: what bytes follow each other. It hardly
              reads its sources yet (2.35 nats with those of other rows), and gets better slowly when it ends
    """
    return Experiment(
        name="t5-nano",
        # Tied: a head of its own begins with scores of +-11 at this width, and unlearns them for hundreds of steps.
        model=T5Config(
            vocab_size=359,
            num_layers=2,
            width=128,
            num_heads=4,
            head_dim=32,
            mlp_width=320,
            activation="gelu_tanh",
            gated=True,
            dropout=0.0,
        ),
        data=SpanCorruptionData(source="python_docs", length=128, noise_density=0.3, mean_span=8.0),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=500,
        batch_size=16,
        eval_every=250,
        checkpoint_every=250,
    )


def t5_base() -> T5:
    """T5 1.1 base from scratch on Wikipedia, or a corpus of your own (Raffel et al. 2019, sections 3.1.2 to 3.1.4).

    Command:   zoo train t5-base --mesh data=8
               zoo train t5-base --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
    Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 32,026 is trained on it, which
               padding, the end and 100 sentinels make the published 32,128. The paper has C4 and sentencepiece: give
               --data.source c4/en where TFDS holds it prepared
    Objective: 15 % of the tokens in spans of 3: 512 tokens to read, 114 to write; no dropout, as 1.1 was pretrained
    Schedule:  the paper's: 2^19 steps of 128 rows, AdaFactor at 0.01 for 10,000 steps, then 1 / sqrt(step); here it
               rises to 0.01 in these steps. The released 1.1 was trained on more rows a step
    Result:    not run by this project; t5-nano runs the same objective at a laptop's size
    Hardware:  128 rows a step: for 8 accelerators of 16 GB or more
    """
    return Experiment(
        name="t5-base",
        model=replace(PRESETS["t5-v1_1-base"], dropout=0.0),
        data=SpanCorruptionData(source="wiki40b/en:1.3.0", length=512, train_bpe=32026),
        objective=SequenceToSequence(z_loss=1e-4),
        sampler=TargetSampler(),
        optimizer=Optimizer(
            name="adafactor",
            learning_rate=1e-2,
            warmup_steps=10_000,
            schedule="inverse_sqrt",
            weight_decay=0.0,
            clip_norm=None,
        ),
        steps=2**19,
        batch_size=128,
        eval_every=10_000,
        checkpoint_every=2000,
        keep_every=100_000,
    )
