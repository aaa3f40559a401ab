"""What general-purpose compressors make of a text data set: the yardstick beside a model's bits per byte."""

import gzip
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

from zoo.train.data.cache import cache_dir
from zoo.train.data.text import TextData

LIMIT = 32 << 20  # bytes of each split; xz -9 needs about a second for a megabyte


@dataclass(frozen=True)
class Compression:
    """Bits per byte; a line end, which counts as a byte, follows each document, for a model predicts where one ends.

    whole: training and held-out text as one file. held_out: held-out text alone. held_out_after_training: what it
    adds to the training text, compressed as one file; a compressor's window bounds how far it looks back (gzip 32 kB,
    xz 64 MB).
    """

    name: str
    whole: float
    held_out: float
    held_out_after_training: float


_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}


def compressors(data: TextData) -> list[Compression] | None:
    """gzip -9 and xz -9 on `data`; None where a split has more than `LIMIT` bytes. Kept in the cache."""
    splits = {split: data.split_info(split) for split in ("train", "validation")}
    if max(info.bytes for info in splits.values()) > LIMIT:
        return None
    name = "-".join(info.sha256[:16] for info in splits.values())
    path = cache_dir() / "compression" / f"{name}.json"
    if path.is_file():
        return [Compression(**entry) for entry in json.loads(path.read_text())]
    train, held_out = (_text(data, split) for split in ("train", "validation"))
    measured = [_measure(name, compress, train, held_out) for name, compress in _COMPRESSORS.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps([asdict(entry) for entry in measured]))
    partial.rename(path)
    return measured


def _text(data: TextData, split: str) -> bytes:
    return b"".join(text.encode() + b"\n" for text in data.documents(split))


def _measure(name: str, compress: Callable[[bytes], bytes], train: bytes, held_out: bytes) -> Compression:
    whole, train_alone, held_alone = (8 * len(compress(part)) for part in (train + held_out, train, held_out))
    return Compression(
        name=name,
        whole=whole / len(train + held_out),
        held_out=held_alone / len(held_out),
        held_out_after_training=(whole - train_alone) / len(held_out),
    )
