"""Failures of Orbax's background saver: told once, and the end of one of several processes."""

import logging
import sys

import jax

from switch_jax.checkpoint.checkpoint_reader import reason
from switch_jax.distributed import exit_after_failure
from switch_jax.files import explain_os_error


class _SaverFailures(logging.Filter):
    """Filter of Orbax's log messages that drops its tracebacks of failed saves.

    Orbax raises the error in the next call of its manager, too. It does not get there in one of
    several processes: first its threads wait for the other processes, which wait for this one.
    There the process ends at once, and JAX ends the other ones.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "orbax" not in record.pathname:
            return True
        if record.threadName == "async_save" and jax.process_count() > 1:
            sentence = explain_os_error(error)
            text = sentence or f"A checkpoint cannot be written: {reason(error)}"
            print(f"switch-jax: {text}", file=sys.stderr)
            exit_after_failure(2 if sentence else 1)
        return False


_FAILURES = _SaverFailures()


def watch_saver() -> None:
    """Handles failures of Orbax's saver from now on; may be called again."""
    logging.getLogger("absl").addFilter(_FAILURES)
