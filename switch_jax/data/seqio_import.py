"""Import of seqio and TensorFlow: without messages on stderr, and without GPUs for TensorFlow."""

import contextlib
import os
import sys
from collections.abc import Iterator

from switch_jax.errors import UserError


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discards what is written to stderr; TensorFlow's C++ libraries write before any setting."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:
    with _stderr_discarded():
        import seqio
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # else TensorFlow takes the memory that JAX needs
except ImportError as error:
    raise UserError(
        'data.reader=seqio needs TensorFlow and seqio: pip install "switch_jax[data]", or set'
        " data.reader=store."
    ) from error

__all__ = ["seqio", "tf"]
