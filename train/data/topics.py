"""The Python language reference that ships with the interpreter, with what stands in it twice taken out.

`pydoc_data.topics` holds some 80 topics (465 kB in Python 3.11) as plain text. Many are sections of others: "if" and
"while" stand in "compound" word for word, "attribute-access" in "specialnames". Split by topic alone, 70 to 76 % of
the held-out windows of 50 bytes (`shared_windows`; Python 3.11, 3.12, 3.13) would stand in the training text. Here a
paragraph stands once, in the longest topic that has it, and a topic that loses more than half of its bytes that way
is left out: 374 of 465 kB remain, and 2.5 % of the windows. Three quarters of those are ruled lines of tables; the
rest are set phrases ("may only occur syntactically nested in").
"""

import hashlib
import platform
import re
from collections.abc import Mapping

from zoo.train.data.splits import content_hash, held_out
from zoo.train.experiment import UserError

VERSION = "1.0.0"
HELD_OUT = 0.1
_SHORT = 32  # bytes below which a paragraph may repeat: headings, "See also:", single symbols


def read_topics() -> dict[str, str]:
    """The interpreter's topics by name; raises UserError where a distribution left them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python comes without pydoc_data.topics, the text of python_docs: install its full standard library, "
            "or give --data.source a folder of .txt files"
        ) from error
    return dict(topics)


def topics_version() -> str:
    """Names the text: Python's version and the start of the SHA-256 of its topics, which patch releases edit."""
    digest = hashlib.sha256()
    for name, text in sorted(read_topics().items()):
        digest.update(f"{name}\0{text}\0".encode())
    return f"python{platform.python_version()}-{digest.hexdigest()[:8]}"


def fold(text: str) -> str:
    """`text` with each run of white space as one blank: a section is indented as deep as it is nested."""
    return " ".join(text.split())


def deduplicate(topics: Mapping[str, str]) -> dict[str, str]:
    """Topics in which no paragraph of `_SHORT` bytes or more stands twice (white space folded), longest topic first."""
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [paragraph for paragraph in re.split(r"\n[ \t]*\n", topics[name]) if paragraph.strip()]
        folded = [fold(paragraph) for paragraph in paragraphs]
        new = [
            paragraph
            for paragraph, key in zip(paragraphs, folded, strict=True)
            if len(key.encode()) < _SHORT or key not in seen
        ]
        text = "\n\n".join(new).strip("\n") + "\n"
        if 2 * len(text) >= len(topics[name]):
            kept[name] = text
            seen.update(folded)
    return kept


def split_topics(topics: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Deduplicated topics as {"train": {name: text}, "validation": {name: text}}; a tenth of the bytes is held out.

    Chosen by the hash of their names, so that the versions of Python hold out nearly the same topics.
    """
    documents = deduplicate(topics)
    hashes = [content_hash(name) for name in documents]
    sizes = [len(text.encode()) for text in documents.values()]
    out = held_out(hashes, sizes, HELD_OUT)
    return {
        "train": {name: text for (name, text), held in zip(documents.items(), out, strict=True) if not held},
        "validation": {name: text for (name, text), held in zip(documents.items(), out, strict=True) if held},
    }


def shared_windows(validation: Mapping[str, str], train: Mapping[str, str], width: int = 50) -> float:
    """Share of the windows of `width` bytes in held-out text (white space folded) that stand in training text."""

    def windows(texts: Mapping[str, str]) -> list[bytes]:
        folded = [fold(text).encode() for text in texts.values()]
        return [text[i : i + width] for text in folded for i in range(len(text) - width + 1)]

    known = set(windows(train))
    asked = windows(validation)
    return sum(window in known for window in asked) / len(asked)
