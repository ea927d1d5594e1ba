"""Folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"
GOLDEN = ROOT / "tests" / "golden"
