"""JSON files that somebody else may have made or damaged, read as plain values.

What is read can be relied on: it is UTF-8 and whole, as deep and as long as it may be, names no key
twice, and holds no number that 64 bits do not. Anything else is a `UserError` that names file and
key. `typed_values.build_dataclass` makes a dataclass of it.
"""

import json
import math
from pathlib import Path
from typing import Any

from switch_jax.errors import UserError

_MAX_DEPTH = 64
_MAX_BYTES = 256 * 2**20


def read_json(path: Path, max_bytes: int = _MAX_BYTES) -> Any:
    """Returns the content of a JSON file as plain values.

    Raises `UserError`, which names the file and, where one is at fault, the key.
    """
    try:
        if not path.is_file():
            missing = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {missing}; name a JSON file.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable.") from error
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes; restore it.")
    return parse_json(content, str(path))


def parse_json(content: bytes | str, source: str) -> Any:
    """Returns a JSON text as plain values.

    Args:
      content: the text, in UTF-8 where it is bytes.
      source: where it comes from, as errors call it: a file, perhaps with a line.

    Raises `UserError`, which names the source and, where one is at fault, the key.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {error.start:,} is {error.object[error.start]:#x});"
            " restore it."
        ) from error
    except RecursionError as error:
        raise _too_deep(source) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source} is not JSON ({error.msg} in line {error.lineno}, column {error.colno});"
            " restore it."
        ) from error
    except ValueError as error:  # of `_unique_keys`, or an integer of thousands of digits
        raise UserError(f"{source} is not JSON as expected ({error}); correct it.") from error
    _check_plain(value, source, "", 0)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in unique if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return unique


def _check_plain(value: Any, source: str, key: str, depth: int) -> None:
    """Raises `UserError` for what JSON's grammar lets through and no reader of ours can use."""
    if depth > _MAX_DEPTH:
        raise _too_deep(source)
    where = f"key {key!r}" if key else "the value"
    match value:
        case dict():
            for name, item in value.items():
                _check_plain(name, source, key, depth)
                _check_plain(item, source, f"{key}.{name}" if key else name, depth + 1)
        case list():
            for index, item in enumerate(value):
                _check_plain(item, source, f"{key}[{index}]", depth + 1)
        case int() if not -(2**63) <= value < 2**63:
            raise UserError(f"{source}: {where} is more than 64 bits hold; correct it.")
        case float() if not math.isfinite(value):
            raise UserError(f"{source}: {where} is {value}, which is no number; correct it.")
        case str() if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # one half of a surrogate pair
                raise UserError(
                    f"{source}: {where} has a text that is not Unicode; correct it."
                ) from None


def _too_deep(source: str) -> UserError:
    return UserError(f"{source} has groups in groups, more than {_MAX_DEPTH} deep; restore it.")
