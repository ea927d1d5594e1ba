"""Writes tests/golden/parameters/*.txt: name, shape and axes of every preset's parameters.

    python scripts/golden/make_parameters.py

Checkpoints hold parameters under these names: a changed line is a WORKDIR that can no longer be
read, or that must be converted. Review the diff.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tests.conftest  # noqa: F401, before JAX
from tests.model import test_golden_parameters
from tests.support import goldens


def main() -> None:
    """Replaces what is there."""
    goldens.PARAMETERS.mkdir(parents=True, exist_ok=True)
    for path in goldens.PARAMETERS.glob("*.txt"):
        path.unlink()
    for name, config in test_golden_parameters.PRESETS.items():
        (goldens.PARAMETERS / f"{name}.txt").write_text(goldens.parameters(config()))


if __name__ == "__main__":
    main()
