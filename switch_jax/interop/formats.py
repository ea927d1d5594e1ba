"""Which program's checkpoint a folder holds."""

import importlib
from pathlib import Path
from typing import Protocol

from switch_jax.interop.imported import Imported

# In the order in which they are asked.
_IMPORTERS = ("switch_jax.interop.huggingface", "switch_jax.interop.t5x")


class Importer(Protocol):
    """What a module must have to be in the list above."""

    @staticmethod
    def holds(path: Path) -> bool:
        """Whether a folder looks like one of its checkpoints; a quick look at names."""

    @staticmethod
    def read(path: Path) -> Imported:
        """Opens a checkpoint; raises `UserError` for one that is incomplete or of no use."""


def read(path: Path) -> Imported | None:
    """The foreign checkpoint in a folder, None where there is none; raises `UserError`."""
    for name in _IMPORTERS:
        importer: Importer = importlib.import_module(name)  # type: ignore[assignment]
        if importer.holds(path):
            return importer.read(path)
    return None
