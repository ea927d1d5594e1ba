"""Plain values become the types of a dataclass, or a sentence names file and key."""

import dataclasses
from typing import Any, Literal

import pytest

from switch_jax.config import build_dataclass, parse_json, read_json
from switch_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int
    cols: int = 1


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    used: bool = True
    shape: Shape | None = None
    shapes: list[Shape] = dataclasses.field(default_factory=list)
    lengths: tuple[int, ...] = ()
    ids: int | list[int] | None = None
    by_name: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None


def test_nested_values_become_a_dataclass():
    raw = {
        "name": "x",
        "rate": 2,
        "shape": {"rows": 3},
        "shapes": [{"rows": 1, "cols": 2}],
        "lengths": [4, 5],
        "ids": [6],
        "by_name": {"y": 7},
        "anything": [None, {}],
    }
    assert build_dataclass(Record, raw, "f.json") == Record(
        *("x", 2.0, "a", True, Shape(3), [Shape(1, 2)], (4, 5), [6], {"y": 7.0}, [None, {}])
    )
    other = {"name": "x", "other": 1, "shape": {"rows": 3, "other": 2}}
    assert build_dataclass(Record, other, ignore_unknown=True) == Record("x", shape=Shape(3))


@pytest.mark.parametrize(
    "raw, sentence",
    [
        ([1], "f.json: the whole must be a group of keys, not [1]."),
        ({}, "f.json lacks the key 'name'; add it."),
        ({"name": 1}, "f.json: name must be a text, not 1."),
        ({"name": None}, "f.json: name must be a text, not None."),
        ({"name": "x", "nam": 1}, "f.json has no key 'nam'; did you mean 'name'?"),
        ({"name": "x", "used": 1}, "f.json: used must be True or False, not 1."),
        ({"name": "x", "rate": True}, "f.json: rate must be a number, not True."),
        ({"name": "x", "rate": 1e999}, "f.json: rate must be a number, not inf."),
        ({"name": "x", "kind": "c"}, "f.json: kind must be one of a, b, not 'c'."),
        ({"name": "x", "kind": []}, "f.json: kind must be one of a, b, not []."),
        ({"name": "x", "shape": {}}, "f.json lacks the key 'shape.rows'; add it."),
        ({"name": "x", "shape": 3}, "f.json: shape must be a group of keys, not 3."),
        ({"name": "x", "shapes": [{"rows": "1"}]}, "f.json: shapes[0].rows must be a whole number"),
        ({"name": "x", "shapes": {}}, "f.json: shapes must be a list, not {}."),
        ({"name": "x", "lengths": [1, 2.5]}, "f.json: lengths[1] must be a whole number, not 2.5."),
        ({"name": "x", "lengths": [2**63]}, "f.json: lengths[0] must be a whole number of 64 bits"),
        ({"name": "x", "ids": "7"}, "f.json: ids must be a whole number or a list, not '7'."),
        ({"name": "x", "by_name": []}, "f.json: by_name must be a group of keys, not []."),
        ({"name": "x", "by_name": {"y": []}}, "f.json: by_name.y must be a number, not []."),
    ],
)
def test_a_value_of_another_type_is_named(raw, sentence):
    with pytest.raises(UserError) as error:
        build_dataclass(Record, raw, "f.json")
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not JSON (Expecting value in line 1, column 1)"),
        (b'{"a": 1,\n x}', "in line 2, column 2"),
        (b'{"a": "\xff"}', "is not UTF-8 text (byte 7 is 0xff)"),
        (b'{"a": [1, NaN]}', "key 'a[1]' is nan"),
        (b'{"a": {"b": -Infinity}}', "key 'a.b' is -inf"),
        (b'{"a": 1e999}', "key 'a' is inf"),
        (b'{"a": 9223372036854775808}', "key 'a' is more than 64 bits hold"),
        (b"1" * 5000, "not JSON as expected"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        (b'{"a": "\\ud800"}', "key 'a' has a text that is not Unicode"),
        (b"[" * 66 + b"]" * 66, "more than 64 deep"),
        (b"[" * 10**5, "more than 64 deep"),
    ],
)
def test_bad_json_is_a_sentence(content, words):
    with pytest.raises(UserError) as error:
        parse_json(content, "f.json")
    assert str(error.value).startswith("f.json") and words in str(error.value)


def test_a_json_file_is_read_or_a_sentence(tmp_path):
    file = tmp_path / "f.json"
    with pytest.raises(UserError, match="does not exist"):
        read_json(file)
    with pytest.raises(UserError, match="is not a file"):
        read_json(tmp_path)
    file.write_text('{"é": [9223372036854775807, 1e300]}', "utf-8")
    assert read_json(file) == {"é": [2**63 - 1, 1e300]}
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_json(file, max_bytes=10)
