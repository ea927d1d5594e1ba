"""`python_docs` and `python_docstrings`: documents, splits, order and fingerprint."""

import collections
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
    find_docstrings,
    is_held_out_path,
    python_documents,
)
from switch_jax.data.sources.source import SPLITS


@pytest.mark.parametrize(
    "name, smallest, largest", [("python_docs", 5e6, 2e7), ("python_docstrings", 2e7, 2e8)]
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


def test_docstrings_are_found_by_their_quotes():
    long = "Returns the sum of two numbers. " * 5
    text = f'''"""{long}one"""
value = """{long}no docstring"""
class A:
    r"""{long}

        two
    """
    def f(): """{long}no line of its own"""
    def g():
        """Short."""
        """{long}never closed
'''
    assert list(find_docstrings(text)) == [f"{long}one", f"{long}\n\ntwo"]


def test_docstrings_are_of_installed_packages_and_not_our_own():
    packages = {d.path.split("/")[1] for d in python_documents("python_docstrings")}
    assert {"jax", "flax", "numpy"} <= packages and "switch_jax" not in packages


def test_docstrings_of_a_file_are_in_the_same_split():
    documents = python_documents("python_docstrings")
    splits = collections.defaultdict(set)
    for document in documents:
        splits[document.path.partition(":")[0]].add(is_held_out_path(document.path))
    assert len(splits) < len(documents) and all(len(split) == 1 for split in splits.values())


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


def test_missing_topics_are_ignored(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert not list(_topics())
