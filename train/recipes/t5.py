"""T5 from scratch: 1.1 base on the paper's schedule, and one for a laptop."""

from dataclasses import replace

from zoo.models.t5 import PRESETS, T5Config
from zoo.train.data.span_corruption import SpanCorruptionData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler

T5 = Experiment[T5Config, SpanCorruptionData, SequenceToSequence, TargetSampler]


def t5_nano() -> T5:
    """A small T5 1.1 on the language reference of this Python.

    Command:  zoo train t5-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    """
    return Experiment(
        name="t5-nano",
        model=replace(
            PRESETS["t5-v1_1-small"],
            vocab_size=359,
            num_layers=2,
            num_decoder_layers=2,
            width=128,
            num_heads=4,
            head_dim=32,
            mlp_width=320,
            dropout=0.0,
        ),
        data=SpanCorruptionData(source="python_docs", length=128),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=1000,
        batch_size=32,
        eval_every=250,
        checkpoint_every=250,
    )
