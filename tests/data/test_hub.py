"""Data sets of the library `datasets`: folders, its cache, Arrow files and streams; no network."""

import json
import pickle
import shutil

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches
from switch_jax.data.catalog import sources_for_spec
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.mixture import has_plain_text
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.record_files import read_records
from switch_jax.data.sources.source import SPLITS
from switch_jax.data.sources.text_files import read_texts
from switch_jax.errors import UserError
from tests.support import runs
from tests.support.sources import texts_of

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

TEXTS = {
    "train": [f"Document {i}: {'many words and ' * (i % 7)}an end." for i in range(300)],
    "validation": [f"Held out {i}, with some words." for i in range(40)],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Caches of their own, and no network."""
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def dataset_dict(columns=TEXTS, field="text"):
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({field: texts}) for split, texts in columns.items()}
    )


def write_cache(cache, name, config, data):
    """Writes what `load_dataset(name, config)` leaves in its cache."""
    folder = cache / name.replace("/", "___") / config / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    stem = name.rpartition("/")[2]
    infos = {}
    for split, rows in data.items():
        rows.save_to_disk(folder / "saved")
        [file] = (folder / "saved").glob("*.arrow")
        shutil.move(file, folder / f"{stem}-{split}.arrow")
        shutil.rmtree(folder / "saved")
        infos[split] = {"name": split, "num_examples": len(rows), "dataset_name": stem}
    info = {
        "builder_name": "parquet",
        "dataset_name": stem,
        "config_name": config,
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "features": next(iter(data.values())).features.to_dict(),
        "splits": infos,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("reader", ["store", "seqio"])
@pytest.mark.parametrize("form", ["saved", "lines", "cached"])
def test_token_streams_equal_those_of_json_lines(tmp_path, cache, form, reader):
    mixture = runs.write_text(tmp_path / "lines", **TEXTS)
    if form == "saved":
        dataset_dict().save_to_disk(tmp_path / "text")
        spec = f"hf:{tmp_path / 'text'}"
    elif form == "lines":
        (tmp_path / "text").mkdir()
        for split in SPLITS:
            shutil.copy(
                tmp_path / "lines" / f"text-{split}.jsonl", tmp_path / "text" / f"{split}.jsonl"
            )
        spec = f"hf:{tmp_path / 'text'}"
    else:
        write_cache(cache, "somebody/text", "default", dataset_dict())
        spec = "hf:somebody/text"
    batches = []
    for name in (mixture, spec):
        data = DataConfig(
            mixture=name,
            reader=reader,
            vocabulary="bytes",
            inputs_length=64,
            targets_length=20,
            batch_size=8,
        )
        iterator = open_batches(Config(model=ModelConfig(vocab_size=384), data=data), "train")
        batches.append([next(iterator) for _ in range(5)])
    for one, other in zip(*batches):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_a_folder_without_validation_holds_documents_out(tmp_path):
    dataset_dict()["train"].save_to_disk(tmp_path / "text")
    found = texts_of(f"hf:{tmp_path / 'text'}")
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS["train"])
    assert found["validation"] and len(found["validation"]) < 20


def test_names_and_configurations_of_the_cache(cache):
    write_cache(cache, "somebody/books", "large", dataset_dict(field="body"))
    write_cache(cache, "plain", "small", dataset_dict())
    body = {"text_field": "body"}
    assert texts_of("hf:somebody/books/large", **body) == TEXTS
    assert texts_of("hf:plain/small") == TEXTS
    names = {
        spec: sources_for_spec(spec, DataConfig(**body))[0].name
        for spec in ("hf:somebody/books/large", "hf:plain/small")
    }
    assert set(names.values()) == {"books_large", "small"}


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files(tmp_path, form):
    rows = pyarrow.table({"number": range(300), "text": TEXTS["train"]})
    path = tmp_path / "a.arrow"
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(path, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)
    assert list(read_texts(str(path), BadRecords("error"))) == TEXTS["train"]
    records = list(read_records(str(path)))
    assert records[299].fields == {"number": 299, "text": TEXTS["train"][299]}
    assert records[299].place == f"{path}, row 300"
    assert texts_of(path)["validation"]
    # Truncated, also at the end of a batch.
    content, whole = path.read_bytes(), len(TEXTS["train"])
    for end in (*range(len(content) // 2, len(content)), 10, 3, 0):
        path.write_bytes(content[:end])
        bad = BadRecords("skip")
        read = list(read_texts(str(path), bad))
        assert read == TEXTS["train"][: len(read)] and len(read) <= whole
        [(reason, count)] = bad.counts.items()
        assert count == 1 and "damaged" in reason, end


def test_odd_columns_of_arrow_files(tmp_path):
    later = pyarrow.array([2**62, 0], pyarrow.timestamp("s"))
    columns = [pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"]), later]
    rows = pyarrow.Table.from_arrays(columns, names=["text", "text", "time"])
    for number, table in enumerate((rows, rows.select([0, 2]))):
        path = tmp_path / f"{number}.arrow"
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        assert list(read_texts(str(path), BadRecords("error"))) == ["a", "b"]
    first, second = read_records(str(path))
    assert "damaged" in first[0] and second.fields["text"] == "b"


def test_arrow_text_that_is_not_utf8(tmp_path):
    binary = pyarrow.array([b"good", b"\xff\xfe", b"also good"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    rows = pyarrow.table({"text": text})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", rows.schema) as writer:
        writer.write_table(rows)
    bad = BadRecords("skip")
    assert list(read_texts(str(tmp_path / "a.arrow"), bad)) == ["good", "also good"]
    assert sum(bad.counts.values()) == 1


def test_streamed_folders_have_the_same_documents(tmp_path):
    (tmp_path / "text").mkdir()
    for split, texts in TEXTS.items():
        for part in range(3):
            lines = [json.dumps({"text": text}) for text in texts[part::3]]
            (tmp_path / "text" / f"{split}-{part}.jsonl").write_text("\n".join(lines) + "\n")
    spec = f"hf-stream:{tmp_path / 'text'}"
    [source] = sources_for_spec(spec, DataConfig())
    assert len(source.shards("train")) == 3 and source.name == "text"
    for one in (source, pickle.loads(pickle.dumps(source))):
        for split, texts in TEXTS.items():
            shards = [
                list(one.texts(split, shard, BadRecords("error"))) for shard in one.shards(split)
            ]
            assert shards == [texts[part::3] for part in range(3)]
    bad = BadRecords("skip")
    [source] = sources_for_spec(spec, DataConfig(text_field="body"))
    assert not list(source.texts("train", source.shards("train")[1], bad))
    assert sum(bad.counts.values()) == 100
    data = DataConfig(
        mixture=spec,
        reader="seqio",
        vocabulary="bytes",
        inputs_length=64,
        targets_length=20,
        batch_size=8,
    )
    config = Config(model=ModelConfig(vocab_size=384), data=data)
    assert next(open_batches(config, "validation"))["encoder_input_tokens"].shape == (8, 64)


COLA = {
    split: {"sentence": [f"{split} says so {i}." for i in range(5)], "label": [0, 1, 1, 0, 1]}
    for split in ("train", "validation", "test")
}


@pytest.mark.parametrize("form", ["saved", "cached"])
def test_tasks_of_saved_folders_and_of_the_hub(tmp_path, cache, form):
    data = datasets.DatasetDict({s: datasets.Dataset.from_dict(c) for s, c in COLA.items()})
    if form == "saved":
        data.save_to_disk(tmp_path / "data" / "glue" / "cola")
        folder = str(tmp_path / "data")
    else:
        write_cache(cache, "nyu-mll/glue", "cola", data)
        folder = "hf:"
    [source] = sources_for_spec("glue.cola", DataConfig(data_dir=folder))
    [shard] = source.shards("train")
    texts = list(source.texts("train", shard, BadRecords("error")))
    assert texts[:4] == [
        "cola sentence: train says so 0.",
        "unacceptable",
        "cola sentence: train says so 1.",
        "acceptable",
    ]


def test_all_tasks_have_a_configuration_on_the_hub():
    from switch_jax.data.finetuning.published_layouts import hub_configuration

    specs = {name: hub_configuration(task)[0] for name, task in TASKS.items()}
    assert specs["glue.mnli_matched"] == "nyu-mll/glue/mnli"
    assert specs["super_glue.wsc"] == "aps/super_glue/wsc.fixed"
    assert specs["anli.r2"] == "facebook/anli/plain_text"
    assert specs["winogrande.xl"] == "allenai/winogrande/winogrande_xl"
    assert specs["xsum"] == "EdinburghNLP/xsum"
    assert specs["wmt.enro"] == "wmt/wmt16/ro-en"


def test_pairs_of_a_folder(tmp_path):
    pairs = {"inputs": ["a", "b", "c"], "targets": ["A", "B", "C"]}
    datasets.Dataset.from_dict(pairs).save_to_disk(tmp_path / "mine")
    found = texts_of(f"pairs:hf:{tmp_path / 'mine'}")
    assert sorted(found["train"] + found["validation"]) == sorted("aAbBcC")


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (
            "hf:nobody/nothing",
            r"hf:nobody/nothing cannot be loaded \(.*\); check its name",
        ),
        ("hf:/no/such/folder", r"cannot be loaded \(.*No such file"),
        ("hf-stream:{saved}", "write hf: before it"),
        ("hf-stream:{lines}", r"has no split validation; use hf:/"),
        ("pairs:hf-stream:{lines}", "pairs are not streamed; write pairs:hf:"),
        ("hf:{untrained}", "has no split train, only test"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, spec, sentence):
    dataset_dict().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=dataset_dict()["train"]).save_to_disk(tmp_path / "untrained")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "one"}\n')
    paths = {name: tmp_path / name for name in ("saved", "lines", "untrained")}
    with pytest.raises(UserError, match=sentence):
        sources_for_spec(spec.format(**paths), DataConfig())


@pytest.mark.parametrize("spec", ["hf:", "hf-stream:", "hf:/", "pairs:hf:"])
def test_a_spec_without_a_name_is_told(spec):
    with pytest.raises(UserError, match=r"names no data set; write hf:NAME"):
        sources_for_spec(spec, DataConfig())


def test_the_cause_of_an_error_is_told(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{broken\n')
    with pytest.raises(UserError, match=r"generating the dataset: .*JSON"):
        sources_for_spec(f"hf:{tmp_path}", DataConfig())
    with pytest.raises(UserError, match="is a file; name it without hf:"):
        sources_for_spec(f"hf:{tmp_path}/train.jsonl", DataConfig())


def test_an_error_within_a_stream_is_a_sentence(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{broken\n')
    (tmp_path / "validation.jsonl").write_text('{"text": "one"}\n')
    [source] = sources_for_spec(f"hf-stream:{tmp_path}", DataConfig())
    [shard] = source.shards("train")
    with pytest.raises(UserError, match=r"shard 0 cannot be read behind row \d .*JSON"):
        list(source.texts("train", shard, BadRecords("skip")))


def test_streams_are_not_packed_on_first_use(tmp_path):
    for split, texts in TEXTS.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = DataConfig(mixture=f"hf-stream:{tmp_path}", vocabulary="bytes")
    with pytest.raises(UserError, match=r"is read as it streams; set data\.reader=seqio"):
        open_batches(Config(model=ModelConfig(vocab_size=384), data=data), "train")


def test_the_field_and_the_folder_are_part_of_the_cache(tmp_path):
    lines = [json.dumps({"text": "aaaa", "body": "bbbb", "n": n}) for n in range(50)]
    folder = tmp_path / "text"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    settings = dict(vocabulary="bytes", inputs_length=16, targets_length=10, batch_size=2)
    for mixture in (f"{folder}/{{split}}.jsonl", f"hf:{folder}", f"hf:{folder}/"):
        for field, letter in (("text", "a"), ("body", "b")):
            data = DataConfig(mixture=mixture, text_field=field, **settings)
            batch = next(
                open_batches(Config(model=ModelConfig(vocab_size=384), data=data), "train")
            )
            tokens = batch["encoder_input_tokens"]
            assert set(np.unique(tokens[tokens < 259])) <= {0, 1, ord(letter) + 3}


def test_tasks_that_the_hub_lacks_are_left_out(cache, capsys):
    data = datasets.DatasetDict({s: datasets.Dataset.from_dict(c) for s, c in COLA.items()})
    write_cache(cache, "nyu-mll/glue", "cola", data)
    with pytest.raises(UserError, match=r"^glue.sst2, .*: not in the hub; for glue.sst2, hf:nyu"):
        sources_for_spec("glue", DataConfig(data_dir="hf:"))
    found = sources_for_spec("glue", DataConfig(data_dir="hf:", on_missing_task="skip"))
    assert [source.name for source in found] == ["glue.cola"]
    assert "Left out, since the hub lacks them: glue.sst2, " in capsys.readouterr().err


def test_text_with_the_name_of_a_task_is_text():
    for mixture in ("hf:rajpurkar/squad", "hf:squad", "/text/glue", "./squad.jsonl"):
        assert has_plain_text(mixture)
    for mixture in ("squad", "glue", "pairs:hf:squad", "pairs:/x/a.jsonl"):
        assert not has_plain_text(mixture)


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'needs datasets: pip install "switch_jax\[hub\]"'):
        sources_for_spec("hf:somebody/text", DataConfig())


def test_a_hub_without_a_split_of_a_task_is_told(cache):
    data = {"train": datasets.Dataset.from_dict(COLA["train"])}
    write_cache(cache, "nyu-mll/glue", "cola", data)
    with pytest.raises(UserError, match=r"has the splits train, and no validation"):
        sources_for_spec("glue.cola", DataConfig(data_dir="hf:"))
