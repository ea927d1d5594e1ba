"""Miniature C4 and mC4 of local text, in the files of TFDS and of AllenAI."""

import gzip
import itertools
import json
import string
from collections.abc import Iterable
from pathlib import Path

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.sources.text_files import read_texts

SHARDS = 3  # of a split
MAX_CHARACTERS = 2500  # of a document

# Language → number of training documents, and first code point of its script; None: Latin.
LANGUAGES = {
    "en": (60, None),
    "ru": (40, 0x0430),
    "el": (30, 0x03B1),
    "ka": (24, 0x10D0),
    "iw": (18, 0x05D0),
    "bg-Latn": (12, None),
}
VALIDATION = 6  # documents of each language


def documents(count: int, skip: int = 0) -> list[str]:
    """Returns the beginnings of `count` documents that come with Python."""
    selected = itertools.islice(python_documents(), skip, skip + count)
    return [document.text[:MAX_CHARACTERS] for document in selected]


def c4() -> dict[str, list[str]]:
    return {"train": documents(90), "validation": documents(12, skip=100)}


def mc4() -> dict[str, list[str]]:
    """Returns the documents of each split, named as in TFDS: `sw` and `sw-validation`."""
    splits = {}
    for number, (code, (count, script)) in enumerate(LANGUAGES.items()):
        texts = documents(count + VALIDATION, skip=50 * number)
        if script is not None:
            letters = {ord(a): script + i for i, a in enumerate(string.ascii_lowercase)}
            texts = [text.lower().translate(letters) for text in texts]
        splits[code], splits[f"{code}-validation"] = texts[:count], texts[count:]
    return splits


def write_tfds(root: Path, config: str, version: str, splits: dict[str, list[str]]) -> Path:
    """Prepares `c4/CONFIG:VERSION` with TFDS; returns its folder."""
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
    """Writes documents with the fields of AllenAI's json.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            line = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"file:///{i}"}
            file.write(json.dumps(line) + "\n")


def convert_to_json(tfds_folder: Path, root: Path) -> None:
    """Writes the documents of a TFDS folder, in the same order, to the files of AllenAI."""
    multilingual = tfds_folder.parent.name == "multilingual"
    for path in tfds_folder.glob("*.tfrecord-*"):
        name = path.name if multilingual else path.name.replace(".tfrecord-", ".")
        bad = BadRecords("error")
        write_json(root / tfds_folder.parent.name / f"{name}.json.gz", read_texts(str(path), bad))
