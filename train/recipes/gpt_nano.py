"""A small GPT on English text that every install has."""

from zoo.models.gpt import GPTConfig
from zoo.train.data.text import TextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import NextToken
from zoo.train.samplers import TextSampler


def gpt_nano() -> Experiment[GPTConfig, TextData, NextToken, TextSampler]:
    """A small GPT on the language reference of this Python: two minutes on two CPU cores.

    Command:  zoo train gpt-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    4 layers of width 192, 6 heads, 256 bytes of context, 1.9 M parameters
    Result:   1.92 bits per byte held out (gzip -9: 2.51, xz -9: 2.38); longer runs overfit without dropout: 1.66 with
              --steps 1500 --model.dropout 0.1, ten minutes
    """
    return Experiment(
        name="gpt-nano",
        model=GPTConfig(vocab_size=257, max_length=256, num_layers=4, width=192, num_heads=6),
        data=TextData(source="python_docs", length=256),
        objective=NextToken(),
        sampler=TextSampler(prompt="If the value ", temperature=0.6),
        # Muon: where this is at 2.4 bits per byte AdamW's best rate is at 3.2. No dropout: three passes do not overfit.
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=30),
        steps=450,
        batch_size=8,
        eval_every=225,
        checkpoint_every=225,
    )
