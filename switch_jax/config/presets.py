"""Presets: lookup of the config files that ship with the package."""

import contextlib
import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switch_jax.errors import UserError


def presets_folder() -> Path:
    """Returns the folder of the presets: `configs/` of a checkout, or its copy in the wheel."""
    package = Path(__file__).parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names(folder: str = "") -> list[str]:
    """Returns the names of the presets in a subfolder, such as `switch_base`, sorted.

    Args:
      folder: a subfolder of the presets, such as `sweeps`.
    """
    root = presets_folder()
    paths = (path for path in (root / folder).glob("*.py") if path.name[0] != "_")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)


def find_config_file(name: str, kind: str, folder: str = "") -> Path:
    """Returns the path of a config file.

    Args:
      name: path of a file, or the name of a preset.
      kind: word for the kind of file in an error, such as "Config".
      folder: subfolder whose presets an error lists.

    Raises `UserError` where `name` is neither a file nor a preset.
    """
    path = Path(name)
    if os.path.isfile(path):
        return path
    preset = presets_folder() / f"{name}.py"
    if not path.is_absolute() and os.path.isfile(preset):
        return preset
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    names = preset_names(folder)
    close = difflib.get_close_matches(path.stem, names, n=1)
    listed = ", ".join(names)
    hint = (
        f"did you mean {close[0]} (of {listed})?" if close else f"name a file or one of {listed}."
    )
    raise UserError(
        f"{kind} file {name!r} does not exist{where}, and no preset has that name; {hint}"
    )


def split_config_spec(spec: str) -> tuple[str, str]:
    """Returns file and argument of `FILE:argument`; a FILE that exists may have colons itself."""
    colons = [index for index, char in enumerate(spec) if char == ":"]
    for end in [len(spec), *reversed(colons)]:
        if os.path.isfile(spec[:end]):
            return spec[:end], spec[end + 1 :]
    file, _, argument = spec.partition(":")
    return file, argument


def is_config_spec(spec: str) -> bool:
    """Whether a text names a config file, `FILE.py` or `FILE.py:argument`, and not a folder."""
    file, _ = split_config_spec(spec)
    return file.endswith(".py") and not os.path.isdir(spec)


def call_config_function(spec: str, function: str, kind: str, folder: str = "") -> Any:
    """Calls a function of a config file with the part of `spec` behind the colon.

    The file may import the modules beside it, as a script may.

    Args:
      spec: `FILE` or `FILE:argument`, where FILE is a path or the name of a preset.
      function: name of the function.
      kind: of config, as errors call it.
      folder: subfolder of the presets of this kind.

    Raises `UserError` where there is no such file, or it fails or lacks the function.
    """
    name, argument = split_config_spec(spec)
    path = find_config_file(name, kind, folder)
    with _importable(path.resolve().parent), _faults_named(path, kind):
        module = runpy.run_path(str(path))
        if not callable(module.get(function)):
            raise UserError(f"{kind} file {name!r} must define {function}(arg='').")
        return module[function](argument)


@contextlib.contextmanager
def _faults_named(path: Path, kind: str) -> Iterator[None]:
    """Turns what the code of a config file raises into a `UserError` that names file and line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):  # the latter is the user's
        raise
    except BaseException as error:  # a file may also raise SystemExit
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f" in line {lines[-1]}" if lines else ""
        reason = " ".join("".join(traceback.format_exception_only(error)[-1:]).split())
        reason = reason if len(reason) < 200 else f"{reason[:200]}…"
        raise UserError(
            f"{kind} file {str(path)!r} fails{where} ({reason.rstrip('.')}); correct it."
        ) from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Makes the modules in `folder` importable, then unloads them: names may recur in others."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder:
                del sys.modules[name]
