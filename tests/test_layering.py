"""Layering of the package: wings import only from the wings below them, and through their doors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "switch_jax"
# Bottom up; names of one line do not import each other.
ORDER = (
    ("errors",),
    ("files",),
    ("config",),
    ("distributed", "data"),
    ("model",),
    ("checkpoint", "inference"),
    ("evaluation",),
    ("training", "analysis"),
    ("performance", "sweeps"),
    ("cli",),
)
LEVEL = {wing: level for level, wings in enumerate(ORDER) for wing in wings}
# Of the extras in setup.cfg.
OPTIONAL = (
    *(
        "apache_beam",
        "datasets",
        "google_crc32c",
        "importlib_resources",
        "matplotlib",
        "mlflow",
        "pyarrow",
    ),
    *("rouge_score", "safetensors", "seqio", "tensorflow_datasets", "trackio", "wandb"),
    "zstandard",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yields module, name and line of every import of this package, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("switch_jax"):
            for alias in node.names:
                yield node.module or "", alias.name, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("switch_jax"):
                    yield alias.name, "", node.lineno


def fault(path: Path, module: str, name: str) -> str | None:
    """Returns the fault of an import; None where it is allowed."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    _, wing, *inside = [*module.split("."), "", ""][:3] if module != "switch_jax" else ["", "", ""]
    if not wing:
        return None if name == "__version__" else "imports the package"
    if wing == own:
        is_file = (PACKAGE / wing / f"{name}.py").exists() or (PACKAGE / wing / name).is_dir()
        return None if any(inside) or is_file else "imports its own wing's door"
    if LEVEL[wing] >= LEVEL[own]:
        return f"{own} must not import {wing}"
    return f"does not use the door of {wing}" if any(inside) else None


def test_every_name_at_the_top_has_a_level():
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert top - {"__init__", "__main__", "__pycache__"} == set(LEVEL)
    assert len(top - {"__pycache__"}) <= 16


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_through_doors(path):
    found = [
        (line, module, name, fault(path, module, name)) for module, name, line in imports(path)
    ]
    assert not [one for one in found if one[-1] is not None]


def test_files_of_a_wing_import_each_other_in_no_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    needs = {
        module: {m if m in modules else f"{m}.{name}" for m, name, _ in imports(path)}
        & modules.keys()
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    while free := [module for module, needed in needs.items() if not needed & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs


def test_a_door_only_re_exports():
    for wing in LEVEL.keys() - {"errors"}:
        door = ast.parse((PACKAGE / wing / "__init__.py").read_text())
        assert ast.get_docstring(door), wing
        kinds = {type(node) for node in door.body[1:]}
        assert kinds <= {ast.ImportFrom, ast.Assign}, wing
        exported = {
            alias.name for n in door.body if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        assert exported == set(ast.literal_eval(door.body[-1].value)), wing


def imported_libraries(wings: tuple[str, ...], blocked: tuple[str, ...] = ()) -> list[set[str]]:
    """Imports wing after wing in a process; returns the heavy libraries imported after each.

    Args:
      blocked: packages that cannot be imported there.
    """
    heavy = {"jax", "numpy", "ml_collections", "tensorflow", "seqio", "matplotlib"}
    code = f"import importlib, sys\nfor name in {blocked}:\n    sys.modules[name] = None\n"
    for wing in wings:
        code += f"importlib.import_module('switch_jax.{wing}')\n"
        code += f"print(*sorted(name for name in {heavy} if sys.modules.get(name)))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_heavy_libraries_are_imported_late():
    cli, config, data, *others = imported_libraries(
        ("cli", "config", "data", "training", "performance", "sweeps")
    )
    assert cli == set()
    assert config <= {"ml_collections"}
    assert not data & {"jax", "tensorflow", "seqio", "matplotlib"}
    assert all(not libraries & {"tensorflow", "seqio", "matplotlib"} for libraries in others)


def test_every_wing_is_imported_without_the_packages_of_extras():
    assert imported_libraries(tuple(LEVEL), blocked=OPTIONAL)
