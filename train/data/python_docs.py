"""The TFDS data set `python_docs`: real English that every install has, written as ArrayRecord without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from zoo.train.data import topics
from zoo.train.data.cache import cache_dir, locked, tfds_dir
from zoo.train.data.tfds_sets import quiet


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Topics of the Python language reference (PSF licence), one example each, split by topic.

    Features: `title`, the topic's name, and `text`. `zoo.train.data.topics` says how what stands in several topics is
    kept out of the split. The config names Python's version and text, since the text differs between versions.
    """

    VERSION = tfds.core.Version(topics.VERSION)

    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=topics.topics_version(), description="The topics of one version of Python.")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python language reference that ships with the interpreter (pydoc_data.topics).",
            features=tfds.features.FeaturesDict({"title": tfds.features.Text(), "text": tfds.features.Text()}),
            homepage="https://docs.python.org/3/reference/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        splits = topics.split_topics(topics.read_topics())
        return {split: self._generate_examples(documents) for split, documents in splits.items()}

    def _generate_examples(self, documents: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        for title, text in documents.items():
            yield title, {"title": title, "text": text}


def builder() -> PythonDocs:
    """The builder of this Python's text, prepared; processes that prepare it at once wait for the first.

    Kept where TFDS keeps its data (`tfds_dir`); a bucket is not written for it.
    """
    named = tfds_dir("python_docs")
    folder = cache_dir() / "tfds" if "://" in named else Path(named)
    with quiet():
        made = PythonDocs(data_dir=str(folder), file_format="array_record")
        if not made.is_prepared():
            tfds.disable_progress_bar()
            with locked(folder / "python_docs.lock"):
                made = PythonDocs(data_dir=str(folder), file_format="array_record")
                made.download_and_prepare()
    return made
