"""Token stores: the same files from any number of workers, resumed builds, damaged files."""

import dataclasses
import fcntl
import gzip
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.token_store import open_store as open_store_module
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.token_store.manifest import write_manifest
from switch_jax.data.token_store.open_store import open_store
from switch_jax.data.token_store.store import TokenStore
from switch_jax.data.vocabulary import ByteVocabulary, read_vocabulary
from switch_jax.errors import UserError
from tests.support import runs
from tests.support.paths import file_contents
from tests.support.vocabularies import write_letters

SIZE = 900
SHARDS = 12


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Text in several shards, one file each."""
    folder = tmp_path_factory.mktemp("text")
    texts = [document.text for document in python_documents()]
    for i in range(SHARDS):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i : 60 + i : SHARDS]]
        with gzip.open(folder / f"train-{i:05d}-of-{SHARDS:05d}.jsonl.gz", "wt") as file:
            file.writelines(lines)
    (folder / "validation.jsonl").write_text(json.dumps({"text": texts[100]}) + "\n")
    return f"{folder}/{{split}}*.jsonl*"


@pytest.fixture(autouse=True)
def one_file_per_shard(monkeypatch):
    monkeypatch.setattr("switch_jax.data.sources.source._SHARD_BYTES", 1)


@pytest.fixture(scope="module")
def vocabulary(mixture, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = Config(model=ModelConfig(vocab_size=SIZE), data=DataConfig(mixture=mixture))
        return open_vocabulary(config)


def test_files_do_not_depend_on_the_number_of_workers(mixture, vocabulary, tmp_path):
    data = DataConfig(mixture=mixture)
    manifest = build_token_store(data, vocabulary, tmp_path / "one", workers=1)
    build_token_store(data, vocabulary, tmp_path / "two", workers=2)
    assert file_contents(tmp_path / "one") == file_contents(tmp_path / "two")
    train = next(iter(manifest["sources"].values()))["train"]
    assert len(train["shards"]) == SHARDS and train["documents"] == 60 and not train["left_out"]
    before = file_contents(tmp_path / "one")
    assert build_token_store(data, vocabulary, tmp_path / "one", workers=1) == manifest
    assert file_contents(tmp_path / "one") == before


def test_tokens_are_read_across_shards(mixture, vocabulary, tmp_path):
    build_token_store(DataConfig(mixture=mixture), vocabulary, tmp_path / "store", workers=1)
    opened = TokenStore(tmp_path / "store")
    (name,) = opened.num_documents()
    tokens = opened.tokens(name, "train")
    folder = tmp_path / "store" / name / "train"
    whole = np.concatenate(
        [np.fromfile(folder / f"{i:05d}.tokens", np.uint16) for i in range(SHARDS)]
    )
    assert len(tokens) == len(whole)
    rng = np.random.default_rng(0)
    for length in (1, 50, len(whole) // 3, len(whole)):
        starts = rng.integers(0, len(whole) - length + 1, 40)
        expected = whole[starts[:, None] + np.arange(length)]
        assert (tokens.take(starts, length) == expected).all()
    documents = [np.load(folder / f"{i:05d}.offsets.npy") for i in range(SHARDS)]
    lengths = np.concatenate([np.diff(offsets) for offsets in documents])
    assert (np.diff(tokens.offsets) == lengths).all() and tokens.offsets[-1] == len(whole)


# `switch-jax` with one file per shard, which tokenises two shards and then waits.
STALLING = """
import sys, time
from switch_jax.cli import main
from switch_jax.data.sources import source
from switch_jax.data.token_store import workers

def stalling(task, action, real=workers.write_shard, done=[]):
    if len(done) == 2:
        time.sleep(600)
    done.append(task)
    return real(task, action)

source._SHARD_BYTES = 1
if sys.argv.pop(1) == "stall":
    workers.write_shard = stalling
sys.exit(main(sys.argv[1:]))
"""


def test_a_resumed_build_gives_the_same_files(mixture, vocabulary, tmp_path):
    build_token_store(DataConfig(mixture=mixture), vocabulary, tmp_path / "whole", workers=1)
    config = tmp_path / "config.py"
    config.write_text(
        "from switch_jax.config import defaults\n"
        "def get_config(arg=''):\n"
        "    config = defaults()\n"
        f"    config.model.vocab_size = {SIZE}\n"
        f"    config.data.update(mixture={mixture!r}, vocabulary={vocabulary.name!r})\n"
        "    return config\n"
    )
    output = tmp_path / "killed"
    arguments = ("data", "pack", "--config", config, "--output", output, "--workers", 1)
    for number, done in ((signal.SIGKILL, 2), (signal.SIGINT, 4)):
        process = runs.start("stall", *arguments, program=("-c", STALLING))
        while len(list(output.rglob("0*.json"))) < done:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number), err
    assert "same command continues" in out
    finished = [path for path in output.rglob("*.tokens") if path.with_suffix(".json").exists()]
    written_at = {path: path.stat().st_mtime_ns for path in finished}
    assert len(written_at) == 4 < len(list((tmp_path / "whole").rglob("*.tokens")))
    out, _ = runs.run("go", *arguments, program=("-c", STALLING))
    assert {path: path.stat().st_mtime_ns for path in finished} == written_at
    assert file_contents(output) == file_contents(tmp_path / "whole")
    assert "data.data_dir=" in out


def test_other_files_are_refused_and_left_unchanged(mixture, vocabulary, tmp_path):
    data = DataConfig(mixture=mixture)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no packed text; choose another --output"):
        build_token_store(data, vocabulary, tmp_path / "mine", workers=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    build_token_store(data, vocabulary, tmp_path / "store", workers=1)
    with pytest.raises(UserError, match="holds other packed text"):
        build_token_store(
            DataConfig(mixture=mixture), ByteVocabulary(), tmp_path / "store", workers=1
        )
    (tmp_path / "store" / "manifest.json").unlink()
    (tmp_path / "store" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="incomplete pack of other text"):
        build_token_store(data, vocabulary, tmp_path / "store", workers=1)


def test_two_builds_of_one_store_are_refused(mixture, vocabulary, tmp_path):
    (tmp_path / "store").mkdir()
    with open(tmp_path / "store" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process packs into"):
            build_token_store(
                DataConfig(mixture=mixture), vocabulary, tmp_path / "store", workers=1
            )
    build_token_store(DataConfig(mixture=mixture), vocabulary, tmp_path / "store", workers=1)
    assert not (tmp_path / "store" / ".lock").exists()


WORKERS = """
import sys
from pathlib import Path
from switch_jax.config import DataConfig
from switch_jax.data.sources import source
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.vocabulary import ByteVocabulary, read_vocabulary

def main():
    source._SHARD_BYTES = 1
    data = DataConfig(mixture=sys.argv[1])
    build_token_store(data, ByteVocabulary(), Path(sys.argv[2]), workers=2)

if __name__ == "__main__":
    main()
"""


def test_workers_exit_when_the_parent_is_killed(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("some words of text " * 200_000)
    (tmp_path / "workers.py").write_text(WORKERS)
    arguments = (f"{tmp_path}/*.txt", tmp_path / "store")
    process = runs.start(*arguments, program=(str(tmp_path / "workers.py"),))
    while len(list(tmp_path.rglob("*.tokens"))) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(2)
    before = len(list(tmp_path.rglob("*.tokens")))
    time.sleep(2)
    assert len(list(tmp_path.rglob("*.tokens"))) == before < 40


def test_changed_text_gives_another_store(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    opened = []
    for letter in "ab":
        (tmp_path / "mine.txt").write_text("\n\n".join([f"{letter} word {i}" for i in range(400)]))
        os.utime(tmp_path / "mine.txt", (ord(letter), ord(letter)))
        data = DataConfig(mixture=str(tmp_path / "mine.txt"))
        opened.append(open_store(data, vocabulary).fingerprint("mine", "train"))
    assert opened[0] != opened[1]


def test_records_of_a_source_without_validation_are_counted_once(vocabulary, tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(300)]
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines, "{", "{"]))
    data = DataConfig(mixture=str(tmp_path / "mine.jsonl"))
    manifest = build_token_store(data, vocabulary, tmp_path / "store", workers=1)
    assert manifest["left_out"] == {"not a JSON object": 2}


def test_bad_records_are_counted_in_the_manifest_and_reported(vocabulary, tmp_path, capfd):
    good = [document.text[:300] for document in python_documents()[:20]]
    lines = [json.dumps({"text": text}) for text in good]
    lines[3:3] = ['{"no": 1}', '{"text": "  "}', "{"]
    (tmp_path / "part-00000-of-00003.jsonl").write_text("\n".join(lines))
    compressed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "part-00002-of-00003.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    data = DataConfig(mixture=f"{tmp_path}/part-*")
    manifest = build_token_store(data, vocabulary, tmp_path / "store", workers=2)
    stderr = capfd.readouterr().err
    assert stderr.count("left out") == 1
    assert set(manifest["left_out"]) == {
        *("empty", "not a JSON object", "without a text", "cut short or damaged"),
        "missing or unreadable",
    }
    assert "1 file is missing or unreadable (first: " in stderr
    assert "part-00001-of-00003" in stderr and "part-00000-of-00003.jsonl, line 4" in stderr
    documents = TokenStore(tmp_path / "store").num_documents()["part"]
    assert 20 <= documents < 40
    with pytest.raises(UserError, match=r"set data\.on_bad_record=skip"):
        strict = DataConfig(mixture=f"{tmp_path}/part-*", on_bad_record="error")
        build_token_store(strict, vocabulary, tmp_path / "strict", workers=2)


def test_sources_without_text_are_refused_and_nothing_is_left_behind(vocabulary, tmp_path, capsys):
    good = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
    files = {"bad.jsonl": "{\n" * 3, "empty.jsonl": "", "good.jsonl": good, "pairs.jsonl": "[\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for mixture, sentence in {
        "bad.jsonl": r"^bad has no text to train on \(3 records were left out: 3 not a JSON",
        "empty.jsonl": "^empty has no text to train on; name files",
        "good.jsonl=0.5, {}/bad.jsonl=0.5": "^bad has no text",
    }.items():
        data = DataConfig(mixture=f"{tmp_path}/{mixture}".format(tmp_path))
        with pytest.raises(UserError, match=sentence):
            build_token_store(data, vocabulary, tmp_path / "store", workers=1)
        assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(UserError, match=r"^pairs\.pairs has no text to train on"):
        data = DataConfig(mixture=f"pairs:{tmp_path}/pairs.jsonl")
        build_token_store(data, vocabulary, tmp_path / "store", workers=1)
    (tmp_path / "store" / ".manifest.json.0123456789ab.partial").write_text("of a killed build")
    for split, content in {"train": good, "validation": ""}.items():
        (tmp_path / f"{split}-good.jsonl").write_text(content)
    data = DataConfig(mixture=f"{tmp_path}/{{split}}-good.jsonl")
    build_token_store(data, vocabulary, tmp_path / "store", workers=1)
    assert "good has no text for validation" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [
        *("good", "manifest.json", "vocabulary.model")
    ]


def test_characters_that_the_vocabulary_lacks_are_counted_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.txt").write_text("a{b}c")
    (tmp_path / "pairs.jsonl").write_text('{"inputs": "say a", "targets": "<<a>>"}\n' * 4)
    letters = str(write_letters(tmp_path / "letters.model"))
    data = DataConfig(mixture=f"{tmp_path}/some.txt", vocabulary=letters)
    manifest = build_token_store(data, read_vocabulary(letters), tmp_path / "store", workers=1)
    train = manifest["sources"]["some"]["train"]
    assert (train["tokens"], train["unknown"]) == (6, 2)  # with a blank
    settings = Config(
        model=ModelConfig(vocab_size=SIZE),
        data=dataclasses.replace(
            data, mixture=f"pairs:{tmp_path}/pairs.jsonl", inputs_length=16, targets_length=16
        ),
    )
    next(open_batches(settings, "train"))
    assert "pairs.pairs: 20 % of the training tokens stand for characters that the vocabulary" in (
        capsys.readouterr().err
    )


@pytest.fixture
def packed(mixture, vocabulary, tmp_path):
    build_token_store(DataConfig(mixture=mixture), vocabulary, tmp_path / "store", workers=1)
    return tmp_path / "store"


def config(packed, **data):
    defaults = dict(mixture="text0", inputs_length=64, targets_length=20, batch_size=8)
    defaults["mixture"] = next(iter(json.loads((packed / "manifest.json").read_text())["sources"]))
    settings = defaults | {"data_dir": str(packed)} | data
    return Config(model=ModelConfig(vocab_size=SIZE), data=DataConfig(**settings))


def test_damaged_files_are_refused(packed):
    folder = packed / config(packed).data.mixture / "train"
    tokens = folder / "00003.tokens"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"00003\.tokens' is damaged"):
        open_batches(config(packed), "train")
    tokens.write_bytes(whole)
    next(open_batches(config(packed), "train"))
    manifest = packed / "manifest.json"
    content = json.loads(manifest.read_text())
    for wrong in (
        *("{", "[]", "[" * 10**5, "7", json.dumps(content | {"format": 99})),
        json.dumps(content | {"sources": ["text"]}),
        manifest.read_text().replace('"documents": 60', '"documents": 61'),
        manifest.read_text().replace(content["text"], content["text"][::-1]),
    ):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match=r"is damaged \(.*\); delete the folder"):
            TokenStore(packed)


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["00003.tokens", "00003.offsets.npy", "00003.checksums"])
def test_a_flipped_bit_is_an_error_when_it_is_read(packed, file):
    name = config(packed).data.mixture
    path = packed / name / "train" / file
    flip_bit(path, -3)
    tokens = TokenStore(packed).tokens(name, "train")
    with pytest.raises(UserError, match=r"00003\..*is damaged; delete the folder and pack again"):
        _ = tokens.offsets
        tokens.take(np.array([0]), len(tokens))
    flip_bit(path, -3)
    tokens = TokenStore(packed).tokens(name, "train")
    assert len(tokens.take(np.array([0]), len(tokens))[0]) == tokens.offsets[-1]


def test_ids_past_the_vocabulary_and_older_stores(packed):
    """A store of format 4 has no checksums."""
    name = config(packed).data.mixture
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(manifest | {"format": 4}))
    batch = next(open_batches(config(packed), "train"))
    path = packed / name / "train" / "00000.tokens"
    wrong = np.fromfile(path, np.uint16)
    wrong[5] = SIZE
    wrong.tofile(path)
    tokens = TokenStore(packed).tokens(name, "train")
    assert batch["encoder_input_tokens"].any() and tokens.take(np.array([6]), 9).any()
    with pytest.raises(UserError, match=f"the id {SIZE}, past its vocabulary"):
        tokens.take(np.array([0]), 9)


def test_names_and_links_out_of_a_store_are_refused(packed):
    manifest = (packed / "manifest.json").read_text()
    name = config(packed).data.mixture
    for outside in ("../other", "/etc"):
        write_manifest(packed, json.loads(manifest.replace(f'"{name}"', f'"{outside}"')))
        with pytest.raises(UserError, match="outside of it; do not use it"):
            TokenStore(packed).tokens(outside, "train")
    (packed / "manifest.json").write_text(manifest)
    (packed / name / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link', which leads to /etc/passwd"):
        TokenStore(packed)


def test_offsets_whose_header_claims_far_more_numbers_are_damaged(packed):
    name = config(packed).data.mixture
    path = packed / name / "train" / "00000.offsets.npy"
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**45,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(80))
    with pytest.raises(UserError, match=r"00000\.offsets\.npy' is damaged"):
        _ = TokenStore(packed).tokens(name, "train").offsets


def test_a_named_store_must_exist_and_have_the_vocabulary(packed, tmp_path):
    with pytest.raises(UserError, match=r"'text'.* is not known|names text"):
        open_batches(config(packed, mixture="text"), "train")
    with pytest.raises(UserError, match="packed with another vocabulary than 'bytes'"):
        open_batches(config(packed, vocabulary="bytes"), "train")
    with pytest.raises(UserError, match=r"no/such.*does not exist"):
        open_batches(config(packed, data_dir="/no/such"), "train")


def test_batches_that_no_memory_holds_are_refused_before_they_are_made(packed):
    for sizes in ({"batch_size": 10**12}, {"inputs_length": 10**9, "targets_length": 10**12}):
        with pytest.raises(UserError, match=r"A batch takes [\d,]+ GiB, more than this host's"):
            open_batches(config(packed, **sizes), "train")


def test_large_text_is_not_packed_automatically(mixture, vocabulary, monkeypatch):
    monkeypatch.setattr(open_store_module, "_MAX_AUTOMATIC", 1000)
    with pytest.raises(UserError, match=r"GiB of text; pack it once with `switch-jax data pack`"):
        open_store(DataConfig(mixture=mixture), vocabulary)


def test_only_the_sources_of_the_mixture_are_read(vocabulary, tmp_path):
    parts = []
    for name, text in (("a", "aaaa "), ("b", "bbbb ")):
        runs.write_text(tmp_path / name, train=[text * 40] * 30, validation=[text * 40])
        parts.append(f"{tmp_path}/{name}/{{split}}.jsonl")
        for split in ("train", "validation"):
            os.rename(tmp_path / name / f"text-{split}.jsonl", tmp_path / name / f"{split}.jsonl")
    build_token_store(
        DataConfig(mixture=",".join(parts)), vocabulary, tmp_path / "store", workers=1
    )
    settings = Config(
        model=ModelConfig(vocab_size=SIZE),
        data=DataConfig(
            mixture="b", data_dir=str(tmp_path / "store"), inputs_length=32, targets_length=11
        ),
    )
    ids = next(open_batches(settings, "train"))["encoder_input_tokens"]
    text = re.sub(r"<extra_id_\d+>", "", vocabulary.decode(ids[0]))
    assert "b" in text and set(text) <= set("b ")
    assert Path(tmp_path / "store" / "a" / "train" / "00000.tokens").is_file()
