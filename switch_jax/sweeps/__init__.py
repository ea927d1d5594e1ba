"""Sweeps: several runs, compared in tables and figures."""

from switch_jax.sweeps.report import write_sweep_report
from switch_jax.sweeps.runner import (
    check_same_text,
    prepare_sweep,
    ready_jobs,
    run_sweep,
    sweep_jobs,
)
from switch_jax.sweeps.spec import (
    Advantage,
    Curves,
    PaperPoint,
    PaperSeries,
    Scaling,
    Sources,
    Sweep,
    SweepRun,
    Table,
    Transfer,
    load_sweep,
)

__all__ = [
    "Advantage",
    "Curves",
    "PaperPoint",
    "PaperSeries",
    "Scaling",
    "Sources",
    "Sweep",
    "SweepRun",
    "Table",
    "Transfer",
    "check_same_text",
    "load_sweep",
    "prepare_sweep",
    "ready_jobs",
    "run_sweep",
    "sweep_jobs",
    "write_sweep_report",
]
