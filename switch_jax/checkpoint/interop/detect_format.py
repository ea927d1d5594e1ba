"""Detection of the program that wrote a foreign checkpoint, by the files in its folder."""

from pathlib import Path

from switch_jax.checkpoint.interop.foreign_checkpoint import ForeignCheckpoint
from switch_jax.checkpoint.interop.hf_import import is_hugging_face, read_hugging_face
from switch_jax.checkpoint.interop.t5x_import import is_t5x, read_t5x

_FORMATS = ((is_hugging_face, read_hugging_face), (is_t5x, read_t5x))


def read_foreign(path: Path) -> ForeignCheckpoint | None:
    """Opens the foreign checkpoint in a folder; returns None where there is none.

    Raises `UserError` for a foreign checkpoint that cannot be read.
    """
    for matches, read in _FORMATS:
        if matches(path):
            return read(path)
    return None
