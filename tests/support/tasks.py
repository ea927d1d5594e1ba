"""Miniature records of the fine-tuning tasks, and files of every format with them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.data.finetuning.task import Task
from switch_jax.data.finetuning.task_records import LABEL

WORDS = ("red", "green", "blue", "left", "right", "old")


def random_record(task: Task, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a record that `task.format` accepts, with the name of a class as label if any."""
    record = _random_value(task.schema, "", rng)
    if task.classes and "label" in record:
        record["label"] = task.classes[int(rng.integers(len(task.classes)))]
    if not task.metrics:  # its answers are unknown
        record["label"] = -1
    if task.name == "super_glue.wsc":
        text = record["text"].split(" ")
        record |= {"label": "True", "span2_index": 2, "span2_text": text[2], "span1_text": text[0]}
    if task.name == "super_glue.dpr":
        record |= {"sentence": "He saw that it was red.", "pronoun": "it"}
    if task.name.startswith("arc"):
        record["choices"] = {"text": ["red", "blue"], "label": ["A", "B"]}
        record["answerKey"] = "AB"[int(rng.integers(2))]
    if task.name.startswith("winogrande"):
        record["label"] = "2"
    return record


def _random_value(kind: Any, name: str, rng: np.random.Generator) -> Any:
    """Returns a value of a type of a schema."""
    if isinstance(kind, dict):
        return {key: _random_value(inner, key, rng) for key, inner in kind.items()}
    if isinstance(kind, list):
        return [_random_value(kind[0], name, rng) for _ in range(2)]
    if name in ("label", "answerKey"):
        return 0
    if kind is float:
        return float(rng.integers(0, 6))
    if kind is int:
        return int(rng.integers(0, 100))
    return " ".join(rng.choice(WORDS, 4))


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tsv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table; values that are lists or objects become JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(records[0])]
    for record in records:
        lines.append("\t".join(v if isinstance(v, str) else json.dumps(v) for v in record.values()))
    path.write_text("\n".join(lines) + "\n")


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)


def write_tfds(root: Path, task: Task, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Prepares the data set of a task with TFDS, with the types of its schema and classes."""
    import tensorflow_datasets as tfds

    dataset, _, config_name = task.dataset.partition("/")

    def feature(kind: Any, name: str) -> Any:
        if isinstance(kind, dict):
            return {key: feature(inner, key) for key, inner in kind.items()}
        if isinstance(kind, list):
            return tfds.features.Sequence(feature(kind[0], name))
        if kind == LABEL:
            return tfds.features.ClassLabel(names=task.classes or ("1", "2"))
        return {str: tfds.features.Text(), float: np.float32, int: np.int32}[kind]

    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = dataset
            VERSION = tfds.core.Version(task.version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config_name)] if config_name else []

            def _info(self):
                features = tfds.features.FeaturesDict(feature(task.schema, ""))
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {name: enumerate(records) for name, records in splits.items()}

            def _generate_examples(self, records):
                yield from records

    builder = Builder(config=config_name or None, data_dir=root)
    builder.download_and_prepare()
