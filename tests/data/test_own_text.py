"""One's own text: folders, formats, fields and small corpora."""

import bz2
import csv
import gzip
import json
import lzma

import pytest

from switch_jax.config import DataConfig
from switch_jax.data.catalog import sources_for_spec
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.vocabulary import read_vocabulary
from switch_jax.errors import UserError
from tests.support import tasks as miniature
from tests.support.sources import texts_of

TEXTS = [f"text {i}, «{'é' * i}» and a comma" for i in range(20)]


def write_csv(path, texts, field="text"):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", field])
        writer.writerows(enumerate(texts))


def json_array(texts):
    return json.dumps([{"text": text} for text in texts], indent=2).encode()


FILES = {
    "a.json": json_array,
    "b.json.bz2": lambda texts: bz2.compress(json_array(texts)),
    "c.json.xz": lambda texts: lzma.compress(json_array(texts)),
    "d.json.gz": lambda texts: gzip.compress(json_array(texts)),
    "e.txt.xz": lambda texts: lzma.compress("\n\n".join(texts).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_the_same_texts(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name](TEXTS))
    found = texts_of(tmp_path / name)
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)


def test_tables_and_other_fields(tmp_path):
    write_csv(tmp_path / "a.csv", TEXTS)
    expected = texts_of(tmp_path / "a.csv")
    assert sorted(expected["train"] + expected["validation"]) == sorted(TEXTS)
    write_csv(tmp_path / "b.csv", TEXTS, "content")
    assert texts_of(tmp_path / "b.csv", text_field="content") == expected
    with pytest.raises(UserError, match=r"1 \(it has 'number', 'content'\) is without a text"):
        texts_of(tmp_path / "b.csv")


def test_a_folder_stands_for_all_files_below_it(tmp_path):
    for i, folder in enumerate(("corpus/new", "corpus/old/1", "corpus/.git")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{i}.txt").write_text("\n\n".join(TEXTS[10 * i : 10 * i + 10]))
    (tmp_path / "corpus" / "README.md").write_text("no text")
    (tmp_path / "corpus" / ".git" / "x.txt").write_text("hidden")
    found = texts_of(f"{tmp_path}/corpus/")
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert sources_for_spec(f"{tmp_path}/corpus/", DataConfig())[0].name == "corpus"
    with pytest.raises(UserError, match=r"no file matches .*; name files that exist, or a folder"):
        texts_of(tmp_path / "corpus" / ".git" / "hooks")


def test_plain_text_is_read_by_paragraphs_or_by_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  \nthree\r\nfour")
    paragraphs, lines = ({"one\ntwo", "three\nfour"}, {"one", "two", "three", "four"})
    for documents, expected in (("paragraphs", paragraphs), ("lines", lines)):
        found = texts_of(tmp_path / "a.txt", documents=documents)
        assert {*found["train"], *found["validation"]} == expected
    sources = [
        sources_for_spec(str(tmp_path / "a.txt"), DataConfig(documents=documents))[0]
        for documents in ("paragraphs", "lines")
    ]
    assert sources[0].fingerprint != sources[1].fingerprint


@pytest.mark.parametrize("count", [2, 3, 20])
def test_small_corpora_hold_out_at_least_one_document(count, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS[:count]))
    found = texts_of(tmp_path / "a.txt")
    assert found["train"] and found["validation"]
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS[:count])
    pairs = [{"inputs": text, "targets": text} for text in TEXTS[:count]]
    miniature.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    found = texts_of(f"pairs:{tmp_path}/pairs.jsonl")
    assert found["train"] and found["validation"]
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS[:count] * 2)


def test_a_single_document_is_validated_on_and_said_so(tmp_path, capsys):
    (tmp_path / "book.txt").write_text(TEXTS[3])
    assert texts_of(tmp_path / "book.txt") == {"train": [TEXTS[3]], "validation": [TEXTS[3]]}
    data = DataConfig(mixture=str(tmp_path / "book.txt"))
    build_token_store(data, read_vocabulary("bytes"), tmp_path / "store", workers=1)
    assert "book has a single document: validation uses the" in capsys.readouterr().err
