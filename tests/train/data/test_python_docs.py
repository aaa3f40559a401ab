import shutil
import sys

import pytest

from zoo.train.data import python_docs, topics
from zoo.train.data.compression import compressors
from zoo.train.data.text import TextData
from zoo.train.data.tfds_sets import tfds_read
from zoo.train.experiment import UserError


def splits():
    return topics.split_topics(topics.read_topics())


def test_held_out_text_does_not_stand_in_training_text():
    """Measured: 2.5 % of the windows of 50 bytes, most of them ruled lines of tables; 76 % without deduplication."""
    made = splits()
    assert topics.shared_windows(made["validation"], made["train"]) < 0.04
    train = " ".join(map(topics.fold, made["train"].values()))
    for text in made["validation"].values():
        for paragraph in text.split("\n\n"):
            folded = topics.fold(paragraph)
            assert len(folded.encode()) < 32 or folded not in train


def test_shared_windows_counts():
    assert topics.shared_windows({"a": "0123456789"}, {"b": "x 01234567"}, width=8) == 1 / 3
    assert topics.shared_windows({"a": "some   text\n here"}, {"b": "some text here"}, width=5) == 1


def test_a_tenth_is_held_out():
    made = splits()
    size = {split: sum(len(text.encode()) for text in documents.values()) for split, documents in made.items()}
    assert 0.09 < size["validation"] / sum(size.values()) <= 0.1
    assert sum(size.values()) > 0.7 * sum(len(text.encode()) for text in topics.read_topics().values())


def test_deduplication():
    whole = "A paragraph that is long enough to count.\n\nAnother one, which is long enough as well.\n\nSee also:"
    section = "   A paragraph that is\n   long enough to count.\n"
    partly = (
        "See also:\n\nAnother one,\nwhich is long enough as well.\n\n" + "This one stands here alone, and is long. " * 3
    )
    kept = topics.deduplicate({"section": section, "whole": whole, "partly": partly})
    assert set(kept) == {"whole", "partly"}
    assert "Another one" in kept["partly"] and "Another one" not in kept["whole"]
    assert "See also:" in kept["whole"] and "See also:" in kept["partly"]


def test_the_builder_writes_array_records(cache):
    builder = python_docs.builder()
    made = splits()
    for split, documents in made.items():
        examples = list(tfds_read(builder, split))
        assert {example["title"].decode(): example["text"].decode() for example in examples} == documents
    assert list((cache / "tfds").rglob("*.array_record*")) and "tensorflow" not in sys.modules


def test_text_data_reads_the_builder():
    data = TextData(length=128)
    made = splits()
    for split in ("train", "validation"):
        assert sorted(data.documents(split)) == sorted(made[split].values())
        assert data.open(split, batch_size=4, seed=0).info.examples == len(made[split])


def test_damage_is_named_with_its_mend(fresh_cache):
    TextData().prepare()
    (records,) = fresh_cache.rglob("*train.array_record*")
    content = bytearray(records.read_bytes())
    content[100] ^= 4
    records.write_bytes(content)
    TextData().prepare()  # the tokens are there already
    with pytest.raises(UserError, match=f"{records.parent} is damaged: delete that folder") as raised:
        TextData(train_bpe=300).prepare()
    assert "\n" not in str(raised.value)
    shutil.rmtree(records.parent)
    TextData(train_bpe=300).prepare()


def test_compressors_are_measured_once(cache):
    data = TextData(length=128)
    measured = compressors(data)
    assert measured is not None
    gzip, xz = measured
    assert (gzip.name, xz.name) == ("gzip -9", "xz -9")
    assert 2 < gzip.whole < 3 and 1.5 < xz.whole < gzip.whole
    assert gzip.held_out > gzip.held_out_after_training and xz.held_out > xz.held_out_after_training
    (kept,) = (cache / "compression").iterdir()
    before = kept.stat().st_mtime_ns
    assert compressors(data) == [gzip, xz] and kept.stat().st_mtime_ns == before
