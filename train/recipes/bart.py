"""BART from scratch: base, as published, and one for a laptop."""

from dataclasses import replace

from zoo.models.transformer import PRESETS, TransformerConfig
from zoo.train.data.denoising import NoisyTextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler

Bart = Experiment[TransformerConfig, NoisyTextData, SequenceToSequence, TargetSampler]


def bart_nano() -> Bart:
    """A small BART on the language reference of this Python.

    Command:  zoo train bart-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    """
    return Experiment(
        name="bart-nano",
        model=replace(
            PRESETS["bart-base"],
            vocab_size=261,
            max_length=128,
            num_layers=2,
            num_decoder_layers=2,
            width=128,
            num_heads=4,
            num_decoder_heads=4,
            mlp_width=512,
            decoder_mlp_width=512,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        data=NoisyTextData(source="python_docs", length=128),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=1000,
        batch_size=16,
        eval_every=250,
        checkpoint_every=250,
    )
