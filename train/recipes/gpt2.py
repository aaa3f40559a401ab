"""GPT-2's four sizes, trained from scratch.

Learning rates are those of GPT-3's sizes with as many parameters (Brown et al. 2020, table 2.1): the GPT-2 paper states
none.
"""

from collections.abc import Callable
from dataclasses import replace

from zoo.models.gpt import PRESETS, GPTConfig
from zoo.train.data.text import TextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import NextToken
from zoo.train.samplers import TextSampler

GPT2 = Experiment[GPTConfig, TextData, NextToken, TextSampler]

DOC = """{title} from scratch on Wikipedia, or a corpus of your own.

Command:   zoo train {name} --mesh data=8
           zoo train {name} --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 50,257 is trained on it
Result:    not run to its end by this project; the step is compiled, run and compared at this size in benchmarks/
Hardware:  {batch} rows of 1024 tokens a step, in {accumulate} micro-batches: for 8 accelerators of 40 GB or more
"""


def recipe(name: str, title: str, learning_rate: float, accumulate: int) -> Callable[[], GPT2]:
    """The recipe function of one size; accumulate: micro-batches of a step of 512 rows."""

    def build() -> GPT2:
        return Experiment(
            name=name,
            model=replace(PRESETS[name], remat="products" if accumulate == 4 else "attention"),
            data=TextData(source="wiki40b/en:1.3.0", length=1024, train_bpe=50257),
            objective=NextToken(),
            sampler=TextSampler(),
            optimizer=Optimizer(learning_rate=learning_rate, warmup_steps=700),
            steps=20_000,
            batch_size=512,
            accumulate=accumulate,
            eval_every=1000,
            checkpoint_every=500,
            keep_every=5000,
        )

    build.__name__ = name.replace("-", "_")
    build.__doc__ = DOC.format(name=name, title=title, batch=512, accumulate=accumulate)
    return build


RECIPES = {
    "gpt2": recipe("gpt2", "GPT-2 124M", 6e-4, accumulate=4),
    "gpt2-medium": recipe("gpt2-medium", "GPT-2 355M", 3e-4, accumulate=4),
    "gpt2-large": recipe("gpt2-large", "GPT-2 774M", 2.5e-4, accumulate=8),
    "gpt2-xl": recipe("gpt2-xl", "GPT-2 1558M", 2e-4, accumulate=16),
}
