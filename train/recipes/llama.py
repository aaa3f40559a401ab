"""Llamas from scratch: a published size, and one for a laptop."""

from dataclasses import replace

from zoo.models.llama import PRESETS, LlamaConfig
from zoo.train.data.text import TextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import NextToken
from zoo.train.samplers import TextSampler

Llama = Experiment[LlamaConfig, TextData, NextToken, TextSampler]


def llama_nano() -> Llama:
    """A small Llama on the language reference of this Python: five minutes on two busy CPU cores.

    Command:  zoo train llama-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    4 layers of width 128, 4 heads that share 2 of keys and values, 256 bytes of context, 0.8 M parameters
    Result:   1.75 bits per byte held out, 65 % of the bytes (gzip -9: 2.51, xz -9: 2.38)
    """
    return Experiment(
        name="llama-nano",
        model=LlamaConfig(
            vocab_size=257,
            max_length=256,
            num_layers=4,
            width=128,
            num_heads=4,
            num_kv_heads=2,
            mlp_width=384,
            tied=True,
        ),
        data=TextData(source="python_docs", length=256),
        objective=NextToken(),
        sampler=TextSampler(prompt="If the value ", temperature=0.6),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=30),
        steps=450,
        batch_size=8,
        eval_every=225,
        checkpoint_every=225,
    )


def llama_3_2_1b() -> Llama:
    """A Llama of the 1B size of version 3.2 from scratch on Wikipedia, or a corpus of your own.

    Command:   zoo train llama-3.2-1b --mesh fsdp=8
               zoo train llama-3.2-1b --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
    Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 128,256 is trained on it
    Model:     2048 positions, without the scaling that stretches the published model's to 131,072
    Schedule:  the rate and warm-up of Touvron et al. 2023, "Llama 2", section 2.2, over 21 G tokens. The published
               model was pruned and distilled from larger ones: there is no schedule of it from scratch
    Result:    not run by this project; llama-nano runs the same objective to its end
    Hardware:  512 rows of 2048 tokens a step, in 8 micro-batches: for 8 accelerators of 40 GB or more
    """
    return Experiment(
        name="llama-3.2-1b",
        model=replace(PRESETS["llama-3.2-1b"], max_length=2048, rope_scaling=None, remat="attention"),
        data=TextData(source="wiki40b/en:1.3.0", length=2048, train_bpe=128256),
        objective=NextToken(),
        sampler=TextSampler(),
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
        steps=20_000,
        batch_size=512,
        accumulate=8,
        eval_every=1000,
        checkpoint_every=500,
        keep_every=5000,
    )
