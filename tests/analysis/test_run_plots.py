"""Figures of runs: values of uniform routers in the figure of routers."""

import math

from switch_jax.analysis.run_plots import _draw_router, read_expert_counts
from switch_jax.checkpoint.workdir import Workdir
from tests.support.configs import tiny


def reference_lines(axes):
    """Returns the heights of the dotted lines of a panel, and its labels with their heights."""
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    return heights, {text.get_text(): text.xy[1] for text in axes.texts}


def test_confidence_and_entropy_have_lines_of_uniform_routers():
    names = ("load_max", "load_min", "load_cv", "dropped_fraction", "confidence", "entropy")
    values = {f"router/{layer}{name}": 0.5 for name in names for layer in ("", "encoder/1/")}
    lines = [{"step": step, "split": "train"} | values for step in (1, 2)]
    panels = _draw_router({"a": lines, "b": lines}, [4, 8]).axes
    for axes, ideal in zip(panels, (1, 1, 0, 0)):
        assert reference_lines(axes) == ([ideal], {})
    confidence, entropy = map(reference_lines, panels[4:])
    assert confidence[0] == [1 / 4, 1 / 8] and entropy[0] == [math.log(4), math.log(8)]
    assert confidence[1] == {"uniform: 1 / 4": 1 / 4, "uniform: 1 / 8": 1 / 8}
    assert entropy[1] == {"uniform: ln 4": math.log(4), "uniform: ln 8": math.log(8)}


def test_numbers_of_experts_of_sparse_runs_each_once(tmp_path):
    workdirs = [Workdir(tmp_path / name) for name in ("a", "b", "c", "d", "metrics only")]
    for workdir, experts in zip(workdirs, (8, 4, 0, 8)):
        workdir.prepare(tiny(**{"moe.num_experts": experts}), None)
    assert read_expert_counts(workdirs) == [4, 8]
