"""Published layouts: the files of every task, as downloaded, give TFDS's records."""

import importlib
import json
import types

import numpy as np
import pytest

from scripts.docs import task_files
from switch_jax.config import DataConfig
from switch_jax.data.catalog import sources_for_spec
from switch_jax.data.finetuning.published_layouts import layouts_of_task
from switch_jax.data.finetuning.task_records import select_fields
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.sources.bad_records import DAMAGED, NOT_JSON, UNEVEN, BadRecord, BadRecords
from switch_jax.data.sources.record_files import read_records
from switch_jax.errors import UserError
from tests.support import published_files
from tests.support import tasks as miniature

PARTS = ("train", "validation")
_TEXT, _SETS = "tensorflow_datasets.text", "tensorflow_datasets.datasets"
MODULES = {  # data set in TFDS -> the module that reads the published files, and its class
    "glue": (f"{_TEXT}.glue", "Glue"),
    "super_glue": (f"{_TEXT}.super_glue", "SuperGlue"),
    "definite_pronoun_resolution": (
        f"{_TEXT}.definite_pronoun_resolution",
        "DefinitePronounResolution",
    ),
    "winogrande": (f"{_TEXT}.winogrande", "Winogrande"),
    "anli": (f"{_SETS}.anli.anli_dataset_builder", "Builder"),
    "ai2_arc": (f"{_SETS}.ai2_arc.ai2_arc_dataset_builder", "Builder"),
    "squad": (f"{_SETS}.squad.squad_dataset_builder", "Builder"),
    "natural_questions_open": (
        f"{_SETS}.natural_questions_open.natural_questions_open_dataset_builder",
        "Builder",
    ),
    "web_questions": ("tensorflow_datasets.question_answering.web_questions", "WebQuestions"),
    "trivia_qa": (f"{_SETS}.trivia_qa.trivia_qa_dataset_builder", "Builder"),
}


def tfds_records(task, path):
    """The records that TFDS's own reader makes of a published file."""
    dataset, _, name = task.dataset.partition("/")
    module, class_name = MODULES[dataset]
    builder = getattr(importlib.import_module(module), class_name)
    configs = {config.name: config for config in getattr(builder, "BUILDER_CONFIGS", [])}
    stub = types.SimpleNamespace(builder_config=configs.get(name))
    arguments = {
        "glue": lambda: (str(path), "train"),
        "super_glue": lambda: (str(path), "train"),
        "trivia_qa": lambda: ([str(path)], None, None),
    }.get(dataset, lambda: (str(path),))()
    if name == "mrpc":  # read by TFDS from the files that GLUE's zip was made of
        records = builder._generate_example_mrpc_files(None, {"test": str(path)}, "test")
        rows = path.read_text().splitlines()[1:]
        return [record | {"label": int(row[0])} for record, row in zip(records, rows)]
    records = [record for _, record in builder._generate_examples(stub, *arguments)]
    if name == "stsb":
        return [record | {"label": float(record["label"])} for record in records]
    if dataset == "anli":  # numbers of its classes
        return [record | {"label": "enc".index(record["label"])} for record in records]
    return records


@pytest.mark.parametrize("name", published_files.ARCHIVES)
def test_published_files_give_the_records_of_tfds(name, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    published_files.write_archive(tmp_path, name)
    task = TASKS[name]
    [source] = sources_for_spec(name, DataConfig(data_dir=str(tmp_path)))
    for part in PARTS:
        if part not in task.splits:
            continue
        rows = task.splits[part]
        [file] = [f for layout in layouts_of_task(task) for f in layout.find(tmp_path, rows.split)]
        records = tfds_records(task, tmp_path / file.path)
        assert records
        fields = [select_fields(record, task.schema) for record in records]
        expected = [
            example
            for record in fields[rows.begin : rows.end]
            for example in task.format(record, part == "train")
        ]
        assert list(source.examples(part, BadRecords("skip"))) == expected


# Repository of the hub: folder of the data set -> fields that it names unlike TFDS, and names of
# the splits that differ.
HUB = {
    "glue.cola": ("glue/cola", {}, {}),
    "glue.mnli_matched": ("glue/mnli", {}, {}),
    "super_glue.multirc": ("super_glue/multirc", {}, {}),
    "super_glue.dpr": ("definite_pronoun_resolution/plain_text", {}, {}),
    "squad": ("squad/plain_text", {}, {}),
    "cnn_dailymail": ("cnn_dailymail/3.0.0", {}, {}),
    "xsum": ("xsum/data", {}, {}),
    "wmt.enro": ("wmt16/ro-en", {}, {}),
    "anli.r3": (
        "anli/plain_text",
        {"context": "premise"},
        {"train": "train_r3", "validation": "dev_r3"},
    ),
    "arc.easy": ("ai2_arc/ARC-Easy", {}, {}),
    "winogrande.xl": ("winogrande/winogrande_xl", {"label": "answer"}, {"train_xl": "train"}),
    "closed_book.natural_questions": ("nq_open/nq_open", {}, {}),
    "closed_book.web_questions": ("web_questions/data", {}, {}),
    "closed_book.trivia_qa": ("trivia_qa/unfiltered.nocontext", {}, {}),
}


@pytest.mark.parametrize("files", ["{split}-0000{i}-of-00002", "{split}/000{i}"])
@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_are_read(name, files, tmp_path):
    pytest.importorskip("pyarrow")
    task, rng = TASKS[name], np.random.default_rng(0)
    folder, fields, splits = HUB[name]
    expected = {}
    for part in PARTS:
        if part not in task.splits:
            continue
        rows = task.splits[part]
        records = [miniature.random_record(task, rng) for _ in range(4)]
        for i in range(2):
            renamed = [{fields.get(k, k): v for k, v in r.items()} for r in records[2 * i :][:2]]
            if name.startswith("wmt"):
                renamed = [{"translation": record} for record in renamed]
            file = files.format(split=splits.get(rows.split, rows.split), i=i)
            miniature.write_parquet(tmp_path / folder / f"{file}.parquet", renamed)
        expected[rows.split] = records
    [source] = sources_for_spec(name, DataConfig(data_dir=str(tmp_path)))
    for part in PARTS:
        if part in task.splits:
            rows = task.splits[part]
            records = expected[rows.split][rows.begin : rows.end]
            examples = [e for record in records for e in task.format(record, part == "train")]
            assert list(source.examples(part, BadRecords("error"))) == examples


def test_broken_rows_are_left_out_with_their_place_and_counted_once(tmp_path):
    published_files.write_archive(tmp_path, "glue.qqp")
    [source] = sources_for_spec("glue.qqp", DataConfig(data_dir=str(tmp_path)))
    bad = BadRecords("skip")
    assert len(list(source.examples("train", bad))) == 2
    assert bad.counts == {UNEVEN: 2} and bad.first[UNEVEN].endswith("QQP/train.tsv, record 2")
    with pytest.raises(UserError, match=r"train\.tsv, record 2 is a row with another number of"):
        list(source.examples("train", BadRecords("error")))


def test_every_bad_record_has_its_place_and_reason(tmp_path):
    lines = [
        {"sentence": "It is.", "label": "maybe"},
        {"sentence": None, "label": 1},
        {"sentence": "It is.", "label": 0.5},
        {"text": "It is.", "label": 1},
        {"sentence": "It is.", "label": 1},
    ]
    for split in ("train", "validation"):
        miniature.write_jsonl(tmp_path / "glue" / "cola" / f"{split}.jsonl", lines)
    [source] = sources_for_spec("glue.cola", DataConfig(data_dir=str(tmp_path)))
    bad = BadRecords("skip")
    [example] = source.examples("train", bad)
    assert example.inputs == "cola sentence: It is." and len(bad.counts) == 4
    places = " ".join(bad.first.values())
    assert all(f"train.jsonl, line {number} " in f"{places} " for number in (1, 2, 3, 4))
    assert "its label 'maybe' is none of unacceptable, acceptable" in places


def test_a_record_of_another_data_set_is_bad(tmp_path):
    published_files.write_archive(tmp_path, "super_glue.record")
    (tmp_path / "MultiRC").mkdir()
    for split in ("train", "val"):
        file = tmp_path / "ReCoRD" / f"{split}.jsonl"
        file.rename(tmp_path / "MultiRC" / file.name)
    [source] = sources_for_spec("super_glue.multirc", DataConfig(data_dir=str(tmp_path)))
    bad = BadRecords("skip")
    assert not list(source.examples("train", bad))
    assert bad.counts == {"not a record of SuperGLUE's zip": 1}


def test_missing_tasks_are_named_at_once_or_left_out(tmp_path, capsys):
    for name in published_files.SUPER_GLUE:
        if name not in ("super_glue.dpr", "super_glue.axg"):
            published_files.write_archive(tmp_path, name)
    with pytest.raises(UserError) as refused:
        sources_for_spec("super_glue", DataConfig(data_dir=str(tmp_path)))
    message = str(refused.value)
    assert message.startswith("super_glue.dpr, super_glue.axg: not in ")
    assert "definite_pronoun_resolution/train.c.txt (the authors' text files)" in message
    sources = sources_for_spec(
        "super_glue", DataConfig(data_dir=str(tmp_path), on_missing_task="skip")
    )
    assert len(sources) == 9
    assert "lacks them: super_glue.dpr, super_glue.axg." in capsys.readouterr().err
    with pytest.raises(UserError, match=r"glue\.cola, .*: not in "):
        sources_for_spec("glue", DataConfig(data_dir=str(tmp_path), on_missing_task="skip"))


def test_a_missing_split_of_an_archive_is_named(tmp_path):
    published_files.write_archive(tmp_path, "glue.cola")
    (tmp_path / "CoLA" / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"validation split of glue\.cola .* no 'CoLA/dev\.tsv' in"):
        sources_for_spec("glue.cola", DataConfig(data_dir=str(tmp_path)))


def test_a_json_array_is_read_as_a_stream_and_its_damage_is_found(tmp_path):
    path = tmp_path / "pairs.json"
    pairs = [{"inputs": f"{i}", "targets": "x" * 3000} for i in range(100)]
    path.write_text(json.dumps(pairs, indent=1))
    assert [record.fields for record in read_records(str(path))] == pairs
    path.write_text(json.dumps([*pairs[:2], "no object"]))
    *_, last = read_records(str(path))
    assert last == BadRecord(NOT_JSON, f"{path}, item 3")
    path.write_text(json.dumps(pairs)[:200_000])
    *kept, last = read_records(str(path))
    assert [record.fields for record in kept] == pairs[: len(kept)] and len(kept) > 60
    assert last.kind == DAMAGED


def test_the_documentation_has_the_layouts_of_every_task():
    assert task_files.task_table() in task_files.PAGE.read_text()
