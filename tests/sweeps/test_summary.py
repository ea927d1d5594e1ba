"""Summary and report of a sweep, for results whose summary is known."""

import dataclasses
import html
import json
import re
import runpy

import pytest

from switch_jax.checkpoint.metrics_log import QUALITY
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.model.flops import flops_per_sequence, params_by_group, train_flops
from switch_jax.sweeps.figures import _draw_curves
from switch_jax.sweeps.report import figure_notes, runs_cells, table_cells, write_results_report
from switch_jax.sweeps.results import RunResult, read_result
from switch_jax.sweeps.spec import (
    Advantage,
    Curves,
    Scaling,
    Sources,
    Sweep,
    SweepRun,
    Table,
    Transfer,
)
from switch_jax.sweeps.summary import advantage_curves, summarise_sweep
from tests.support.configs import tiny
from tests.support.pages import without_images
from tests.support.paths import ROOT

_PAPER_NUMBERS = runpy.run_path(str(ROOT / "configs" / "sweeps" / "_paper_numbers.py"))
TABLE_7, TABLE_9_DENSE = _PAPER_NUMBERS["TABLE_7"], _PAPER_NUMBERS["TABLE_9_DENSE"]


def result(qualities, *, steps=100, step_seconds=0.5, metric=QUALITY, **changes):
    """Returns the result of a run with these qualities, at equal distances of steps."""
    every = steps // len(qualities)
    config = tiny(**{"train.steps": steps} | changes)
    evaluations = [
        {"step": every * n, "split": "eval", QUALITY: -3.0, metric: quality}
        for n, quality in enumerate(qualities, 1)
    ]
    return RunResult(
        config=config,
        params=sum(params_by_group(config).values()),
        flops_per_sequence=flops_per_sequence(config),
        step_flops=train_flops(config),
        evaluations=tuple(evaluations),
        tokens_per_step=100.0,
        step_seconds=step_seconds,
        dropped=0.1,
        devices="1 × cpu",
    )


DENSE = {"moe.num_experts": 0}
RESULTS = {
    "dense": [result([-4, -3, -2.5, -2], **DENSE), result([-4, -3, -2.5, -2.2], **DENSE)],
    # Reaches the final quality of `dense` in half its steps, which take twice as long.
    "switch": [
        result([-3, -2, -1.5, -1], step_seconds=1.0),
        result([-3, -2.2, -1.9, -1.4], step_seconds=1.0),
    ],
    "diverged": [result([-3, None, None, None]), None],
}


def table(rows, **settings):
    """Returns the summary of a table of RESULTS."""
    made = Table("Title", "Claim", rows, **settings)
    names = set(rows.values()) | set(made.teachers.values())
    sweep = Sweep("Sweep", {n: SweepRun("c.py") for n in names}, (0, 1), {"t": made})
    return summarise_sweep(sweep, RESULTS)["tables"]["t"]


def test_a_run_that_diverged_after_its_last_evaluation_has_no_quality():
    diverged = dataclasses.replace(result([-3, -2, -1.5, -1]), diverged=True)
    early = dataclasses.replace(diverged, evaluations=())
    results = {"dense": RESULTS["dense"], "bad": [diverged, early]}
    made = Table("Title", "Claim", {"T5": "dense", "Bad": "bad"})
    sweep = Sweep("Sweep", {n: SweepRun("c.py") for n in results}, (0, 1), {"t": made})
    summary = summarise_sweep(sweep, results)
    row = summary["tables"]["t"]["rows"]["Bad"]
    for column in ("quality", "gain", "speed_up_steps", "speed_up_seconds"):
        assert row[column]["values"] == [None, None]
    assert table_cells(summary["tables"]["t"])[2][:2] == ["Bad", "diverged"]
    assert runs_cells(summary)[2][:2] == ["bad", "2 of 2, 2 diverged"]


def test_rows_are_compared_with_the_first_seed_by_seed():
    rows = table({"T5": "dense", "Switch": "switch"})["rows"]
    assert rows["T5"]["quality"]["values"] == [-2, -2.2] and "gain" not in rows["T5"]
    assert rows["Switch"]["gain"]["values"] == pytest.approx([1.0, 0.8])
    assert rows["Switch"]["speed_up_steps"]["values"] == pytest.approx([2, 2])
    assert rows["Switch"]["speed_up_seconds"]["values"] == pytest.approx([1, 1])
    assert rows["Switch"]["sequences_per_second"]["mean"] == 16  # rows of a batch, in a second


def test_a_diverged_run_has_no_quality_and_is_counted():
    row = table({"T5": "dense", "Bad": "diverged"})["rows"]["Bad"]
    assert row["quality"]["mean"] is None and row["gain"]["values"] == [None]
    assert "diverged" not in json.dumps(table_cells(table({"T5": "dense"})))
    cells = table_cells(table({"T5": "dense", "Bad": "diverged"}))
    assert cells[2][1] == "diverged" and "not reached" in cells[2]


def test_a_student_keeps_a_share_of_its_teachers_gain(monkeypatch):
    student = [result([-1.5], **DENSE), result([-1.4], **DENSE)]
    monkeypatch.setitem(RESULTS, "student", student)
    row = table({"T5": "dense", "Student": "student"}, teachers={"Student": "switch"})
    found = row["rows"]["Student"]
    assert found["share_of_gain"]["values"] == pytest.approx([0.5, 1.0])
    dense, sparse = RESULTS["dense"][0].params, RESULTS["switch"][0].params
    assert found["compression"]["mean"] == pytest.approx(1 - dense / sparse)
    cells = table_cells(row)
    assert cells[2][cells[0].index("share of the gain")] == "75 ± 35 %"


def test_unequal_models_are_compared_at_equal_flops(monkeypatch):
    wide = [result([-2, -1.5, -1, -0.5], **{"model.d_ff": 48})] * 2
    monkeypatch.setitem(RESULTS, "wide", wide)
    rows = table({"T5": "dense", "Wide": "wide"})["rows"]
    share = RESULTS["dense"][0].step_flops / wide[0].step_flops
    assert 0.25 < share < 0.9
    expected = -2.5 + 0.5 * 4 * share  # evaluations are on a straight line from -2 at the first
    assert rows["Wide"]["at_equal_flops"]["mean"] == pytest.approx(expected)
    assert rows["T5"]["at_equal_flops"]["mean"] == pytest.approx(-2.1)
    assert "at_equal_flops" not in table({"T5": "dense", "Switch": "switch"})["rows"]["T5"]


def test_scores_count_by_their_best_evaluation(monkeypatch):
    monkeypatch.setitem(RESULTS, "task", [result([50, 70, 60], metric="average")] * 2)
    found = table({"Switch": "task"}, metric="average")
    assert found["rows"]["Switch"]["quality"]["mean"] == 70
    assert table_cells(found)[0][1] == "average"


def test_empty_columns_are_left_out():
    cells = table_cells(table({"T5": "dense"}))
    assert "the paper's" not in cells[0] and "against the first row" not in cells[0]
    cells = table_cells(table({"T5": "dense"}, paper={"T5": "-1.7"}))
    assert cells[1][cells[0].index("the paper's")] == "-1.7"


NAMED = {"T5": "dense", "Switch": "switch", "Bad": "diverged"}


def test_power_laws_of_our_points_and_of_the_papers(monkeypatch):
    for number, experts in enumerate((1, 2, 8)):
        one = result([-3.0 * max(experts, 1) ** -0.05], **{"moe.num_experts": experts})
        monkeypatch.setitem(RESULTS, f"e{number}", [one, one])
    figure = Scaling("", "", {f"{n}": f"e{n}" for n in range(3)}, "experts", TABLE_7)
    sweep = Sweep("", {f"e{n}": SweepRun("c.py") for n in range(3)}, (0, 1), figures={"f": figure})
    numbers = summarise_sweep(sweep, RESULTS)["figures"]["f"]
    assert numbers["power_laws"]["ours"]["exponent"] == pytest.approx(-0.05)
    theirs = numbers["power_laws"]["the paper's Table 7"]
    low, high = theirs["exponent_interval"]
    assert low < theirs["exponent"] < high < 0
    assert any("experts^-0.0500" in line for line in figure_notes(numbers))


def test_the_advantage_is_a_gain_at_equal_steps_by_tokens_per_expert(monkeypatch):
    top_2 = result([-3, -2, -1.5, -1], **{"moe.router": "top_k", "moe.num_experts": 8})
    monkeypatch.setitem(RESULTS, "top_2", [top_2])
    figure = Advantage("", "", NAMED | {"Again": "dense", "Top 2": "top_2"})
    curves = advantage_curves(figure, RESULTS)
    tokens = 25 * 16 * 16  # of 25 steps of 16 rows of 16 tokens, with 4 experts
    for curve, gains in zip(curves["Switch"], [(1, 1, 1, 1), (1, 0.8, 0.6, 0.8)]):
        assert [x for x, _ in curve] == [tokens / 4 * n for n in (1, 2, 3, 4)]
        assert [gain for _, gain in curve] == pytest.approx(gains)
    assert curves["Bad"] == [[(tokens / 4, 1)]]  # diverged after its first evaluation
    assert curves["Again"][0][-1] == (4 * tokens, 0)
    assert [x for x, _ in curves["Top 2"][0]] == [tokens * 2 / 8 * n for n in (1, 2, 3, 4)]


def test_table_7_agrees_with_the_gains_that_the_paper_prints():
    dense, *sparse = TABLE_7.points
    assert (dense.experts, dense.quality) == (1, -1.636)
    # The paper prints the gains of students, and their shares of the teachers' gains in per cent.
    kept = [0.049, 0.051, 0.057, 0.054, 0.058]
    shares = [100 * k / (point.quality - dense.quality) for k, point in zip(kept, sparse)]
    assert [round(share, 1) for share in shares] == [37.4, 31.5, 29.7, 26.5, 27.8]


def sources(quality):
    lines = result(quality).evaluations
    return [{**m, f"a/{QUALITY}": m[QUALITY], f"b/{QUALITY}": m[QUALITY] - 1} for m in lines]


@pytest.fixture
def everything(monkeypatch):
    """A sweep with every kind of figure, and its results."""
    for name in ("dense", "switch"):
        changed = [
            dataclasses.replace(o, evaluations=tuple(sources([m[QUALITY] for m in o.evaluations])))
            for o in RESULTS[name]
        ]
        monkeypatch.setitem(RESULTS, name, changed)
    return Sweep(
        "Every <figure>",
        {name: SweepRun("c.py") for name in RESULTS},
        (0, 1),
        {"table": Table("Table <1>", "Claim", NAMED, {"T5": "-1.7"})},
        {
            "steps": Curves("Steps", "Claim", NAMED),
            "seconds": Curves("Seconds", "Claim", NAMED, "seconds"),
            "scaling": Scaling("Scaling", "Claim", NAMED, published=TABLE_9_DENSE),
            "advantage": Advantage("Advantage", "Claim", NAMED),
            "transfer": Transfer("Transfer", "Claim", {"Switch": (("dense", "switch"),)}, QUALITY),
            "sources": Sources("Sources", "Claim", "dense", "switch"),
        },
    )


def test_every_table_and_figure_is_drawn_and_in_both_summaries(everything, tmp_path):
    written = write_results_report(everything, RESULTS, tmp_path)
    stems = {path.stem for path in written if path.suffix == ".svg"}
    assert stems == {"table", *everything.figures}
    assert stems == {path.stem for path in written if path.suffix == ".png"}
    page = without_images((tmp_path / "index.html").read_text())
    assert page.count("data:image/png;base64") == len(stems)
    assert "Every &lt;figure&gt;" in page and "<1>" not in page and "http" not in page
    text = (tmp_path / "summary.md").read_text()
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / name).is_file()
    assert text.count("](figures/") == len(stems)
    assert "Switch against T5, in steps: 2.00 ± 0.00 ×" in text
    assert "Switch, upstream → downstream: -2.200 → -1.4, -2.000 → -1.0" in text
    assert "Better in the end: 2.0 ± 0.0 of 2 sources" in text
    assert "Mean speed-up of those that get there: 2.00 ± 0.00 ×" in text
    json.loads((tmp_path / "summary.json").read_text())


STRANGE = ("$a_{$", "_b", "[/c]", "|`d`", "<script>e", "f\x1b[2J")


def test_names_are_text_and_never_markup(tmp_path):
    """Labels with mathematics, markup of rich, Markdown and HTML, and control characters."""
    runs = dict.fromkeys(STRANGE, "dense")
    sweep = Sweep(
        "<script>t",
        {"dense": SweepRun("c.py")},
        (0, 1),
        {"table": Table("$t_{$", "Claim", runs)},
        {"steps": Curves("|t|", "[/c]", runs)},
    )
    write_results_report(sweep, RESULTS, tmp_path)
    for name in ("table", "steps"):
        texts = re.findall("<text .*?>(.*?)</text>", (tmp_path / f"figures/{name}.svg").read_text())
        shown = {html.unescape(text).lstrip("\u200b") for text in texts}
        assert shown >= {*STRANGE[:-1], r"f\x1b[2J"}
    page = (tmp_path / "index.html").read_text()
    assert page.count("<script") == 1 and page.index("<script") > page.rindex("</table>")
    cells = re.findall("<td>(.*?)</td>", page)
    assert {html.unescape(cell) for cell in cells} >= {*STRANGE[:-1], r"f\x1b[2J"}


def test_a_sweep_without_finished_runs_has_a_summary(everything, tmp_path):
    nothing = {name: [None, None] for name in RESULTS}
    written = write_results_report(everything, nothing, tmp_path)
    assert {path.name for path in written} == {"summary.json", "summary.md", "index.html"}
    assert "0 of 2" in (tmp_path / "summary.md").read_text()


def test_long_curves_are_in_hours():
    figure = Curves("", "", {"A": "a"}, "seconds")
    long = {"a": [result([-3, -2], step_seconds=360.0)]}  # 100 steps: 10 hours
    axes = _draw_curves(figure, long).axes[0]
    assert "hours" in axes.get_xlabel() and axes.xaxis.get_major_formatter()(7200, 0) == "2"
    short = {"a": [result([-3, -2], step_seconds=0.1)]}
    assert "seconds" in _draw_curves(figure, short).axes[0].get_xlabel()


def test_a_result_is_read_from_a_workdir(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.prepare(tiny(**{"train.steps": 4}), None, "2 × cpu")
    train = [
        {"step": s, "split": "train", "tokens": 50.0 * s, "router/dropped_fraction": s / 10}
        | ({"step_seconds": 0.1 * s} if s > 1 else {})
        for s in range(1, 7)
    ]
    evaluation = {"step": 6, "split": "eval", QUALITY: -2.0}
    lines = [*train, evaluation]
    workdir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_result(workdir, step_flops=7.0)
    assert found.tokens_per_step == 50 and found.devices == "2 × cpu"
    assert found.step_seconds == pytest.approx(0.4)  # the median of 0.2 … 0.6
    assert found.dropped == pytest.approx(0.45)  # the mean of the last four
    assert found.curve(QUALITY, "flops") == [(42, -2.0)]
    assert found.curve(QUALITY, "seconds") == [(pytest.approx(2.4), -2.0)]
