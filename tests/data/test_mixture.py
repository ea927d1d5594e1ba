"""Catalog and mixtures: names of sources, rates, splits, shards and fingerprints."""

import collections
import json
import os
import shutil

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.config.schema import DataConfig
from switch_jax.data.catalog import source_name, sources_for_spec
from switch_jax.data.finetuning.task_source import TaskSource
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.mixture import find_sources, mixture_rates, parse_mixture
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import File, FileSource, glob_files, newest_version
from switch_jax.data.token_store.dataset import _ROUND, _quotas
from switch_jax.errors import UserError
from tests.support import runs
from tests.support.paths import ODD_NAME


def all_texts(source, split):
    bad = BadRecords("error")
    return [text for shard in source.shards(split) for text in source.texts(split, shard, bad)]


@pytest.mark.parametrize(
    "spec, name",
    [
        ("python_docs", "python_docs"),
        ("c4", "c4"),
        ("c4/en:2.2.0", "c4/en"),
        ("mc4.bg-Latn", "mc4.bg-Latn"),
        ("/data/wiki/{split}-*.jsonl.gz", "wiki"),
        ("/data/en/c4-{split}.*-of-*.json.gz", "c4"),
        ("~/books/[0-9]*.txt.zst", "books"),
        ("my_text.parquet", "my_text"),
        ("/x/lang=sw/part-00000-of-00008.parquet", "part"),
    ],
)
def test_sources_are_named_after_their_files(spec, name):
    assert source_name(spec) == name


def test_parse_mixture():
    assert parse_mixture("c4") == [("c4", None)]
    assert parse_mixture(" c4=0.7, /b/*.txt = 0.3 ") == [("c4", 0.7), ("/b/*.txt", 0.3)]
    assert parse_mixture("/d/lang=sw/*.txt") == [("/d/lang=sw/*.txt", None)]
    assert parse_mixture("/d/lang=sw/*.txt=2") == [("/d/lang=sw/*.txt", 2.0)]
    assert parse_mixture(r"/a\,b/x\=1=2,/c\d/*\=3=4") == [("/a,b/x=1", 2.0), (r"/c\d/*=3", 4.0)]
    for wrong in ("", ",", "=3"):
        with pytest.raises(UserError, match="names no source"):
            parse_mixture(wrong)
    for wrong in ("c4=0.5,mc4", "c4=0", "c4=-1,mc4=2", "c4=nan", "c4=inf,mc4=1"):
        with pytest.raises(UserError, match="every source a rate above 0"):
            parse_mixture(wrong)


def test_rates_follow_documents_exponent_and_groups(tmp_path):
    documents = {"c4": 1000, "mc4.en": 100, "mc4.sw": 1, "books": None}

    def shares(text, **data):
        return mixture_rates(DataConfig(mixture=text, **data), documents, {})

    assert shares("c4") == {"c4": 1.0}
    assert shares("books") == {"books": 1.0}
    assert shares("c4, mc4.en") == pytest.approx({"c4": 10 / 11, "mc4.en": 1 / 11})
    assert shares("c4=1, books=3") == {"c4": 0.25, "books": 0.75}
    # mT5's exponent, paper.md: proportional to documents^0.3
    smooth = shares("mc4", rate_exponent=0.3)
    assert smooth["mc4.en"] / smooth["mc4.sw"] == pytest.approx(100**0.3)
    group = shares("c4=1, mc4=1", rate_exponent=0.5)
    assert group == pytest.approx({"c4": 0.5, "mc4.en": 5 / 11, "mc4.sw": 0.5 / 11})
    with pytest.raises(UserError, match=r"How many documents books has.*data\.counts"):
        shares("c4, books")
    (tmp_path / "counts.json").write_text(json.dumps({"books": 3000}))
    counted = shares("c4, books", counts=str(tmp_path / "counts.json"))
    assert counted == {"c4": 0.25, "books": 0.75}
    for wrong in ('{"books": "many"}', "[1]", '{"c4": 0}', "{", '{"c4": 1' + 400 * "0" + "}"):
        (tmp_path / "counts.json").write_text(wrong)
        for used in ("c4, books", "c4"):  # also where no count is needed
            with pytest.raises(UserError, match=r"counts\.json"):
                shares(used, counts=str(tmp_path / "counts.json"))
    with pytest.raises(UserError, match=r"names wiki, and there is only books, c4"):
        shares("wiki")
    for twice in ("mc4.sw=1, mc4=1", "mc4=1, mc4.sw=1", "c4=1, c4=2", "/a/b.txt, /a/b.txt"):
        with pytest.raises(UserError, match="twice; name it once"):
            shares(twice)
    documents["mc4.sw"] = 0
    with pytest.raises(UserError, match=r"gives mc4\.sw a rate, and it has no text to train on"):
        shares("c4=1, mc4.sw=1")
    assert shares("c4=1, mc4=1") == {"c4": 0.5, "mc4.en": 0.5}


def test_sources_with_equal_names_are_numbered(tmp_path):
    for folder in "ab":
        runs.write_text(tmp_path / folder, train=["x"], validation=["y"])
    text = ", ".join(f"{tmp_path}/{folder}/text-{{split}}.jsonl" for folder in "ab")
    sources = find_sources(DataConfig(mixture=text))
    assert [source.name for source in sources] == ["text", "text_2"]
    documents = {source.name: 1 for source in sources}
    specs = {source.name: source.spec for source in sources}
    assert mixture_rates(DataConfig(mixture=text), documents, specs) == {
        "text": 0.5,
        "text_2": 0.5,
    }
    second = text.split(", ")[1]
    assert mixture_rates(DataConfig(mixture=second), documents, specs) == {"text_2": 1.0}
    with pytest.raises(UserError, match="there is only text, text_2"):
        elsewhere = second.replace("/b/", "/c/")
        mixture_rates(DataConfig(mixture=elsewhere), documents, specs)


def test_folders_and_files_may_have_any_name(tmp_path):
    folder = tmp_path / ODD_NAME
    names = (f"{ODD_NAME}.txt", "c4-train.00000-of-00001.json.gz", "c4/en/1.0.0/dataset_info.json")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    escaped = str(folder / names[0]).replace(",", r"\,")
    (source,) = find_sources(DataConfig(mixture=f"{escaped}=1"))
    assert all_texts(source, "train") == [names[0]]
    pattern = str(folder / "a%*.txt")
    assert glob_files(pattern) == glob_files(str(folder / names[0])) != []
    assert newest_version(epath.Path(folder, "c4/en")).name == "1.0.0"
    shutil.rmtree(folder / "c4")
    (source,) = sources_for_spec("c4", DataConfig(data_dir=str(folder)))
    assert [path for shard in source.shards("train") for path in shard.paths] == [
        str(folder / names[1])
    ]


def test_an_unused_data_dir_is_refused(tmp_path):
    with pytest.raises(UserError, match="reads nothing else there"):
        find_sources(DataConfig(data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "spec, data_dir, words",
    [
        ("c5", None, "'c5' is not known; use python_docs"),
        ("wikipedia/en", "here", "'wikipedia/en' is not known"),
        ("c4", None, "needs data.data_dir"),
        ("c4", "here", "There is no c4 in"),
        ("c4/en:9.9.9", "here", "There is no c4/en:9.9.9 in"),
        ("mc4.sw", "here", "There is no mc4.sw in"),
        ("mc4.klingon", "here", "'mc4.klingon' is not known"),
        ("/no/such/*.txt", None, "no file matches '/no/such/*.txt'"),
        ("here/text-{split}.jsonl", None, "text-validation.jsonl"),
        ("here/picture*", None, "is of no known format"),
    ],
)
def test_missing_sources_are_refused(tmp_path, monkeypatch, spec, data_dir, words):
    monkeypatch.chdir(tmp_path)
    runs.write_text(tmp_path / "here", train=["x"])
    (tmp_path / "here" / "picture.png").write_bytes(b"")
    (tmp_path / "here" / "c4" / "en").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        sources_for_spec(spec, DataConfig(data_dir=data_dir))
    assert words in str(caught.value)


def test_c4_of_allenai_is_found_in_every_folder(tmp_path):
    for place in ("", "en", "c4/en"):
        folder = tmp_path / (place.replace("/", "_") or "plain")
        for name in ("c4-train.00001-of-00002", "c4-train.00000-of-00002", "c4-validation.00000"):
            file = folder / place / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": name}) + "\n")
            os.system(f"gzip {file}")
        (source,) = sources_for_spec("c4", DataConfig(data_dir=str(folder)))
        assert all_texts(source, "train") == ["c4-train.00000-of-00002", "c4-train.00001-of-00002"]
        assert all_texts(source, "validation") == ["c4-validation.00000"]


def test_documents_are_held_out_without_a_validation_split(tmp_path):
    texts = [f"document {i // 2}" for i in range(4000)]  # each twice
    mixture = runs.write_text(tmp_path, train=texts)
    (source,) = sources_for_spec(mixture.replace("{split}", "train"), DataConfig())
    train, validation = (all_texts(source, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert 10 < len(validation) < 80
    assert set(collections.Counter(validation).values()) == {2}


def test_small_files_share_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("switch_jax.data.sources.source._SHARD_BYTES", 100)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * (150 if i == 4 else 30))
    (source,) = sources_for_spec(f"{tmp_path}/*.txt", DataConfig())
    shards = source.shards("train")
    assert [len(shard.paths) for shard in shards] == [3, 1, 1, 3, 2]
    assert source.size() == 9 * 30 + 150


def test_missing_numbered_files_are_found():
    names = [f"/d/c4-train.{i:05d}-of-00005.json.gz" for i in (0, 2, 3)]
    names.append("/d/other-00001-of-99999999999.jsonl")  # no number of files
    source = FileSource("c4", {"train": [File(name, 1) for name in names]}, {})
    assert source.missing_files("train") == [
        f"/d/c4-train.{i:05d}-of-00005.json.gz" for i in (1, 4)
    ]


def test_fingerprint_depends_on_sizes_and_splits(tmp_path):
    def fingerprint(**splits):
        pattern = runs.write_text(tmp_path, **splits)
        return sources_for_spec(pattern, DataConfig())[0].fingerprint

    prints = {
        fingerprint(train=train, validation=validation)
        for train, validation in ((["a"], ["b"]), (["ab"], ["b"]), (["a"], ["bc"]), (["b"], ["ba"]))
    }
    assert len(prints) == 3  # it depends on sizes, not on contents
    assert fingerprint(train=["a"], validation=["b"]) in prints


def test_fingerprints_of_existing_token_stores_stay_valid():
    files = {split: [File(f"/data/{split}.jsonl", 100, 1.7e9)] for split in ("train", "validation")}
    texts = FileSource("c4", files, {"train": 5, "validation": 3})
    assert texts.fingerprint == "c6c19cdb386e38bb77199cfb95a9c39c"
    assert texts.cache_key == "2883cb561dae50b4a5bf03f699dd39ad"
    task = TaskSource(TASKS["glue.cola"], files)
    assert task.fingerprint == "00ab5f6f77286c8a2a778423064bae25"
    assert task.cache_key == "2883cb561dae50b4a5bf03f699dd39ad"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=120))
def test_quotas_sum_to_a_round_and_follow_the_shares(shares):
    shares = np.array(shares) / sum(shares)
    quotas = _quotas(shares)
    assert quotas.sum() == _ROUND and quotas.min() >= 1
    assert (np.abs(quotas / _ROUND - shares) <= (len(shares) + 1) / _ROUND).all()
