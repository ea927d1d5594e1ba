"""Sources of fine-tuning tasks: equal examples from every file format, and custom files."""

import json

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches, open_epoch_by_source, read_task_examples
from switch_jax.data.catalog import source_name, sources_for_spec
from switch_jax.data.finetuning.task import custom_task
from switch_jax.data.finetuning.task_records import select_fields
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.sources.bad_records import BadRecord, BadRecords, UnusableRecord
from switch_jax.data.sources.record_files import read_records
from switch_jax.errors import UserError
from tests.support import tasks as miniature

# Tasks with every kind of field: labels, floats, lists and nested fields.
TASK_NAMES = (
    *("glue.cola", "glue.stsb", "super_glue.multirc", "super_glue.record", "super_glue.wsc"),
    *("super_glue.dpr", "squad", "xsum", "winogrande.xs", "closed_book.trivia_qa"),
)


def records_of(task):
    rng = np.random.default_rng(0)
    names = {rows.split for rows in task.splits.values()}
    return {name: [miniature.random_record(task, rng) for _ in range(5)] for name in sorted(names)}


def examples(spec, data_dir, split):
    [source] = sources_for_spec(spec, DataConfig(data_dir=str(data_dir)))
    return list(source.examples(split, BadRecords("error")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_examples_are_the_same_from_tfds_and_from_every_file(name, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("pyarrow")
    task = TASKS[name]
    splits = records_of(task)
    miniature.write_tfds(tmp_path / "tfds", task, splits)
    writers = {
        "jsonl": miniature.write_jsonl,
        "tsv": miniature.write_tsv,
        "parquet": miniature.write_parquet,
    }
    for suffix, write in writers.items():
        for split, records in splits.items():
            write(tmp_path / suffix / task.dataset / f"{split}.{suffix}", records)
    for split in set(task.splits) - {"test"}:
        rows = task.splits[split]
        expected = [
            example
            for record in splits[rows.split][rows.begin : rows.end]
            for example in task.format(record, split == "train")
        ]
        assert expected or rows.begin
        prepared = examples(name, tmp_path / "tfds", split)
        assert len(prepared) == len(expected)
        # TFDS shuffles what it prepares.
        assert sorted(map(repr, prepared)) == sorted(map(repr, expected))
        for suffix in writers:
            assert examples(name, tmp_path / suffix, split) == expected, suffix


def config(mixture, data_dir=None, **data):
    data = {"inputs_length": 48, "targets_length": 12, "batch_size": 4, **data}
    return Config(
        model=ModelConfig(vocab_size=384),
        data=DataConfig(mixture=mixture, data_dir=data_dir, vocabulary="bytes", **data),
    )


def pairs(count, begin=0):
    numbers = range(begin, begin + count)
    return [{"inputs": f"say {i} twice", "targets": f"{i} {i}"} for i in numbers]


def texts(batch):
    """Inputs and targets of the rows of a batch; bytes are ids from 3, and 1 ends a text."""
    for row in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"]):
        ended = [tokens[: list(tokens).index(1)] - 3 for tokens in row]
        yield tuple(bytes(tokens.astype(np.uint8)).decode() for tokens in ended)


@pytest.mark.parametrize("reader", ["store", "seqio"])
def test_custom_pairs_are_read_unchanged(tmp_path, reader):
    if reader == "seqio":
        pytest.importorskip("seqio")
    miniature.write_tsv(tmp_path / "twice" / "train.tsv", pairs(8))
    miniature.write_tsv(tmp_path / "twice" / "validation.tsv", pairs(3, begin=8))
    spec = config(f"pairs:{tmp_path}/twice/{{split}}.tsv", reader=reader)
    assert read_task_examples(spec) == {
        "pairs.twice": [{**pair, "answer": pair["targets"]} for pair in pairs(3, begin=8)]
    }

    # seqio shuffles one epoch into the next.
    batches, count = open_batches(spec, "train"), 2 if reader == "store" else 32
    seen = [pair for _ in range(count) for pair in texts(next(batches))]
    assert set(seen) == {tuple(pair.values()) for pair in pairs(8)}
    [(name, validation)] = open_epoch_by_source(spec, "validation").items()
    assert name == "pairs.twice"
    [batch] = validation  # of 4 rows; the examples are not repeated to fill it
    assert [row.any() for row in batch["decoder_loss_weights"]] == [True] * 3 + [False]
    examples = texts({name: rows[:3] for name, rows in batch.items()})
    assert sorted(examples) == sorted(tuple(p.values()) for p in pairs(3, begin=8))


def test_both_readers_give_the_same_rows(tmp_path):
    pytest.importorskip("seqio")
    for split, records in records_of(TASKS["glue.rte"]).items():
        miniature.write_jsonl(tmp_path / "glue" / "rte" / f"{split}.jsonl", records)
    rows = {}
    for reader in ("store", "seqio"):
        batches = open_batches(config("glue.rte", str(tmp_path), reader=reader), "train")
        both = ("encoder_input_tokens", "decoder_target_tokens")
        drawn = [next(batches) for _ in range(16)]
        rows[reader] = {
            repr([b[name][i].tolist() for name in both]) for b in drawn for i in range(4)
        }
    assert rows["store"] == rows["seqio"] and len(rows["store"]) == 5
    # Inputs are longer than the rows, and end with an EOS all the same.
    assert all(b["encoder_input_tokens"][:, -1].tolist() == [1] * 4 for b in drawn)


def test_pairs_are_held_out_without_a_split_in_the_name(tmp_path):
    miniature.write_jsonl(tmp_path / "all.jsonl", pairs(1000))
    spec = f"pairs:{tmp_path}/all.jsonl"
    train, held_out = (examples(spec, "", split) for split in ("train", "validation"))
    assert 2 <= len(held_out) <= 25 and len(train) + len(held_out) == 1000
    assert not set(train) & set(held_out)


def test_a_missing_data_set_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "glue" / "cola").mkdir(parents=True)
    miniature.write_jsonl(tmp_path / "glue" / "cola" / "train.jsonl", [])
    with pytest.raises(
        UserError, match=r"validation split of glue\.cola is missing: .*'glue/cola/validation\.\*'"
    ):
        open_batches(config("glue.cola", str(tmp_path)), "train")
    with pytest.raises(UserError, match=r"no file matches .*nowhere"):
        open_batches(config("pairs:/nowhere/{split}.jsonl"), "train")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"sentence": "It is.", "label": 2}', r"its label 2 is none of unacceptable, acceptable"),
        ('{"sentence": "It is.", "label": "good"}', r"line 1 \(its label 'good' is none of"),
        (
            '{"text": "It is.", "label": 1}',
            r"line 1 \(it has 'text', 'label'\) is without the field 'sentence'; repair",
        ),
        ('{"sentence": 3, "label": 1}', r"\(it is 3\) is with a 'sentence' that is no text"),
        (
            '{"sentence": "It is.", "label": 0.5}',
            r"\(it is 0.5\) is with a 'label' that is no class's name",
        ),
    ],
)
def test_errors_name_the_wrong_field(tmp_path, line, sentence):
    for split in ("train", "validation"):
        path = tmp_path / "glue" / "cola" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    with pytest.raises(UserError, match=sentence):
        open_batches(config("glue.cola", str(tmp_path), on_bad_record="error"), "train")
    with pytest.raises(UserError, match=r"glue\.cola has no text to train on.*2 records were left"):
        open_batches(config("glue.cola", str(tmp_path)), "train")


def test_bad_lines_are_skipped_or_refused(tmp_path):
    lines = [json.dumps(pair) for pair in pairs(4)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([*lines, '{"inputs": "cut sh']) + "\n")
    spec = f"pairs:{tmp_path}/{{split}}.jsonl"
    with pytest.raises(UserError, match=r"train\.jsonl, line 5"):
        open_batches(config(spec, on_bad_record="error"), "train")
    assert len(read_task_examples(config(spec))[source_name(spec)]) == 4


@pytest.mark.parametrize("label", ["true", "1", "1.0", '"1"', '"acceptable"'])
def test_labels_may_be_numbers_names_or_booleans(tmp_path, label):
    path = tmp_path / "cola.jsonl"
    path.write_text(
        f'{{"sentence": "It is.", "label": {label}}}\n{{"sentence": "", "label": null}}'
    )
    task = TASKS["glue.cola"]
    known, unknown = (select_fields(r.fields, task.schema) for r in read_records(str(path)))
    assert task.format(known, True)[0].answer == "acceptable"
    assert task.format(unknown, True)[0].answer is None


def test_values_out_of_every_range_are_refused_in_a_short_sentence(tmp_path):
    path = tmp_path / "some.jsonl"
    question, pair = (
        {"question": "Who?", "answers": "[" * 10**5},
        {"sentence1": "", "sentence2": ""},
    )
    for name, record in (
        ("closed_book.web_questions", question),
        ("glue.stsb", {**pair, "label": 10**400}),
        ("glue.stsb", {**pair, "label": "x" * 10**5}),
    ):
        path.write_text(json.dumps(record))
        [found] = read_records(str(path))
        with pytest.raises(UnusableRecord) as refused:
            TASKS[name].format(select_fields(found.fields, TASKS[name].schema), True)
        assert len(str(refused.value)) < 200


def test_a_list_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "web.csv"
    path.write_text("question,answers\nWho?,\"['a', 'b']\"\n")
    [record] = read_records(str(path))
    with pytest.raises(UnusableRecord, match=r"a 'answers' that is no list, as in JSON \(it is "):
        select_fields(record.fields, TASKS["closed_book.web_questions"].schema)


def test_long_texts_and_lone_surrogates(tmp_path):
    long = [{"inputs": "x" * 200_000, "targets": "1"}, {"inputs": "y", "targets": "2"}]
    miniature.write_tsv(tmp_path / "long.tsv", long)
    assert [record.fields for record in read_records(str(tmp_path / "long.tsv"))] == long
    (tmp_path / "half.jsonl").write_text(
        '{"inputs": "\\ud83d", "targets": "1"}\n{"inputs": "\\ud83d\\ude00", "targets": "2"}\n'
    )
    bad, kept = read_records(str(tmp_path / "half.jsonl"))
    assert kept.fields == {"inputs": "😀", "targets": "2"} and isinstance(bad, BadRecord)


def test_a_split_in_two_formats_is_refused_and_other_files_are_ignored(tmp_path):
    folder = tmp_path / "glue" / "rte"
    records = records_of(TASKS["glue.rte"])
    for split in ("train", "validation"):
        miniature.write_jsonl(folder / f"{split}.jsonl", records[split])
        miniature.write_jsonl(folder / f"{split}_old.jsonl", records[split])
    assert len(examples("glue.rte", tmp_path, "train")) == 5
    miniature.write_tsv(folder / "train.tsv", records["train"])
    with pytest.raises(UserError, match=r"train split of glue\.rte is in .* as jsonl and as tsv"):
        examples("glue.rte", tmp_path, "train")


def test_custom_pairs_are_named_after_their_files():
    assert source_name("pairs:/data/my-task/{split}.jsonl") == "pairs.my_task"
    assert custom_task("pairs.my_task").num_examples is None


def test_pairs_may_have_several_targets(tmp_path):
    records = [{"inputs": f"say {i}", "targets": [f"{i}", f"+{i}"]} for i in range(3)]
    records.append({"inputs": "say nothing", "targets": []})
    for split in ("train", "validation"):
        miniature.write_jsonl(tmp_path / f"{split}.jsonl", records)
    spec = f"pairs:{tmp_path}/{{split}}.jsonl"
    [source] = sources_for_spec(spec, DataConfig())
    bad = BadRecords("skip")
    found = list(source.examples("validation", bad))
    assert [(e.targets, e.answer) for e in found] == [(f"{i}", [f"{i}", f"+{i}"]) for i in range(3)]
    assert sum(bad.counts.values()) == 1
    read = read_task_examples(config(spec))[source.name]
    assert [example["answer"] for example in read] == [[f"{i}", f"+{i}"] for i in range(3)]
