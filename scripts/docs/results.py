"""Copies the summaries of sweeps into docs/results.md, and their figures to docs/images/results.

    python scripts/docs/results.py runs/experts_mini runs/routing …

A summary replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->` in the document; NAME
is the name of the sweep's folder.
"""

import argparse
import re
import shutil
from pathlib import Path
from urllib.parse import quote, unquote

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images" / "results"


def section(folder: Path) -> str:
    """Returns the summary of a sweep without its title; copies its images."""
    _, _, text = (folder / "summary.md").read_text().partition("\n\n")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in map(unquote, re.findall(r"\]\(figures/(.*?)\)", text)):
        shutil.copy(folder / "figures" / name, IMAGES / f"{folder.name}_{name}")
    text = text.replace("](figures/", f"](images/results/{quote(folder.name)}_")
    return re.sub("^## ", "#### ", text, flags=re.MULTILINE).strip()


def replace_section(document: str, name: str, content: str) -> str:
    """Returns the document with other content between the comments of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, begin_found, rest = document.partition(begin)
    _, end_found, after = rest.partition(end)
    if not (begin_found and end_found):
        raise SystemExit(f"{DOCUMENT} has no place between {begin.strip()} and {end}.")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def main() -> None:
    """Copies the summary of every folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of sweeps")
    text = DOCUMENT.read_text()
    for folder in parser.parse_args().folders:
        text = replace_section(text, folder.resolve().name, section(folder.resolve()))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
