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
    """
    return Experiment(
        name="gpt-nano",
        model=GPTConfig(vocab_size=257, max_length=256, num_layers=4, width=192, num_heads=6, dropout=0.1),
        data=TextData(source="python_docs", length=256),
        objective=NextToken(),
        sampler=TextSampler(prompt="The "),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50),
        steps=700,
        batch_size=16,
        eval_every=350,
        checkpoint_every=350,
    )
