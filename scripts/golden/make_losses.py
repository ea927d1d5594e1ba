"""Writes tests/golden/losses/*.json: losses of short runs, to the bit.

    python scripts/golden/make_losses.py

Write them anew only where another result is meant, and say why. The runs are those of
tests/support/goldens.py; a file says what machine its bits are of.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tests.conftest  # noqa: F401, before JAX
from tests.support import goldens


def main() -> None:
    """Trains each run and replaces what is there."""
    goldens.LOSSES.mkdir(parents=True, exist_ok=True)
    for path in goldens.LOSSES.glob("*.json"):
        path.unlink()
    for name in goldens.RUNS:
        content = {"machine": goldens.machine()} | goldens.trace(name)
        (goldens.LOSSES / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
