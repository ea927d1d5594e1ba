"""Sweeps of the paper's tables of distillation."""

import pytest

from switch_jax.sweeps.spec import Table, load_sweep
from tests.support.paths import ROOT


@pytest.mark.parametrize("size", ["mini", "gpu", "paper"])
@pytest.mark.parametrize("table", [6, 7, 8])
def test_sweeps_of_the_papers_distillation_tables(size, table, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(f"configs/sweeps/distill.py:size={size},table={table}")
    configs = sweep.load_configs()
    (table_spec,) = sweep.tables.values()
    assert set(table_spec.rows.values()) <= set(configs) and table_spec.teachers
    students = {name for name, config in configs.items() if config.distilled}
    assert {table_spec.rows[row] for row in table_spec.teachers} - students <= {"begun"}
    for name in students:
        assert not configs[name].sparse
        assert configs[name].distill.teacher == f"{{run:{teacher_of(table_spec, name)}}}"
        assert configs[name].init_from is not None or name == "taught"
    if size == "paper":
        assert set(table_spec.paper) == set(table_spec.rows)


def teacher_of(table: Table, name: str) -> str:
    return next(table.teachers[row] for row, run in table.rows.items() if run == name)
