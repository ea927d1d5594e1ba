"""Presets: lookup of the config files that ship with the package."""

import contextlib
import difflib
import runpy
import sys
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
    if path.is_file():
        return path
    preset = presets_folder() / f"{name}.py"
    if not path.is_absolute() and preset.is_file():
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


def run_config_file(path: Path) -> dict[str, Any]:
    """Runs a config file and returns its globals.

    It may import the modules beside it, as a script may.
    """
    with _importable(path.resolve().parent):
        return runpy.run_path(str(path))


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
