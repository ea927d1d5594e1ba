"""Filling the blanks of texts."""

import pytest

from switch_jax.config import Config
from switch_jax.inference.prompts import Prompt, PromptCodec
from tests.support.configs import tiny
from tests.support.words import WordVocabulary

WORDS = WordVocabulary(
    ("<pad>", "</s>", "import", "as", "np", "numpy", "<extra_id_1>", "<extra_id_0>", "___")
)


@pytest.mark.parametrize(
    "text, output, filled",
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
def test_blanks_are_filled_and_other_texts_get_the_output(text, output, filled):
    codec = PromptCodec(Config(), WORDS)
    assert codec.decode(codec.encode(Prompt(text)), WORDS.encode(output)) == filled


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
def test_models_of_tasks_are_asked_the_text_as_it_stands(mixture, fills):
    codec = PromptCodec(tiny(**{"data.mixture": mixture}), WORDS)
    encoded = codec.encode(Prompt("import ___ np"))
    expected = "import <extra_id_0> np" if fills else "import ___ np"
    assert WORDS.decode(encoded.source) == encoded.text == expected
    assert codec.decode(encoded, WORDS.encode("numpy </s>")) == "numpy"
    assert PromptCodec(tiny(), WORDS, fill_blanks=not fills).fill_blanks is not fills
