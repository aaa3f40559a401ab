"""XLNet from scratch: base, and one for a laptop."""

from zoo.models.xlnet import PRESETS, XLNetConfig
from zoo.train.data.permuted_text import PermutedTextData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import PermutationLM
from zoo.train.samplers import TextSampler

XLNet = Experiment[XLNetConfig, PermutedTextData, PermutationLM, TextSampler]


def xlnet_nano() -> XLNet:
    """A small XLNet on the language reference of this Python: six minutes on two busy CPU cores.

    Command:  zoo train xlnet-nano
    Data:     python_docs (0.4 MB of English, byte-level tokens), made from the interpreter's own pydoc_data.topics
    Model:    3 layers of width 128, 4 heads, 128 bytes of context, 0.7 M parameters
    Result:   held out, 56 % of the predicted bytes (one in six) at a perplexity of 4.7, and still getting better when
              it ends. The sample is no text: this learns with text on both sides, and a sample goes left to right
    """
    return Experiment(
        name="xlnet-nano",
        model=XLNetConfig(
            vocab_size=257,
            num_layers=3,
            width=128,
            num_heads=4,
            mlp_width=512,
            head="lm",
            dropout=0.0,
        ),
        data=PermutedTextData(source="python_docs", length=128),
        objective=PermutationLM(),
        sampler=TextSampler(prompt="If the value "),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=50),
        steps=600,
        batch_size=16,
        eval_every=200,
        checkpoint_every=200,
    )


def xlnet_base() -> XLNet:
    """XLNet base from scratch on Wikipedia, or a corpus of your own (Yang et al. 2019).

    Command:   zoo train xlnet-base --mesh data=8
               zoo train xlnet-base --data.source FOLDER --data.train-bpe None --data.tokenizer tokenizer.json
    Data:      wiki40b/en of TFDS, downloaded at the first start; a byte-pair encoding of 32,000 is trained on it, where
               the paper has SentencePiece, and BooksCorpus too. One token in six of a row is predicted. A row holds
               documents as they follow; no memory of the row before, no pairs of texts with separators
    Schedule:  BERT's, a million steps of 256 rows of 512 tokens, as where the paper compares itself with BERT; its own
               table is of the large model alone: 8192 rows, a rate of 4e-4, 500,000 steps
    Result:    not run by this project; xlnet-nano runs the same objective to its end
    Hardware:  64 rows a micro-batch: for 8 accelerators of 16 GB or more
    """
    return Experiment(
        name="xlnet-base",
        model=PRESETS["xlnet-base-cased"],
        data=PermutedTextData(source="wiki40b/en:1.3.0", length=512, train_bpe=32000),
        objective=PermutationLM(),
        sampler=TextSampler(),
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
