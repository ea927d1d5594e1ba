"""switch_jax.data.corpus: the built-in mixture, its order, split and fingerprint."""

import os
import subprocess
import sys

import pytest

from switch_jax.data import corpus
from switch_jax.data.corpus import Document, documents
from switch_jax.errors import UserError


def test_python_docs_is_a_few_megabytes_of_unique_documents():
    train, validation = (list(documents("python_docs", split)) for split in corpus.SPLITS)
    paths = [d.path for d in train + validation]
    texts = [d.text for d in train + validation]
    assert len(set(paths)) == len(paths) and len(set(texts)) == len(texts)
    assert 5e6 < sum(map(len, texts)) < 2e7
    assert 0.02 < len(validation) / len(paths) < 0.09
    assert any(p.startswith("topics/") for p in paths)
    assert "library/json/__init__.py" in paths
    assert not any("/test/" in p or "site-packages" in p or "sysconfigdata" in p for p in paths)


def test_the_split_depends_on_the_path_alone():
    for split in corpus.SPLITS:
        for document in documents("python_docs", split):
            assert corpus.held_out(document.path) == (split == "validation")
    assert corpus.held_out("library/abc.py") == corpus.held_out("library/abc.py")


def test_order_and_fingerprint_are_the_same_in_another_process():
    code = (
        "from switch_jax.data import corpus;"
        "print(corpus.fingerprint('python_docs'), corpus.documents('python_docs', 'train')[7].path)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    here = (corpus.fingerprint("python_docs"), list(documents("python_docs", "train"))[7].path)
    assert output.split() == list(here)


def test_the_fingerprint_changes_with_paths_texts_and_splits(monkeypatch):
    def fingerprint(**splits):
        monkeypatch.setitem(corpus.MIXTURES, "tiny", lambda split: splits[split])
        return corpus.fingerprint("tiny")

    a, b = Document("a", "b"), Document("ab", "")
    prints = {
        fingerprint(train=train, validation=validation)
        for train, validation in (([a], []), ([], [a]), ([b], []), ([a, b], []), ([b, a], []))
    }
    assert len(prints) == 5


def test_an_unknown_mixture_is_told_the_known_ones():
    with pytest.raises(UserError, match=r"'c5'.*python_docs"):
        documents("c5", "train")


def test_a_python_without_topics_still_has_sources(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert not list(corpus._topics())
