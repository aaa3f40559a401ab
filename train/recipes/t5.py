"""T5 from scratch, for a laptop."""

from zoo.models.t5 import T5Config
from zoo.train.data.span_corruption import SpanCorruptionData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler


def t5_nano() -> Experiment[T5Config, SpanCorruptionData, SequenceToSequence, TargetSampler]:
    """A small T5 on the language reference of this Python.

    Command:  zoo train t5-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    3 layers of width 128 on each side, 4 heads, 1.0 M parameters
    """
    return Experiment(
        name="t5-nano",
        model=T5Config(vocab_size=359, num_layers=3, width=128, num_heads=4, head_dim=32, mlp_width=512, dropout=0.0),
        data=SpanCorruptionData(source="python_docs", length=128),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=800,
        batch_size=16,
        eval_every=200,
        checkpoint_every=200,
    )
