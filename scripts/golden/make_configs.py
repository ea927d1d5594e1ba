"""Writes tests/golden/configs/*.json: every preset, resolved.

    python scripts/golden/make_configs.py

Review the diff: it is what changes for users of the presets.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.config.test_configs import GOLDEN_CONFIGS, SPECS, resolved


def main() -> None:
    """Replaces the golden configs."""
    for path in GOLDEN_CONFIGS.glob("*.json"):
        path.unlink()
    for name, spec in SPECS.items():
        content = json.dumps(resolved(spec), indent=2) + "\n"
        (GOLDEN_CONFIGS / f"{name}.json").write_text(content)


if __name__ == "__main__":
    main()
