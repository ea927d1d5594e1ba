"""Requirements in setup.cfg: each library that the package imports is declared."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from tests.support.paths import ROOT

ALWAYS = ("jax", "numpy")  # of `install_requires`, to see that it was read


def imported_packages() -> set[str]:
    """Returns the top-level names of all imports of other packages, also inside functions."""
    nodes = (
        node
        for path in (ROOT / "switch_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    return {
        name.partition(".")[0]
        for node in nodes
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    } - {"switch_jax", *sys.stdlib_module_names}


def declared() -> Iterator[str]:
    """Yields the normalised names of the distributions in setup.cfg, of extras for users, too."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = {**setup["options.extras_require"]}
    del extras["test"], extras["docs"]
    for line in "\n".join([setup["options"]["install_requires"], *extras.values()]).splitlines():
        if found := re.match(r"[\w.-]+", line):
            yield normalized(found[0])


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_library_is_declared():
    known = set(declared())
    assert known.issuperset(ALWAYS)
    distributions = metadata.packages_distributions()
    missing = {
        name
        for name in imported_packages()
        if known.isdisjoint(map(normalized, distributions.get(name, [name])))
    }
    assert not missing
