"""Sweeps: several runs, compared in tables and figures."""

from switch_jax.sweeps.paper_numbers import PAPER_SERIES
from switch_jax.sweeps.report import write_report
from switch_jax.sweeps.runner import prepare_sweep, ready_jobs, run_sweep, sweep_jobs
from switch_jax.sweeps.spec import (
    Curves,
    Scaling,
    Sources,
    Sweep,
    SweepRun,
    Table,
    Transfer,
    load_sweep,
)

__all__ = [
    "PAPER_SERIES",
    "Curves",
    "Scaling",
    "Sources",
    "Sweep",
    "SweepRun",
    "Table",
    "Transfer",
    "load_sweep",
    "prepare_sweep",
    "ready_jobs",
    "run_sweep",
    "sweep_jobs",
    "write_report",
]
