"""GPT-3's eight sizes: batches, learning rates and optimizer of Brown et al. 2020, table 2.1 and appendix B.

Two deviations: the cosine falls to a tenth at the last step, not at 260 of 300 G tokens; the batch does not grow over
the first tokens. Batches are the nearest power of two, or 1536, rows of 2048 tokens.
"""

from collections.abc import Callable
from dataclasses import replace

from zoo.models.gpt import PRESETS, GPTConfig
from zoo.train.data.text import TextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import NextToken
from zoo.train.samplers import TextSampler

GPT3 = Experiment[GPTConfig, TextData, NextToken, TextSampler]

LENGTH = 2048
TOKENS = 300e9
WARMUP_TOKENS = 375e6

DOC = """{title} from scratch on C4, or a corpus of your own.

Command:   zoo train {name} --mesh {mesh}
           zoo train {name} --mesh {mesh} --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
Data:      c4/en of TFDS, prepared beforehand, for the paper's corpus is not public; a byte-pair encoding of 50,257 is
           trained on it
Result:    not run to its end by this project
Hardware:  a pod, for which the mesh above is an example
Batch:     {rows} rows of 2048 tokens; {steps:,} steps (300 G tokens)
"""


def recipe(name: str, title: str, rows: int, learning_rate: float, mesh: str) -> Callable[[], GPT3]:
    """The recipe function of one size; rows: the batch."""
    steps = round(TOKENS / (rows * LENGTH))

    def build() -> GPT3:
        return Experiment(
            name=name,
            model=replace(PRESETS[name], remat="attention"),
            data=TextData(source="c4/en:3.1.0", length=LENGTH, train_bpe=50257),
            objective=NextToken(),
            sampler=TextSampler(),
            optimizer=Optimizer(learning_rate=learning_rate, warmup_steps=round(WARMUP_TOKENS / (rows * LENGTH))),
            steps=steps,
            batch_size=rows,
            eval_every=2000,
            checkpoint_every=500,
            keep_every=20_000,
        )

    build.__name__ = name.replace("-", "_").replace(".", "_")
    build.__doc__ = DOC.format(name=name, title=title, mesh=mesh, rows=rows, steps=steps)
    return build


RECIPES = {
    "gpt3-125m": recipe("gpt3-125m", "GPT-3 Small (125M)", 256, 6e-4, "data=16"),
    "gpt3-350m": recipe("gpt3-350m", "GPT-3 Medium (350M)", 256, 3e-4, "data=16"),
    "gpt3-760m": recipe("gpt3-760m", "GPT-3 Large (760M)", 256, 2.5e-4, "fsdp=32"),
    "gpt3-1.3b": recipe("gpt3-1.3b", "GPT-3 XL (1.3B)", 512, 2e-4, "fsdp=64"),
    "gpt3-2.7b": recipe("gpt3-2.7b", "GPT-3 2.7B", 512, 1.6e-4, "fsdp=64"),
    "gpt3-6.7b": recipe("gpt3-6.7b", "GPT-3 6.7B", 1024, 1.2e-4, "fsdp=256"),
    "gpt3-13b": recipe("gpt3-13b", "GPT-3 13B", 1024, 1e-4, "fsdp=256"),
    "gpt3-175b": recipe("gpt3-175b", "GPT-3 175B", 1536, 0.6e-4, "data=2,fsdp=256,tensor=4"),
}
