"""Miniature C4 and mC4 from TFDS and json.gz: both give the same tokens and can be trained on."""

import dataclasses
import json

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches
from switch_jax.data.mixture import find_sources
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.token_store.open_store import open_store
from switch_jax.data.token_store.store import TokenStore
from switch_jax.data.vocabulary import read_vocabulary
from switch_jax.data.vocabulary_builder import sample_texts, train_vocabulary
from switch_jax.errors import UserError
from tests.support import corpora, runs
from tests.support.paths import CONFIGS

pytest.importorskip("tensorflow_datasets")

SIZE = 1024
SPLITS = ("train", "validation")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders for `data.data_dir`, with both data sets from TFDS and from AllenAI."""
    tfds, allenai = (tmp_path_factory.mktemp(name) for name in ("tfds", "allenai"))
    for config, version, splits in (
        ("en", "2.2.0", corpora.c4()),
        ("multilingual", "3.1.0", corpora.mc4()),
    ):
        corpora.convert_to_json(corpora.write_tfds(tfds, config, version, splits), allenai)
    corpora.write_tfds(tfds, "en", "3.0.1", corpora.c4())
    return {"tfds": str(tfds), "allenai": str(allenai)}


@pytest.fixture(scope="module")
def vocabulary(roots, tmp_path_factory):
    """Vocabulary of all languages."""
    path = tmp_path_factory.mktemp("vocabulary") / "mc4.model"
    data = DataConfig(mixture="mc4", data_dir=roots["tfds"])
    train_vocabulary(sample_texts(data, find_sources(data), 400_000), path, SIZE, coverage=1.0)
    return str(path)


def texts(source, split):
    bad = BadRecords("error")
    return [t for shard in source.shards(split) for t in source.texts(split, shard, bad)]


def test_every_version_of_tfds_has_the_written_documents(roots):
    c4 = corpora.c4()
    for spec in ("c4", "c4/en", "c4/en:2.2.0", "c4/en:3.0.1"):
        data = DataConfig(mixture=spec, data_dir=roots["tfds"])
        (source,) = find_sources(data)
        for split in SPLITS:
            assert sorted(texts(source, split)) == sorted(c4[split])
            assert source.num_documents(split) == len(c4[split])
    newest, older = (
        find_sources(DataConfig(mixture=spec, data_dir=roots["tfds"]))[0]
        for spec in ("c4", "c4/en:2.2.0")
    )
    assert "/3.0.1/" in newest.shards("train")[0].paths[0]
    assert "/2.2.0/" in older.shards("train")[0].paths[0]


def test_mc4_has_the_languages_in_the_folder(roots):
    splits = corpora.mc4()
    for place in roots.values():
        found = find_sources(DataConfig(mixture="mc4", data_dir=place))
        assert {source.name for source in found} == {f"mc4.{code}" for code in corpora.LANGUAGES}
        for source in found:
            code = source.name.removeprefix("mc4.")
            assert sorted(texts(source, "train")) == sorted(splits[code])
            assert sorted(texts(source, "validation")) == sorted(splits[f"{code}-validation"])
    documents = {source.name: source.num_documents("train") for source in found}
    assert set(documents.values()) == {None}  # unknown for json.gz
    (one,) = find_sources(DataConfig(mixture="mc4.bg-Latn", data_dir=roots["tfds"]))
    assert one.num_documents("train") == corpora.LANGUAGES["bg-Latn"][0]


def config(data_dir, vocabulary, **data):
    defaults = dict(inputs_length=64, targets_length=20, batch_size=8, seed=5)
    settings = DataConfig(data_dir=data_dir, vocabulary=vocabulary, **(defaults | data))
    return Config(model=ModelConfig(vocab_size=SIZE), data=settings)


@pytest.mark.parametrize("split", SPLITS)
def test_tfds_and_json_give_the_same_token_stream(roots, vocabulary, split):
    parts = [("tfds", "c4/en:2.2.0", "c4/en"), ("allenai", "c4", "c4")]
    configs = [config(roots[place], vocabulary, mixture=spec) for place, spec, _ in parts]
    stores = [open_store(c.data, read_vocabulary(vocabulary)) for c in configs]
    tokens = [store.tokens(name, split) for store, (*_, name) in zip(stores, parts)]
    assert len(tokens[0]) == len(tokens[1]) > 1000
    assert (tokens[0].offsets == tokens[1].offsets).all()
    ids = [t.take(np.zeros(1, int), len(t)) for t in tokens]
    assert (ids[0] == ids[1]).all()

    streams = [
        open_batches(config(roots[place], vocabulary, mixture=spec, reader="seqio"), split)
        for place, spec, _ in parts
    ]
    for _ in range(20):
        a, b = map(next, streams)
        assert all((a[key] == b[key]).all() for key in a)


# Settings with which a preset compiles in seconds.
SMALL = [
    f"--config.{setting}"
    for setting in (
        *(f"model.vocab_size={SIZE}", "model.d_model=16", "model.d_ff=32", "model.num_heads=2"),
        *("model.head_dim=8", "model.num_encoder_layers=2", "model.num_decoder_layers=2"),
        *("model.dtype=float32", "moe.min_capacity=1", "moe.group_size=32", "mesh.data=1"),
        *("data.inputs_length=32", "data.targets_length=11", "data.batch_size=8"),
        *("train.steps=4", "train.log_every=1", "train.eval_every=2", "train.eval_batches=1"),
    )
]


def small(preset, data_dir, vocabulary):
    """Returns arguments that run a small version of a preset on the data of the tests."""
    data = (f"--config.data.data_dir={data_dir}", f"--config.data.vocabulary={vocabulary}")
    experts = ["--config.moe.num_experts=4"] if preset.startswith(("switch", "msw")) else []
    return ["--config", CONFIGS / f"{preset}.py", *SMALL, *experts, *data]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_c4_is_trained_on_with_the_streaming_reader(roots, vocabulary, tmp_path):
    """From json.gz; `test_both_forms_give_the_same_token_stream` compares TFDS with it."""
    runs.run(
        "train", *small("switch_base", roots["allenai"], vocabulary), "--workdir", tmp_path / "run"
    )
    evaluated = metrics(tmp_path / "run")[-1]
    assert evaluated["split"] == "eval" and 3 < evaluated["cross_entropy"] < 9
    assert not any(key.startswith("c4/") for key in evaluated)


@pytest.mark.slow
def test_mc4_trains_streamed_and_packed_without_tensorflow(roots, vocabulary, tmp_path):
    """Evaluates each language, and plots two runs together."""
    languages = {f"mc4.{code}" for code in corpora.LANGUAGES}
    ours = small("mswitch_base", roots["tfds"], vocabulary)
    runs.run("train", *ours, "--workdir", tmp_path / "ours")
    evaluated = metrics(tmp_path / "ours")[-1]
    for name in ("cross_entropy", "neg_log_perplexity"):
        assert {k for k in evaluated if k.endswith(f"/{name}")} == {
            f"{n}/{name}" for n in languages
        }
    assert evaluated["mc4.ka/neg_log_perplexity"] == -evaluated["mc4.ka/cross_entropy"]

    store = tmp_path / "store"
    baseline = small("mt5_base", roots["allenai"], vocabulary)
    out, _ = runs.run("data", "pack", *baseline, "--output", store)
    assert all(name in out for name in languages)
    assert TokenStore(store).num_documents() == {
        f"mc4.{code}": count for code, (count, _) in corpora.LANGUAGES.items()
    }
    blocked = (
        "import sys\n"
        "for name in ('tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'seqio'):\n"
        "    sys.modules[name] = None\n"
        "from switch_jax.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    runs.run(
        *("train", *small("mt5_base", store, None), "--config.data.reader=store"),
        *("--workdir", tmp_path / "baseline"),
        program=("-c", blocked),
    )
    out, _ = runs.run("plot", "--workdir", tmp_path / "baseline", tmp_path / "ours")
    assert "sources.png" in out and all(name in out for name in languages)


def test_counts_for_json_can_be_given(roots, vocabulary, tmp_path):
    counts = {f"mc4.{code}": count for code, (count, _) in corpora.LANGUAGES.items()}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    c = config(roots["allenai"], vocabulary, mixture="mc4", reader="seqio", rate_exponent=0.3)
    with pytest.raises(UserError, match=r"How many documents mc4\.\S+ has is not known"):
        open_batches(c, "train")
    data = dataclasses.replace(c.data, counts=str(tmp_path / "counts.json"))
    next(open_batches(dataclasses.replace(c, data=data), "train"))
