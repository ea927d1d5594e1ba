"""Packs the text of the installed Python packages: data for sweeps of size=gpu and by language.

    python scripts/data/package_text.py [--output runs/packages] [--megabytes 100]

Programming languages replace natural ones, which packages do not contain: Python, type stubs,
Cython, C and C++, and English from licences and descriptions. Small languages are used completely,
and the large ones share the rest. 100 MB are about 25 million tokens, below 60 MiB packed. The
installed packages differ between machines, and so do results; `manifest.json` has the fingerprints.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from switch_jax.cli import main as switch_jax_main

ROOT = Path(__file__).parents[2]
LANGUAGES = {
    "python": {".py"},
    "c": {".c", ".cc", ".cpp", ".h", ".hpp", ".inc"},
    "stubs": {".pyi"},
    "cython": {".pyx", ".pxd", ".pxi"},
    "english": {".md", ".rst", ".txt"},
}
ENGLISH = ("METADATA", "LICENSE", "LICENCE", "NOTICE", "AUTHORS", "README")
LONGEST = 500_000  # bytes; longer files are tables


def language_of(path: Path) -> str | None:
    """Returns the language of a file by its name; None for other files."""
    if path.name.upper().startswith(ENGLISH):
        return "english"
    return next((name for name, ends in LANGUAGES.items() if path.suffix in ends), None)


def documents(folder: Path) -> dict[str, list[str]]:
    """Returns the texts below a folder by language, without duplicates, with packages mixed."""
    found: dict[str, dict[str, str]] = {name: {} for name in LANGUAGES}
    for path in folder.rglob("*"):
        language = language_of(path)
        if language and path.is_file() and path.stat().st_size < LONGEST:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                found[language].setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    return {name: [texts[key] for key in sorted(texts)] for name, texts in found.items()}


def budgets(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Returns the characters of each language: all of small ones, equal shares of the others."""
    granted: dict[str, int] = {}
    for name in sorted(sizes, key=sizes.__getitem__):
        share = (total - sum(granted.values())) // (len(sizes) - len(granted))
        granted[name] = min(sizes[name], share)
    return granted


def taken(texts: list[str], most: int) -> Iterator[str]:
    """Returns the first texts whose total length is at most `most`."""
    length = 0
    for text in texts:
        length += len(text)
        if length > most:
            return
        yield text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/packages"))
    parser.add_argument("--megabytes", type=float, default=100.0)
    arguments = parser.parse_args()
    texts = documents(Path(sysconfig.get_path("purelib")))
    texts = {name: of for name, of in texts.items() if of}
    lengths = {name: sum(map(len, of)) for name, of in texts.items()}
    granted = budgets(lengths, round(arguments.megabytes * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, of in texts.items():
            files.append(Path(folder, f"{name}.jsonl"))
            lines = [json.dumps({"text": text}) + "\n" for text in taken(of, granted[name])]
            files[-1].write_text("".join(lines))
            print(f"{name:10}{len(lines):>8,} texts, {granted[name] / 1e6:.1f} MB at the most")
        config = f"--config={ROOT / 'configs' / 'switch_small.py'}"
        mixture = f"--config.data.mixture={','.join(map(str, files))}"
        output = f"--output={arguments.output}"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["data", "pack", config, mixture, "--config.data.data_dir=None", output]
        return switch_jax_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
