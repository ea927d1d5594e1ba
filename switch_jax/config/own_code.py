"""Functions and classes of one's own, which a key names as FILE.py:NAME."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from switch_jax.errors import UserError


def is_own_code(name: str) -> bool:
    """Whether a name is FILE.py:NAME."""
    return ".py:" in name


def load_own_code(key: str, name: str) -> Callable[..., Any]:
    """Returns the function or class of FILE.py:NAME, which `key` names.

    Raises `UserError` if there is none, or the file fails.
    """
    path, attribute = name.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("own_code", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UserError(f"{key}: there is no file {path!r}; name a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{key}: {path} fails ({error!r}); correct it.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{key}: {path} has no function {attribute!r}; add it.")
    return found
