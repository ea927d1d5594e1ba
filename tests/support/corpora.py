"""Miniature C4 and mC4 of local text, on disk as TFDS and AllenAI have them."""

import gzip
import itertools
import json
import string
from collections.abc import Iterable
from pathlib import Path

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.python_docs import python_documents
from switch_jax.data.sources.text_files import read_texts

SHARDS = 3
LETTERS = 2500  # of a document

# Language → documents for training, and where its script begins; English stays as it is.
LANGUAGES = {
    "en": (60, None),
    "ru": (40, 0x0430),
    "el": (30, 0x03B1),
    "ka": (24, 0x10D0),
    "iw": (18, 0x05D0),
    "bg-Latn": (12, None),
}
VALIDATION = 6


def documents(count: int, skip: int = 0) -> list[str]:
    """Beginnings of the documents that every Python has."""
    chosen = itertools.islice(python_documents(), skip, skip + count)
    return [document.text[:LETTERS] for document in chosen]


def c4() -> dict[str, list[str]]:
    return {"train": documents(90), "validation": documents(12, skip=100)}


def mc4() -> dict[str, list[str]]:
    """Splits as TFDS calls them, `sw` and `sw-validation`."""
    splits = {}
    for number, (code, (count, script)) in enumerate(LANGUAGES.items()):
        texts = documents(count + VALIDATION, skip=50 * number)
        if script is not None:
            letters = {ord(a): script + i for i, a in enumerate(string.ascii_lowercase)}
            texts = [text.lower().translate(letters) for text in texts]
        splits[code], splits[f"{code}-validation"] = texts[:count], texts[count:]
    return splits


def write_tfds(root: Path, config: str, version: str, splits: dict[str, list[str]]) -> Path:
    """Lets TFDS itself prepare `c4/CONFIG:VERSION`; returns its folder."""
    import tensorflow_datasets as tfds

    names = ("text", "url", "content-type", "content-length", "timestamp")

    with tfds.core.registered.skip_registration():

        class C4(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012

            def _info(self):
                features = tfds.features.FeaturesDict({n: tfds.features.Text() for n in names})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(texts) for name, texts in splits.items()}

            def _generate_examples(self, texts):
                for i, text in enumerate(texts):
                    yield i, dict.fromkeys(names, "") | {"text": text, "url": f"file:///{i}"}

    builder = C4(config=config, data_dir=root)
    settings = tfds.download.DownloadConfig(num_shards=SHARDS)
    builder.download_and_prepare(download_config=settings)
    return root / "c4" / config / version


def write_json(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            line = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"file:///{i}"}
            file.write(json.dumps(line) + "\n")


def as_json(tfds_folder: Path, root: Path) -> None:
    """Writes what TFDS prepared as AllenAI hands it out: the same documents in the same order."""
    multilingual = tfds_folder.parent.name == "multilingual"
    for path in tfds_folder.glob("*.tfrecord-*"):
        name = path.name if multilingual else path.name.replace(".tfrecord-", ".")
        bad = BadRecords("error")
        write_json(root / tfds_folder.parent.name / f"{name}.json.gz", read_texts(str(path), bad))
