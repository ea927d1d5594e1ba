"""`python_docs` and `python_packages`: documents, splits, order and fingerprint."""

import os
import subprocess
import sys

import pytest

from switch_jax.data.sources import python_text
from switch_jax.data.sources.python_text import (
    PYTHON_TEXTS,
    Document,
    PythonTextSource,
    _topics,
    is_held_out_path,
    python_documents,
)
from switch_jax.data.sources.source import SPLITS


@pytest.mark.parametrize(
    "name, smallest, largest", [("python_docs", 5e6, 2e7), ("python_packages", 3e7, 7e7)]
)
def test_documents_are_unique_and_have_the_documented_size(name, smallest, largest):
    paths = [d.path for d in python_documents(name)]
    texts = [d.text for d in python_documents(name)]
    assert len(set(paths)) == len(paths) and len(set(texts)) == len(texts)
    assert smallest < sum(map(len, texts)) <= largest
    assert 0.02 < sum(map(is_held_out_path, paths)) / len(paths) < 0.09


def test_python_docs_are_of_the_standard_library():
    paths = [d.path for d in python_documents()]
    assert any(p.startswith("topics/") for p in paths)
    assert "library/json/__init__.py" in paths
    assert not any("/test/" in p or "site-packages" in p or "sysconfigdata" in p for p in paths)


def test_python_packages_are_mixed_and_have_none_of_our_own_files():
    packages = [d.path.split("/")[1] for d in python_documents("python_packages")]
    assert len(set(packages[:100])) > 5
    assert "switch_jax" not in packages


@pytest.mark.parametrize("name", PYTHON_TEXTS)
def test_splits_are_disjoint_and_contain_every_document(name):
    source = PythonTextSource(name)
    splits = [list(source.texts(s, shard, None)) for s in SPLITS for shard in source.shards(s)]
    assert sorted(splits[0] + splits[1]) == sorted(d.text for d in python_documents(name))
    assert [len(texts) for texts in splits] == [source.num_documents(split) for split in SPLITS]
    assert set(splits[1]) == {d.text for d in python_documents(name) if is_held_out_path(d.path)}


@pytest.mark.parametrize("name", PYTHON_TEXTS)
def test_order_and_fingerprint_do_not_depend_on_the_process(name):
    code = (
        "from switch_jax.data.sources.python_text import PythonTextSource, python_documents;"
        f"print(PythonTextSource('{name}').fingerprint, python_documents('{name}')[7].path)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == [PythonTextSource(name).fingerprint, python_documents(name)[7].path]


def test_fingerprint_depends_on_paths_and_texts(monkeypatch):
    def fingerprint(*documents):
        replaced = tuple(Document(*document) for document in documents)
        monkeypatch.setattr(python_text, "python_documents", lambda name: replaced)
        return PythonTextSource("python_docs").fingerprint

    contents = [("a", "b")], [("ab", "")], [("a", "b"), ("ab", "")], [("a", "bab")]
    assert len({fingerprint(*content) for content in contents}) == 4


def test_package_files_are_read_up_to_a_length(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    for name, text in {"a": "x" * 40, "b": "y" * 40, "same": "x" * 40, "long": "z" * 200}.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    (tmp_path / "outside.py").write_text("w")
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(python_text, "_LONGEST_FILE", 100)

    def texts(length):
        monkeypatch.setattr(python_text, "_PACKAGES_LENGTH", length)
        return {d.text for d in python_documents.__wrapped__("python_packages")}

    assert texts(100) == {"x" * 40, "y" * 40}
    assert len(texts(79)) == 1


def test_missing_topics_are_ignored(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert not list(_topics())
