"""BERT from scratch: base, as published, and one for a laptop."""

from dataclasses import replace

from zoo.models.bert import BertConfig
from zoo.train.data.masked_text import MaskedTextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import MaskedLM
from zoo.train.samplers import MaskSampler

Bert = Experiment[BertConfig, MaskedTextData, MaskedLM, MaskSampler]


def bert_nano() -> Bert:
    """A small BERT on the language reference of this Python: eight minutes on two busy CPU cores.

    Command:  zoo train bert-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    3 layers of width 128, 4 heads, 128 bytes of context, 0.7 M parameters
    Result:   held out, 38 % of the masked bytes (18 % are blanks) at a perplexity of 10.4 (25 by frequencies), and 64 %
              of the pairs (half of them follow); all of it still gets better when it ends
    """
    return Experiment(
        name="bert-nano",
        model=BertConfig(
            vocab_size=261,
            max_length=128,
            num_layers=3,
            width=128,
            num_heads=4,
            mlp_width=512,
            head="pretraining",
            dropout=0.0,
            attention_dropout=0.0,
        ),
        data=MaskedTextData(source="python_docs", length=128),
        objective=MaskedLM(),
        sampler=MaskSampler(),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=1000,
        batch_size=16,
        eval_every=250,
        checkpoint_every=250,
    )


def bert_base() -> Bert:
    """BERT base from scratch on Wikipedia, or a corpus of your own (Devlin et al. 2018, section A.2).

    Command:   zoo train bert-base --mesh data=8
               zoo train bert-base --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
    Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 30,518 is trained on it, which
               four special tokens make the published 30,522. The paper has WordPiece, lower case, and BooksCorpus too
    Schedule:  a million steps of 256 rows of 512 tokens. The paper has rows of 128 tokens in the first nine tenths:
               --data.length 128 --data.max-predictions 20
    Result:    not run by this project; bert-nano runs the same objective to its end
    Hardware:  64 rows a micro-batch: for 8 accelerators of 16 GB or more
    """
    return Experiment(
        name="bert-base",
        model=replace(BertConfig(), head="pretraining"),
        data=MaskedTextData(source="wiki40b/en:1.3.0", length=512, train_bpe=30518, max_predictions=80),
        objective=MaskedLM(),
        sampler=MaskSampler(),
        optimizer=Optimizer(
            learning_rate=1e-4, warmup_steps=10_000, schedule="linear", final_fraction=0.0, weight_decay=0.01, b2=0.999
        ),
        steps=1_000_000,
        batch_size=256,
        accumulate=4,
        eval_every=10_000,
        checkpoint_every=2000,
        keep_every=100_000,
    )
