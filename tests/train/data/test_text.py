"""TextData from a person's files to batches, and what it says when they are wrong."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from zoo.train.data import text_sources
from zoo.train.data.corpus import Corpus
from zoo.train.data.text import TextData
from zoo.train.experiment import DataConfig, Dataset, UserError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "naps"]


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30 + i % 17)) + f" {i}."


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "texts"
    made.mkdir()
    for i in range(20):
        (made / f"{i:02}.txt").write_text(sentence(i))
    return made


def read_back(data: TextData, split: str) -> list[str]:
    """The documents of a split, from the token file."""
    corpus = data._corpus()
    tokens = np.asarray(corpus.token_file(split))
    pieces = np.split(tokens, np.flatnonzero(tokens == corpus.end_of_text))[1:]
    tokenizer = data.load_tokenizer()
    return [tokenizer.decode(piece) for piece in pieces]


def test_follows_the_protocols(folder):
    data: DataConfig = TextData(str(folder), length=16)
    dataset: Dataset = data.open("train", batch_size=4, seed=0)
    assert data.example_shape == (16,) and data.unit == "tokens"
    assert dataset.batch(0, [0])["tokens"].shape == (1, 16)


def test_a_folder_of_text_is_split_by_document(folder):
    data = TextData(str(folder), length=16)
    train, validation = read_back(data, "train"), read_back(data, "validation")
    assert sorted(train + validation) == sorted(sentence(i) for i in range(20))
    assert 1 <= len(validation) <= 3
    info = data.open("train", batch_size=4, seed=0).info
    assert info.examples == len(train) and info.bytes == sum(len(text) for text in train)
    assert "documents" in info.detail


def test_a_folder_with_splits_of_its_own(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("training text")
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": "held out text"}) + "\n")
    (tmp_path / "test.txt").write_text("left alone")
    data = TextData(str(tmp_path), length=8)
    assert read_back(data, "train") == ["training text"]
    assert read_back(data, "validation") == ["held out text"]


def test_json_lines_and_their_field(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"body": sentence(i), "id": i}) for i in range(10)]
    path.write_text("\n".join([*lines, "", json.dumps({"body": ""})]))
    data = TextData(str(path), length=8, text_field="body")
    assert sorted(read_back(data, "train") + read_back(data, "validation")) == sorted(sentence(i) for i in range(10))


def test_the_hash_is_of_the_text(folder):
    one = TextData(str(folder), length=16).open("train", batch_size=4, seed=0).info.sha256
    assert TextData(str(folder), length=32).open("train", batch_size=8, seed=1).info.sha256 == one
    assert TextData(str(folder), length=32, train_bpe=280).open("train", batch_size=8, seed=1).info.sha256 == one
    (folder / "00.txt").write_text("changed, by one sentence that is as good as any other")
    assert TextData(str(folder), length=16).open("train", batch_size=4, seed=0).info.sha256 != one


def test_changed_text_is_read_again_and_unchanged_text_is_not(folder, monkeypatch):
    data = TextData(str(folder), length=16)
    data.prepare()
    reads = []
    original = text_sources.LocalText._read
    monkeypatch.setattr(text_sources.LocalText, "_read", lambda self, files: reads.append(1) or original(self, files))
    data.open("train", batch_size=2, seed=0)
    assert not reads
    (folder / "new.txt").write_text(sentence(99))
    data.open("train", batch_size=2, seed=0)
    assert reads and sentence(99) in read_back(data, "train") + read_back(data, "validation")


def test_a_cache_that_was_cut_short_is_written_anew(folder):
    data = TextData(str(folder), length=16)
    corpus = data._corpus()
    before = read_back(data, "train")
    tokens = corpus.folder / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match="tokens long"):
        Corpus.load(corpus.folder)
    assert read_back(data, "train") == before
    (corpus.folder / "corpus.json").unlink()
    assert read_back(data, "train") == before


def test_what_a_killed_process_left_is_removed(folder):
    data = TextData(str(folder), length=16)
    made = data._corpus().folder
    (made / "corpus.json").unlink()
    left = made.parent / f"{made.name}.12345.partial"
    left.mkdir()
    (left / "train.tokens").write_bytes(b"half")
    data.prepare()
    assert not left.exists() and (made / "corpus.json").is_file()


def test_a_trained_encoding_is_kept_and_used(folder):
    data = TextData(str(folder), length=16, train_bpe=290)
    path = data.tokenizer_file()
    assert path is not None
    time_of = path.stat().st_mtime_ns
    assert read_back(data, "train") == read_back(TextData(str(folder), length=16), "train")
    assert data.tokenizer_file() == path and path.stat().st_mtime_ns == time_of
    batch = data.open("validation", batch_size=2, seed=0)
    held_out = sum(len(text.encode()) for text in data.documents("validation"))
    assert sum(batch.batch(step, range(2))["bytes"].sum() for step in range(batch.batches)) == held_out
    assert TextData(str(folder), length=16, tokenizer=str(path))._corpus().vocab_size == data._corpus().vocab_size


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int = 7
    max_length: int = 64


def test_fit_sets_the_vocabulary(folder):
    data = TextData(str(folder), length=64)
    assert data.fit(Model()) == Model(vocab_size=257)
    fitted = Model(vocab_size=257)
    assert data.fit(fitted) is fitted
    with pytest.raises(UserError, match="sequence length 65 is longer than the model's 64 positions"):
        TextData(str(folder), length=65).fit(Model())


def latin1(path):
    (path / "05.txt").write_bytes("caf\xe9".encode("latin1"))


def empty(path):
    for file in path.iterdir():
        file.write_text("")


def no_text(path):
    for file in path.iterdir():
        file.unlink()
    (path / "a.csv").write_text("a,b")


WRONG = [
    (latin1, {}, r"05.txt is not UTF-8 at byte 3 \(0xe9\): convert it"),
    (empty, {}, "has no text for train: every document is empty"),
    (no_text, {}, "holds no .txt or .jsonl file"),
    (None, {"length": 1}, "sequence length 1 is too short"),
    (None, {"length": 400}, "the validation text of .* is .* tokens, less than one sequence of 400"),
    (None, {"length": 10_000}, "the train text of .* is .* tokens, less than one sequence of 10000"),
    (None, {"validation_fraction": 1.5}, "validation fraction 1.5 is not between 0 and 1"),
    (None, {"tokenizer": "nowhere.json"}, "tokenizer file nowhere.json: No such file"),
    (None, {"tokenizer": "t.json", "train_bpe": 300}, "exclude each other"),
    (None, {"train_bpe": 100}, "a vocabulary of 100 is too small"),
]


@pytest.mark.parametrize(("change", "fields", "message"), WRONG)
def test_wrong_input_is_answered_in_one_line(folder, change, fields, message):
    if change is not None:
        change(folder)
    data = TextData(str(folder), **{"length": 16, **fields})
    with pytest.raises(UserError, match=message) as raised:
        [data.open(split, batch_size=2, seed=0) for split in ("train", "validation")]
    assert "\n" not in str(raised.value)


LINES = [
    ('{"text": "a"}\nnot json\n', "line 2 is not JSON"),
    ('["a"]\n', "line 1 is not a JSON object"),
    ('{"body": "a", "id": 3}\n', "has no field 'text': its fields are 'body', 'id'"),
    ('{"text": 3}\n', "has 'text' that is not a string"),
    (r'{"text": "\ud800"}', "half a surrogate pair"),
    ('{"text": "a"}\n{"text": "\xe9"}\n', "is not UTF-8 at byte 24"),
]


@pytest.mark.parametrize(("content", "message"), LINES)
def test_wrong_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=message) as raised:
        TextData(str(path)).prepare()
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        TextData("./absent").prepare()
    with pytest.raises(UserError, match="no file or folder ''"):
        TextData("").prepare()
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(UserError, match="is not a"):
        TextData(str(tmp_path / "a.csv")).prepare()
    with pytest.raises(UserError, match="did you mean lm1b"):
        TextData("lm1").prepare()
    with pytest.raises(UserError, match="did you mean python_docs"):
        TextData("python_doc").prepare()


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"00.txt cannot be read: Permission denied"):
        TextData(str(folder), length=16).prepare()


def test_a_full_disk_is_named(folder, fresh_cache, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.train.data.corpus.write", fail)
    with pytest.raises(UserError, match="No space left on device"):
        TextData(str(folder), length=16).prepare()
    assert not list(fresh_cache.rglob("*.partial"))


PREPARE = """
from zoo.train.data.text import TextData
data = TextData(length=16, train_bpe=270)
data.prepare()
print(data.split_info("train"))
"""


def test_processes_that_prepare_at_once_agree(fresh_cache):
    """Two processes and an empty cache: one TFDS set, one encoding and one corpus, and nothing half-written."""
    command = [sys.executable, "-c", PREPARE]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(outputs) == 1 and "SplitInfo" in outputs.pop()
    assert not list(fresh_cache.rglob("*.partial"))
    assert len(list(fresh_cache.rglob("train.tokens"))) == 1
    assert len(list(fresh_cache.rglob("*train.array_record*"))) == 1 and not list(fresh_cache.rglob("*incomplete*"))


OPEN = """
import sys
from zoo.train.data.text import TextData
TextData().open("train", batch_size=8, seed=0)
print([name for name in ("tensorflow_datasets", "tensorflow", "grain") if name in sys.modules])
"""


def test_opening_prepared_text_brings_in_no_tfds(folder):
    TextData().prepare()
    output = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
