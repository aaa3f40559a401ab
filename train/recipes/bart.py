"""BART from scratch: base, as published, and one for a laptop."""

from dataclasses import replace

from zoo.models.published import SpecialTokens
from zoo.models.transformer import PRESETS, TransformerConfig
from zoo.train.data.denoising import NoisyTextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler

Bart = Experiment[TransformerConfig, NoisyTextData, SequenceToSequence, TargetSampler]


def bart_nano() -> Bart:
    """A small BART on the language reference of this Python: three minutes on two busy CPU cores.

    Command:  zoo train bart-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    2 layers of width 128 and 4 heads a side, 128 bytes to read and to write, 1.0 M parameters
    Result:   held out, 56 % of the bytes at a perplexity of 4.7 (27 by frequencies, 5.9 with the sources of other
              rows); it begins to copy, which its samples do not show yet, and still gets better fast when it ends
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
            special_tokens=SpecialTokens(),  # The data's: the published ones also force what comes first and last.
        ),
        data=NoisyTextData(source="python_docs", length=128),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=300,
        batch_size=16,
        eval_every=150,
        checkpoint_every=150,
    )


def bart_base() -> Bart:
    """BART base from scratch on Wikipedia, or a corpus of your own (Lewis et al. 2019, sections 2.2 and 5.1).

    Command:   zoo train bart-base --mesh data=8
               zoo train bart-base --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
    Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 50,261 is trained on it, which
               four special tokens make the published 50,265. The paper has GPT-2's encoding, and 160 GB of news, books,
               stories and web text
    Objective: 30 % of the tokens in spans of lengths from a Poisson distribution of mean 3, all sentences permuted
    Schedule:  500,000 steps of 8192 rows, as the large model's 8000; the rate, which the paper does not state, and its
               decay are those of RoBERTa base. The paper has no dropout in the last tenth
    Result:    not run by this project; bart-nano runs the same objective at a laptop's size
    Hardware:  256 rows of 512 tokens a micro-batch: for 8 accelerators of 40 GB or more
    """
    return Experiment(
        name="bart-base",
        model=replace(PRESETS["bart-base"], special_tokens=SpecialTokens()),
        data=NoisyTextData(source="wiki40b/en:1.3.0", length=512, train_bpe=50261),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(
            learning_rate=6e-4, warmup_steps=24_000, schedule="linear", final_fraction=0.0, weight_decay=0.01, b2=0.98
        ),
        steps=500_000,
        batch_size=8192,
        accumulate=32,
        eval_every=10_000,
        checkpoint_every=1000,
        keep_every=100_000,
    )
