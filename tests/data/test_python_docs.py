"""`python_docs`: documents, splits, order and fingerprint."""

import os
import subprocess
import sys

from switch_jax.data.sources import python_docs
from switch_jax.data.sources.python_docs import (
    Document,
    PythonDocsSource,
    _topics,
    is_held_out_path,
    python_documents,
)
from switch_jax.data.sources.source import SPLITS


def test_documents_are_unique_and_have_a_few_megabytes():
    paths = [d.path for d in python_documents()]
    texts = [d.text for d in python_documents()]
    assert len(set(paths)) == len(paths) and len(set(texts)) == len(texts)
    assert 5e6 < sum(map(len, texts)) < 2e7
    assert 0.02 < sum(map(is_held_out_path, paths)) / len(paths) < 0.09
    assert any(p.startswith("topics/") for p in paths)
    assert "library/json/__init__.py" in paths
    assert not any("/test/" in p or "site-packages" in p or "sysconfigdata" in p for p in paths)


def test_splits_are_disjoint_and_contain_every_document():
    source = PythonDocsSource()
    splits = [list(source.texts(s, shard, None)) for s in SPLITS for shard in source.shards(s)]
    assert sorted(splits[0] + splits[1]) == sorted(d.text for d in python_documents())
    assert [len(texts) for texts in splits] == [source.num_documents(split) for split in SPLITS]
    assert set(splits[1]) == {d.text for d in python_documents() if is_held_out_path(d.path)}


def test_order_and_fingerprint_do_not_depend_on_the_process():
    code = (
        "from switch_jax.data.sources.python_docs import PythonDocsSource, python_documents;"
        "print(PythonDocsSource().fingerprint, python_documents()[7].path)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == [PythonDocsSource().fingerprint, python_documents()[7].path]


def test_fingerprint_depends_on_paths_and_texts(monkeypatch):
    def fingerprint(*documents):
        replaced = tuple(Document(*document) for document in documents)
        monkeypatch.setattr(python_docs, "python_documents", lambda: replaced)
        return PythonDocsSource().fingerprint

    contents = [("a", "b")], [("ab", "")], [("a", "b"), ("ab", "")], [("a", "bab")]
    assert len({fingerprint(*content) for content in contents}) == 4


def test_missing_topics_are_ignored(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert not list(_topics())
