import json

import numpy as np
import pytest
from PIL import Image

from zoo.models.text_to_image import PRESETS
from zoo.train.data import digit_captions
from zoo.train.data.captions import CaptionedImageData
from zoo.train.experiment import DataConfig, Dataset, UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def written(folder, names, captions=None, listed="captions.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        file = folder / f"{i // 4}" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        picture = np.full((4, 4, 3), COLOURS[name], np.uint8)
        picture[0, 0] = i
        Image.fromarray(picture).save(file)
    lines = [{"file_name": f"{i // 4}/{i}.png", "text": f" a {name} square "} for i, name in enumerate(names)]
    text = "".join(json.dumps(line) + "\n" for line in lines + list(captions or []))
    (folder / listed).write_text(text)
    return folder


NAMES = [*COLOURS] * 4


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "pictures", NAMES)


def said(data: CaptionedImageData, split: str) -> list[tuple[str, tuple[int, ...]]]:
    dataset = data.open(split, batch_size=3, seed=0)
    tokenizer, rows = data.load_tokenizer(), range(3)
    batches = [dataset.batch(step, rows) for step in range(dataset.batches)]
    return [
        (tokenizer.decode(row), tuple(np.round((pixels[1, 1] + 1) * 127.5).astype(int).tolist()))
        for batch in batches
        for row, pixels, weight in zip(batch["tokens"], batch["images"], batch["weights"], strict=True)
        if weight
    ]


def test_digits_are_said_to_be_what_they_are():
    data: DataConfig = CaptionedImageData(train_bpe=320)
    train: Dataset = data.open("train", batch_size=64, seed=0)
    batch = train.batch(0, range(64))
    assert batch["tokens"].shape == (64, 16) and batch["tokens"].dtype == np.int32
    assert set(batch) == {"images", "tokens", "weights"} and data.example_shape == (8, 8, 1)
    tokenizer, labels = data.load_tokenizer(), train.images.batch(0, range(64))["labels"]
    for row, label in zip(batch["tokens"], labels, strict=True):
        words = tokenizer.decode(row).replace(",", "").split()
        assert str(label) in words or digit_captions.NAMES[label] in words
    assert "0 captions cut to 14 tokens" in train.info.detail
    # A recipe's model says what the data does.
    assert data.fit(PRESETS["text-to-digits"]) == PRESETS["text-to-digits"]


def test_bold_and_leaning_digits_are_called_so():
    """One class of upright strokes, one of which is thick, and one that goes up to the right."""
    upright = np.zeros((9, 8, 8), np.uint8)
    upright[:, :, 3] = 200
    upright[7, :, 3:5] = 255
    upright[8] = np.eye(8, dtype=np.uint8)[::-1] * 200
    found = digit_captions.captions(upright, np.full(9, 1))
    assert [("bold" in text, "right" in text) for text in found] == [(False, False)] * 7 + [
        (True, False),
        (False, True),
    ]
    np.testing.assert_allclose(digit_captions.slants(upright), [0] * 8 + [1], atol=1e-6)
    assert digit_captions.captions(upright, np.full(9, 1)) == found


def test_a_picture_keeps_its_caption(folder):
    data = CaptionedImageData(str(folder), length=32, validation_fraction=0.25)
    train, validation = said(data, "train"), said(data, "validation")
    assert len(train) == 9 and len(validation) == 3
    for text, colour in train + validation:
        assert text == f"a {next(name for name, rgb in COLOURS.items() if rgb == colour)} square"


def test_splits_and_names_as_hugging_face_has_them(tmp_path):
    for split, count in (("train", 6), ("validation", 3)):
        written(tmp_path / split, NAMES[:count], listed="metadata.jsonl")
    data = CaptionedImageData(str(tmp_path), length=32)
    assert [len(said(data, split)) for split in ("train", "validation")] == [6, 3]


def test_long_captions_are_cut_and_counted(folder, capsys):
    data = CaptionedImageData(str(folder), length=12)
    dataset = data.open("train", batch_size=4, seed=0)
    row = dataset.batch(0, [0])["tokens"][0]
    begin, end = data.vocabulary.roles["begin"], data.vocabulary.end_of_text
    assert row[0] == begin and row[-1] == end and (row[1:-1] < 256).all()
    assert f"{dataset.info.examples:,} captions cut to 10 tokens" in dataset.info.detail
    np.testing.assert_array_equal(data.rows(["a red square"])[0][:3], [begin, ord("a"), ord(" ")])
    np.testing.assert_array_equal(data.rows([""])[0], [begin, *[end] * 11])
    assert capsys.readouterr().err.endswith("a text has 12 tokens, and 10 are read: it is cut before 're'\n")


def test_a_few_without_the_other_are_left_out(tmp_path, capsys):
    folder = written(tmp_path / "some", NAMES, [{"file_name": "none.png", "text": "absent"}])
    Image.new("RGB", (4, 4)).save(folder / "bare.png")
    data = CaptionedImageData(str(folder), length=32, unpaired=0.2)
    assert sum(data.open(split, batch_size=1, seed=0).info.examples for split in ("train", "validation")) == 12
    assert (
        "1 captions without a picture (none.png) and 1 pictures without a caption (bare.png)" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"without a caption \(bare.png\): mend it"):
        CaptionedImageData(str(folder), length=32).prepare()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "../secret.png", "text": "x"}, "line 13 names '../secret.png', which is not below"),
        ({"file_name": "/etc/secret.png", "text": "x"}, "which is not below"),
        ({"file_name": "link.png", "text": "x"}, "a link to outside"),
        ({"file_name": "0/0.png"}, "has no field 'text'"),
        ({"text": "x"}, "has no field 'file_name'"),
        ({"file_name": "broken.png", "text": "x"}, "broken.png cannot be read as a picture"),
    ],
)
def test_what_is_wrong_is_answered_in_one_line(tmp_path, line, message):
    folder = written(tmp_path / "pictures", NAMES, [line])
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    if line.get("file_name") == "link.png":
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
    if line.get("file_name") == "broken.png":
        whole = (folder / "0" / "0.png").read_bytes()
        (folder / "broken.png").write_bytes(whole[:40] + b"\0" * 20)
    with pytest.raises(UserError, match=message) as raised:
        CaptionedImageData(str(folder), length=32).prepare()
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_list_and_a_length_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"holds no captions.jsonl or metadata.jsonl"):
        CaptionedImageData(str(tmp_path)).prepare()
    with pytest.raises(UserError, match="captions of 12 tokens"):
        CaptionedImageData(length=12).fit(PRESETS["text-to-digits"])
