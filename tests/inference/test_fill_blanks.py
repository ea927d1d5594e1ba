"""Filling the blanks of texts, in batches, and the texts that `generate` refuses."""

import types

import numpy as np
import pytest

from switch_jax.cli.main import main
from switch_jax.config import Config
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from switch_jax.inference.decoding import SamplingOptions, Sequences
from switch_jax.inference.fill_blanks import complete_texts
from tests.support.configs import tiny

MODEL = types.SimpleNamespace(config=Config())


class Words:
    """A vocabulary of words, with sentinels."""

    words = ("<pad>", "</s>", "import", "as", "np", "numpy", "<extra_id_1>", "<extra_id_0>", "___")
    sentinels = (7, 6)

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids if i > EOS)


@pytest.mark.parametrize(
    "text, answer, filled",
    [
        ("import ___ as np", "<extra_id_0> numpy </s>", "import numpy as np"),
        ("import <extra_id_0> as np", "<extra_id_0> numpy </s>", "import numpy as np"),
        ("___ numpy as ___", "<extra_id_0> import <extra_id_1> np </s>", "import numpy as np"),
        ("import ___ as <extra_id_0>", "<extra_id_1> numpy <extra_id_0> np", "import numpy as np"),
        ("import ___ as ___", "<extra_id_0> numpy </s>", "import numpy as ___"),
        # Never the text itself in place of an output.
        ("import ___ as np", "numpy </s>", "numpy"),
        ("import ___ as np", "<extra_id_0> <extra_id_1> </s>", "<extra_id_0> <extra_id_1>"),
        ("import numpy", "as np </s>", "as np"),
    ],
)
def test_blanks_are_filled_and_other_texts_get_the_output(monkeypatch, text, answer, filled):
    words = Words()

    def fake_generate(model, source, max_length, options, first_row):
        return Sequences(np.array([[words.encode(answer)]]), np.zeros((1, 1)))

    monkeypatch.setattr("switch_jax.inference.fill_blanks.generate_with_scores", fake_generate)
    assert list(complete_texts(MODEL, words, [text])) == [filled]


def test_many_texts_are_filled_in_batches_and_in_their_order(monkeypatch):
    """The output of a text is its own first word; the last batch is padded with equal rows."""
    words, calls = Words(), []
    texts = [f"{words.words[2 + i % 4]} ___ as" + " as" * (70 * (i == 40)) for i in range(70)]

    def fake_generate(model, source, max_length, options, first_row):
        calls.append((source.shape, first_row, options.seed))
        assert source.any(1).all()
        answers = [[words.words.index("<extra_id_0>"), row[0], EOS] for row in source]
        return Sequences(np.array(answers)[:, None], np.zeros((len(source), 1)))

    monkeypatch.setattr("switch_jax.inference.fill_blanks.generate_with_scores", fake_generate)
    options = SamplingOptions(seed=4)
    filled = list(complete_texts(MODEL, words, texts, options=options))
    assert filled == [text.replace("___", text.split()[0]) for text in texts]
    assert calls == [((32, 64), 0, 4), ((32, 128), 32, 4), ((32, 64), 64, 4)]
    with pytest.raises(UserError, match=r"more blanks than the vocabulary has sentinels \(2\)"):
        list(complete_texts(MODEL, words, ["___ ___ ___"]))


@pytest.mark.parametrize(
    "mixture, fills",
    [
        ("pairs:/data/{split}.jsonl", False),
        ("glue.rte, pairs.mine", False),
        ("super_glue", False),
        ("python_docs", True),
        ("/text/{split}.jsonl=0.9, squad=0.1", True),
    ],
)
def test_models_of_tasks_are_asked_the_text_as_it_stands(monkeypatch, mixture, fills):
    words = Words()
    seen = []

    def fake_generate(model, source, max_length, options, first_row):
        seen.append(words.decode(source[0][:3]))
        return Sequences(np.array([[words.encode("numpy </s>")]]), np.zeros((1, 1)))

    monkeypatch.setattr("switch_jax.inference.fill_blanks.generate_with_scores", fake_generate)
    model = types.SimpleNamespace(config=tiny(**{"data.mixture": mixture}))
    assert list(complete_texts(model, words, ["import ___ np"])) == ["numpy"]
    assert seen == ["import <extra_id_0> np" if fills else "import ___ np"]


def test_the_command_line_refuses_sampling_with_beams_before_loading(tmp_path, capsys):
    options = ["--beam_size", "2", "--temperature", "1"]
    assert main(["generate", "--workdir", str(tmp_path), "--text", "a ___", *options]) == 2
    assert "beam_size=2" in capsys.readouterr().err


def test_the_command_line_refuses_texts_that_are_not_utf8_before_loading(tmp_path, capsys):
    (tmp_path / "latin1.txt").write_bytes("a café\n".encode("latin-1"))
    for arguments, name in (
        (["--text", "caf\udce9"], "--text"),
        (["--input", str(tmp_path / "latin1.txt")], "latin1.txt"),
    ):
        assert main(["generate", "--workdir", str(tmp_path), *arguments]) == 2
        assert f"{name} is not UTF-8" in capsys.readouterr().err
