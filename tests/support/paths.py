"""Folders of the repository that tests read, and a name that a path may have."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"
GOLDEN = ROOT / "tests" / "golden"

# What URLs, patterns, shells, markup and our own grammar of sources would read as something else.
ODD_NAME = "a%20b#c?[1] \\*|'\"é,=:{split}\n$x"


def file_contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
