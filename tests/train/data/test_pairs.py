"""Pairs of texts: what a person's files give, what batches hold, and what is said of wrong ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from zoo.models.transformer import TransformerConfig
from zoo.train.data.pairs import PairBatches, PairData
from zoo.train.experiment import DataConfig, UserError

PAIRS = [(f"{i} hats and {i + 1} cats", f"{i} Hüte, {i + 1} Katzen") for i in range(40)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    return path


def opened(source: Path | str, split: str = "train", seed: int = 3, **options) -> PairBatches:
    return PairData(str(source), **{"length": 24, "target_length": 30} | options).open(split, batch_size=8, seed=seed)


def read_back(data: PairBatches) -> list[tuple[str, str]]:
    """What one pass over a split of bytes holds."""

    def text(row: np.ndarray) -> str:
        return bytes(row[row < 256].tolist()).decode()

    batches = [data.batch(step, range(8)) for step in range(data.batches)]
    return [
        (text(source), text(target))
        for batch in batches
        for source, target, real in zip(batch["sources"], batch["targets"], batch["weights"][:, 0], strict=True)
        if real
    ]


def test_a_batch_to_the_token(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("ab\tcdé\r\n\nf\tg\th\n".replace("g\th", "gh"))
    (tmp_path / "dev.jsonl").write_text('{"source": "tab\\there", "target": "t"}\n')
    data: DataConfig = PairData(str(tmp_path), length=10, target_length=6)
    train = data.open("train", batch_size=2, seed=0)
    pad, end = 257, 258
    batch = train.batch(0, range(2))
    order = [0, 1] if batch["sources"][0, 0] == ord("a") else [1, 0]
    expected = {
        "sources": [[97, 98, end, *[pad] * 7], [102, end, *[pad] * 8]],
        "source_segments": [[1, 1, 1, *[0] * 7], [1, 1, *[0] * 8]],
        "tokens": [[pad, 99, 100, 0xC3, 0xA9, end], [pad, 103, 104, end, pad, pad]],
        "targets": [[99, 100, 0xC3, 0xA9, end, pad], [103, 104, end, pad, pad, pad]],
        "weights": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_array_equal(batch[name][order], rows, err_msg=name)
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)
    held_out = data.open("validation", batch_size=2, seed=0).batch(0, range(2))
    assert bytes(held_out["sources"][0, :8].tolist()) == b"tab\there"
    assert held_out["weights"].tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6]  # The second row only fills the batch.
    assert data.example_shape == (10, 6) and train.batch(0, [])["targets"].shape == (0, 6)


def test_every_pair_stands_once_in_a_pass(file: Path) -> None:
    train, validation = opened(file, seed=1), opened(file, "validation")
    assert 1 <= len(read_back(validation)) == validation.info.examples <= 6
    assert validation.batches == 1 and train.batches == train.info.examples // 8
    left = train.info.examples % 8
    both = {*read_back(train), *read_back(validation)}
    assert both <= set(PAIRS) and len(both) == len(PAIRS) - left
    assert f"{train.info.examples} pairs, 0 left out" in train.info.detail


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_depends_on_seed_step_and_row_alone(file: Path, split: str) -> None:
    data = opened(file, split)
    whole, part = data.batch(7, range(8)), data.batch(7, [4, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 1]])
    assert np.array_equal(opened(file, split, seed=4).batch(7, range(8))["sources"], whole["sources"]) == (
        split == "validation"
    )


def test_equal_sources_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"source {i // 4}\ttarget {i}\n" for i in range(80)))
    sides = [{source for source, _ in read_back(opened(tmp_path, split))} for split in ("train", "validation")]
    assert sides[1] and not sides[0] & sides[1]


def test_pairs_longer_than_a_row_are_left_out_and_counted(file: Path) -> None:
    """The longest fill their rows with the token at their end."""
    longest = max(len(source) for source, _ in PAIRS)
    assert opened(file, length=longest + 1).info.examples == opened(file).info.examples
    cut = opened(file, length=longest)
    assert 0 < cut.info.examples < opened(file).info.examples
    kept = sum(len(source) < longest for source, _ in read_back(cut))
    assert kept == cut.batches * 8 and f"{opened(file).info.examples - cut.info.examples} left out" in cut.info.detail
    with pytest.raises(
        UserError, match=r"no train pair of .* within 5 tokens of source and 30 .* sides are 18 and 18; raise"
    ):
        opened(file, length=5)


def test_one_vocabulary_of_both_sides_and_a_model_that_fits(file: Path) -> None:
    data = PairData(str(file), length=24, train_bpe=300)
    tokenizer = data.load_tokenizer()
    assert {"hats", "Kat"} <= {text.strip() for text in tokenizer.texts}
    model = data.fit(TransformerConfig(num_layers=1))
    special = model.special_tokens
    assert (model.vocab_size, special.pad, special.eos, special.start) == (302, 300, (301,), 300)
    with pytest.raises(UserError, match=r"rows of 24 tokens are longer than the model's 20 positions: lower --data"):
        data.fit(TransformerConfig(num_layers=1, max_length=20))


class ZooTranslations(tfds.core.GeneratorBasedBuilder):
    """Twelve pairs of two languages, and one without a translation, as published sets have them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=("en", "de")))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for i, (source, target) in enumerate([*PAIRS[:12], ("nothing", "")]):
            yield i, {"en": source, "de": target}


def test_a_translation_set_by_name() -> None:
    data = opened("zoo_translations:1.0.0", "validation", text_field="de, en")
    assert sorted(read_back(data)) == sorted((target, source) for source, target in PAIRS[:12])
    with pytest.raises(UserError, match=r"no feature 'source': its features are 'de', 'en'; choose by --data.text-f"):
        opened("zoo_translations:1.0.0")


GOOD = "a\tb\n" * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", GOOD + "no tab\n", r"a.tsv, line 4 has 0 tabs: write one, between source and target; it is 'no tab"),
        ("a.tsv", GOOD + "a\tb\tc\n", r"a.tsv, line 4 has 2 tabs"),
        ("a.tsv", "\tb\n" + GOOD, r"a.tsv, line 1 has an empty source: write it, or take the line away"),
        ("a.tsv", GOOD + "a\t \n", r"a.tsv, line 4 has an empty target"),
        ("a.tsv", "", r"a.tsv holds no pairs: write one on each line"),
        ("a.tsv", GOOD, r"has no text for validation: raise --data.validation-fraction"),
        ("a.tsv", b"a\tb\nc\t\xe9\n", r"a.tsv is not UTF-8 at byte 6 \(0xe9\): convert it"),
        ("a.txt", GOOD, r"a.txt is not a .tsv or .jsonl file"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": \n', r"a.jsonl, line 2 is not JSON: Expecting value"),
        ("a.jsonl", '{"source": "a"}\n', r"line 1 has no field 'target': its fields are 'source'; choose by --data"),
        ("a.jsonl", '{"source": "a", "target": 3}\n', r"line 1 has 'target' that is not a string"),
        ("a.jsonl", '{"source": "a", "target": ""}\n', r"a.jsonl, line 1 has an empty target"),
        ("a.jsonl", json.dumps("a") + "\n", r'line 1 is not a JSON object: write {"source": "...", "target": "..."}'),
    ],
)
def test_mistakes_are_told_by_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "missing.tsv"}, r"no file or folder 'missing.tsv': give a .tsv or .jsonl file"),
        ({"text_field": "en"}, r"--data.text-field 'en' names no source and target: write two names, a comma between"),
        ({"validation_fraction": 2.0}, r"validation fraction 2.0 is not between 0 and 1"),
    ],
)
def test_refusals(file: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairData(**{"source": str(file), "length": 24} | options).open("train", batch_size=1, seed=0)
