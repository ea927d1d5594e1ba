"""Copies what sweeps came to into docs/results.md, and their figures to docs/images/results.

    python scripts/docs/results.py runs/experts_mini runs/routing …

The name of a sweep's folder is that of its place in the document.
"""

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images" / "results"


def block(folder: Path) -> str:
    """The summary of a sweep without its title, as part of a section, its images copied."""
    _, _, text = (folder / "summary.md").read_text().partition("\n\n")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in re.findall(r"\]\(figures/(.*?)\)", text):
        shutil.copy(folder / "figures" / name, IMAGES / f"{folder.name}_{name}")
    text = text.replace("](figures/", f"](images/results/{folder.name}_")
    return re.sub("^## ", "#### ", text, flags=re.MULTILINE).strip()


def replaced(document: str, name: str, content: str) -> str:
    """The document with other content in the place of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{DOCUMENT} has no place between {begin.strip()} and {end}.")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of sweeps")
    text = DOCUMENT.read_text()
    for folder in parser.parse_args().folders:
        text = replaced(text, folder.resolve().name, block(folder.resolve()))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
