"""Folders of the repository that tests read, and a name that a path may have."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"
GOLDEN = ROOT / "tests" / "golden"

# What URLs, patterns, shells, markup and our own grammar of sources would read as something else.
ODD_NAME = "a%20b#c?[1] \\*|'\"é,=:{split}\n$x"
