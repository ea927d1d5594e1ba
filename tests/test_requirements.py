"""Requirements in setup.cfg: each library that the package imports is declared."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from tests.support.paths import ROOT

ALWAYS = ("jax", "numpy")  # of `install_requires`, to see that it was read


def imported_modules() -> Iterator[str]:
    """Yields the names of all modules that the package imports, also inside functions."""
    for path in (ROOT / "switch_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""


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
    packages = {name.partition(".")[0] for name in imported_modules()}
    missing = {
        name
        for name in packages - {"switch_jax", *sys.stdlib_module_names}
        if known.isdisjoint(map(normalized, distributions.get(name, [name])))
    }
    assert not missing
