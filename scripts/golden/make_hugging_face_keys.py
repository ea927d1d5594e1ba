"""Adds to tests/golden/hugging_face_keys.json: config keys of the installed transformers.

    pip install transformers
    python scripts/golden/make_hugging_face_keys.py tests/golden

The file has, by version of transformers, the keys of T5Config, MT5Config and
SwitchTransformersConfig together: the ones that these classes take, and the ones they save. It was
made with 4.30.2, 4.57.1 and 5.24.0. PyTorch is not needed.
"""

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import transformers

CLASSES = (
    transformers.T5Config,
    transformers.MT5Config,
    transformers.SwitchTransformersConfig,
)
_NOT_KEYS = {"self", "args", "kwargs"}


def config_keys() -> list[str]:
    """Returns the keys of the classes of the installed transformers, sorted."""
    keys: set[str] = set()
    for cls in CLASSES:
        keys |= cls().to_dict().keys()
        if dataclasses.is_dataclass(cls):
            keys |= {field.name for field in dataclasses.fields(cls)}
        keys |= {
            name
            for base in cls.__mro__
            if "__init__" in vars(base)
            for name in inspect.signature(base.__init__).parameters
        }
    return sorted(keys - _NOT_KEYS)


def main() -> None:
    """Writes the file in the folder that the first argument names."""
    path = Path(sys.argv[1], "hugging_face_keys.json")
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[transformers.__version__] = config_keys()
    path.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
