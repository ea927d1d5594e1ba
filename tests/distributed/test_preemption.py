"""Signals that ask a run to stop."""

import signal

import pytest

from switch_jax.distributed import record_signals


def test_a_repeated_sigterm_is_recorded_once():
    """Slurm sends it twice as it preempts a job: the second must not end what saves."""
    before = signal.getsignal(signal.SIGTERM)
    with record_signals() as received:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigint_has_its_earlier_effect():
    with pytest.raises(KeyboardInterrupt), record_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
