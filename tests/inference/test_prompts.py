"""Prompts: what a codec refuses, and files of prompts."""

import json

import pytest

from switch_jax.config import Config
from switch_jax.data.vocabulary import parse_vocabulary
from switch_jax.errors import UserError
from switch_jax.inference.prompt_file import read_prompts
from switch_jax.inference.prompts import Prompt, PromptCodec
from tests.support.words import WordVocabulary

WORDS = WordVocabulary(("<pad>", "</s>", "a", "b", "<extra_id_0>", "<extra_id_1>", "___"))
BYTES = parse_vocabulary("bytes", b"bytes")


@pytest.mark.parametrize(
    "vocabulary, prompt, words",
    [
        (WORDS, Prompt("___ ___ ___"), "The text has more blanks than the vocabulary has"),
        (WORDS, Prompt("a ___", "b", "f.jsonl, line 3"), "f.jsonl, line 3 has blanks and a prefix"),
        (WORDS, Prompt("a", "a b a b"), "a prefix of 4 tokens, and max_length=4 must be more"),
        (WORDS, Prompt("a", "a  b"), "'a  b', which the vocabulary writes as 'a b'"),
        (WORDS, Prompt("a", "a </s> b"), "'a </s> b', which the vocabulary writes as 'a b'"),
        (BYTES, Prompt("a", "ab "), "'ab ', which the vocabulary writes as 'ab'"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_sentence(vocabulary, prompt, words):
    with pytest.raises(UserError) as error:
        PromptCodec(Config(), vocabulary, max_length=4).encode(prompt)
    assert words in str(error.value) and str(error.value).count(". ") == 0


def test_a_blank_beside_a_prefix_is_text_where_blanks_are_not_filled():
    encoded = PromptCodec(Config(), WORDS, fill_blanks=False).encode(Prompt("a ___", "b a"))
    assert encoded.prefix == [3, 2] and encoded.source == [2, 6, 1]


def test_every_line_of_a_text_file_is_a_prompt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\r\n\nthird\u2028line\n".encode())
    records = read_prompts(path, "so")
    assert [r.fields for r in records] == [{"text": t} for t in ("first", "", "third\u2028line")]
    assert records[2].prompt == Prompt("third\u2028line", "so", f"{path}, line 3")


def test_json_lines_keep_their_fields(tmp_path):
    objects = [
        {"id": 7, "text": "a ___", "more": [1.5, None, {"ä": "€"}]},
        {"inputs": "b", "targets": "c", "prefix": "d"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(o) + "\n" for o in objects))  # a blank line between
    records = read_prompts(path)
    assert [record.fields for record in records] == objects
    assert [record.prompt for record in records] == [
        Prompt("a ___", "", f"{path}, line 1"),
        Prompt("b", "d", f"{path}, line 3"),
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{'text': 1}", "line 2 is not JSON"),
        (b'{"text": "a"', "line 2 is not JSON"),
        (b'["a"]', "line 2 is no JSON object"),
        (b"{}", "line 2 has neither `text` nor `inputs`"),
        (b'{"text": "a", "inputs": "b"}', "line 2 has both `text` and `inputs`"),
        (b'{"text": 1}', "line 2: text is no text"),
        (b'{"inputs": null}', "line 2: inputs is no text"),
        (b'{"text": "a", "prefix": ["b"]}', "line 2: prefix is no text"),
        (b'{"text": "a", "text": "b"}', "line 2 is not JSON as expected (key 'text'"),
        (b'{"text": "a", "x": NaN}', "line 2: key 'x' is nan"),
        (b'{"text": "\\ud800"}', "line 2: key 'text' has a text that is not Unicode"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 text"),
    ],
)
def test_broken_json_lines_are_one_sentence_with_their_number(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_one_prefix_for_all_excludes_prefixes_of_objects(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "prefix": "b"}\n')
    with pytest.raises(UserError, match="line 1 has a prefix of its own"):
        read_prompts(path, "c")
    path.write_text("\n \n")
    with pytest.raises(UserError, match="has no JSON objects"):
        read_prompts(path)
