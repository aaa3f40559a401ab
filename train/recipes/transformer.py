"""The Transformer of 2017 from scratch: base and big, as published, and one for a laptop."""

from zoo.models.transformer import PRESETS, TransformerConfig
from zoo.train.data.pairs import PairData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler

Transformer = Experiment[TransformerConfig, PairData, SequenceToSequence, TargetSampler]


def transformer_nano() -> Transformer:
    """A small Transformer that translates Python into its syntax trees: some minutes on two busy CPU cores.

    Command:  zoo train transformer-nano
              zoo train transformer-nano --data.source PAIRS.tsv --data.length 64 --data.target-length 64
    Data:     python_trees, 43,000 statements of the interpreter's own library and their trees, such as "return x + 1"
              and "Return(BinOp(Name, Add, Constant))", with one byte-pair encoding of 510; 4,700 others are held out
    Model:    2 layers of width 128 and 4 heads a side, 40 tokens to read and 32 to write, 1.0 M parameters
    Result:   held out, 0.072 nats a token (2.25 with the sources of other rows), 97.6 % right. Written greedily, 82 %
              of the trees are right throughout: 88 % of those that training text has too, 23 % of the others (9 %)
    """
    return Experiment(
        name="transformer-nano",
        model=TransformerConfig(vocab_size=512, num_layers=2, width=128, num_heads=4, mlp_width=512, dropout=0.0),
        data=PairData(train_bpe=510, length=40, target_length=32),
        objective=SequenceToSequence(),
        sampler=TargetSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=600,
        batch_size=64,
        eval_every=300,
        checkpoint_every=300,
    )


def transformer_base() -> Transformer:
    """The Transformer, base, from English to German, or on pairs of your own (Vaswani et al. 2017, section 5).

    Command:   zoo train transformer-base --mesh data=8
               zoo train transformer-base --data.source PAIRS.tsv
    Data:      wmt14_translate/de-en of TFDS, 4.5 M pairs, downloaded at the first start; one byte-pair encoding of both
               languages, which padding and the end make the published 37,000 tokens. Pairs of more than 80 tokens a
               side are left out; held out is its newstest2013
    Objective: label smoothing of 0.1
    Schedule:  the paper's: 100,000 steps of Adam whose rate rises for 4000 and then falls as 1 / sqrt(step). Adam's
               epsilon is 1e-8, the paper's 1e-9. The paper has 25,000 tokens a side in a batch, pairs of like length;
               864 pairs hold about as many, padded to one length. It averages its last five checkpoints
    Result:    not run by this project; transformer-nano runs the same objective to its end
    Hardware:  864 rows of 80 and 80 tokens a step: for 8 accelerators of 16 GB or more
    """
    return _english_to_german("transformer-base", steps=100_000)


def transformer_big() -> Transformer:
    """The Transformer, big, as transformer-base but for 300,000 steps (Vaswani et al. 2017, sections 5 and 6.1).

    Command:   zoo train transformer-big --mesh data=8
    Data:      as for transformer-base
    Schedule:  as for transformer-base, at the lower peak that equation 3 gives the larger width; dropout of 0.3. The
               paper averages the last twenty checkpoints
    Result:    not run by this project
    Hardware:  864 rows of 80 and 80 tokens a step: for 8 accelerators of 40 GB or more
    """
    return _english_to_german("transformer-big", steps=300_000)


def _english_to_german(name: str, steps: int) -> Transformer:
    model, warmup = PRESETS[name], 4000
    return Experiment(
        name=name,
        model=model,
        data=PairData(source="wmt14_translate/de-en:1.0.0", text_field="en,de", length=80, train_bpe=36_998),
        objective=SequenceToSequence(label_smoothing=0.1),
        sampler=TargetSampler(),
        optimizer=Optimizer(
            learning_rate=(model.width * warmup) ** -0.5,  # equation 3
            warmup_steps=warmup,
            schedule="inverse_sqrt",
            weight_decay=0.0,
            b2=0.98,
            clip_norm=None,
        ),
        steps=steps,
        batch_size=864,
        eval_every=5000,
        checkpoint_every=1000,
        keep_every=10_000,
    )
