"""Speed-up over a baseline by source; its table and its figure."""

import itertools
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from switch_jax.analysis.learning_curves import SpeedUp
from switch_jax.analysis.speedup import compare_sources, comparison_to_json, speedup_table
from switch_jax.cli.main import main
from switch_jax.errors import UserError


def evaluations(steps, **qualities):
    """Lines of metrics.jsonl; qualities of `sw` are those of the source `mc4.sw`."""
    lines = [{"step": 1, "split": "train", "cross_entropy": 3.0, "accuracy": 0.1, "tokens": 8}]
    for place, step in enumerate(steps):
        line = {"step": step, "split": "eval", "router/load_max": 1.5}
        line |= {f"mc4.{name}/neg_log_perplexity": q[place] for name, q in qualities.items()}
        found = [q[place] for q in qualities.values() if q[place] is not None]
        line["neg_log_perplexity"] = sum(found) / len(found) if found else None
        lines.append(line | {"cross_entropy": 2.0, "mc4.sw/cross_entropy": 0.5})
    return lines


def one(steps, quality, our_steps, our_quality):
    """The speed-up of a single source."""
    runs = evaluations(steps, sw=quality), evaluations(our_steps, sw=our_quality)
    comparison = compare_sources(*runs)
    assert comparison.mixture == comparison.sources["mc4.sw"]
    return comparison.sources["mc4.sw"]


def test_steps_are_read_off_the_line_between_evaluations():
    # -2 is three quarters of the way from -3.5 at step 100 to -1.5 at step 200.
    found = one([200, 400, 600], [-4, -3, -2], [100, 200, 300], [-3.5, -1.5, -1])
    assert found == SpeedUp(-2, -1, 600, 175, at_least=False)
    assert found.ratio == pytest.approx(600 / 175)


def test_an_equal_quality_is_reached():
    assert one([100, 200], [-3, -2], [10, 20, 30], [-3, -2, -1]).x == 20
    assert one([100, 200], [-3, -2], [100, 200], [-3, -2]).ratio == 1


def test_a_run_that_never_gets_there_has_no_speed_up():
    found = one([100, 200], [-3, -2], [100, 900], [-3, -2.001])
    assert found.x is None and found.ratio is None and not found.at_least


def test_a_quality_that_is_lost_later_is_not_reached():
    found = one([100, 200], [-3, -2], [50, 100, 150], [-3, -1, -5])
    assert found.x is None and found.quality == -5


def test_a_baseline_that_got_worse_is_timed_when_it_first_was_as_good_as_at_its_end():
    # Smoothed, it is at -1.5 from step 200 on.
    found = one([100, 200, 300, 400], [-3, -1, -1.5, -2], [10, 20], [-3, -1])
    assert found.baseline_quality == -2 and found.baseline_x == 200
    assert found.x == pytest.approx(17.5)
    assert one([100, 200], [-1, -2], [10, 20], [-3, -1]).baseline_x == 100


def test_a_speed_up_at_the_first_evaluation_is_a_lower_bound():
    found = one([100, 200], [-3, -2], [50, 100], [-1, -1])
    assert found == SpeedUp(-2, -1, 200, 50, at_least=True)


def test_evaluations_that_were_not_finite_are_left_out():
    found = one([100, 200, 300], [-3, -2, None], [50, 100, 150], [-3, None, -1])
    assert found.baseline_x == 200 and found.x == 100


@hypothesis.given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=30), st.integers(1, 20), st.integers(1, 9)
)
def test_k_times_as_fast_a_curve_gives_k(gains, k, every):
    quality = [sum(gains[: n + 1]) - 9 for n in range(len(gains))]
    steps = [every * k * (n + 1) for n in range(len(gains))]
    found = one(steps, quality, [step // k for step in steps], quality)
    assert found.ratio == pytest.approx(k)
    # Twice as dense, on the same lines, changes nothing.
    dense = sorted([*quality, *((a + b) / 2 for a, b in itertools.pairwise(quality))])
    halves = [every + n * every / 2 for n in range(len(dense))]
    assert one(steps, quality, halves, dense).ratio == pytest.approx(k)


def five_sources():
    """A baseline, and speed-ups of 8 or more, 5, 4, 16/7 and none; 3 of 5 are better at the end."""
    steps = [100, 200, 300, 400]
    rises = [-5, -4, -3, -2]
    baseline = evaluations(steps, sw=rises, de=rises, fr=rises, yi=rises, zu=rises)
    ours = evaluations(
        [50, 80, 100, 200],
        sw=[-2, -2, -2, -2],
        de=[-3, -2, -1, -1],
        fr=[-3, -3, -2, -1],
        yi=[-5, -5, -5, -1],
        zu=[-5, -5, -5, -3],
    )
    ours[-1]["mc4.xx/neg_log_perplexity"] = -1.0  # a source that the baseline has not
    return baseline, ours


def test_sources_are_ordered_and_counted():
    comparison = compare_sources(*five_sources())
    assert list(comparison.sources) == ["mc4.sw", "mc4.de", "mc4.fr", "mc4.yi", "mc4.zu"]
    result = json.loads(json.dumps(comparison_to_json(comparison)))
    ratios = [source["speed_up"] for source in result["sources"].values()]
    assert ratios == [8, 5, 4, pytest.approx(400 / 175), None]
    assert result["speed_up_mean"] == pytest.approx((8 + 5 + 4 + 400 / 175) / 4)
    assert result["share_at_least_4"] == 3 / 5
    assert (result["improved"], result["not_reached"]) == (3, 1)
    assert (result["baseline_steps"], result["steps"]) == (400, 200)
    assert result["mixture"]["quality"] == pytest.approx((-2 - 1 - 1 - 1 - 3) / 5)


def test_the_table_has_the_numbers_of_the_comparison():
    lines = speedup_table(compare_sources(*five_sources()), "a", "b").splitlines()
    cells = {line[:13].strip(): line[13:].split() for line in lines if line}
    assert lines[0] == "b (200 steps) against the baseline a (400 steps)"
    assert cells["mc4.sw"] == ["-2.0000", "-2.0000", "400", "50", "≥", "8.00×"]
    assert cells["mc4.yi"] == ["-2.0000", "-1.0000", "400", "175", "2.29×"]
    assert cells["mc4.zu"] == ["-2.0000", "-3.0000", "400", "never"]
    assert cells["whole mixture"][:3] == ["-2.0000", "-1.6000", "400"]
    assert "5 sources: 3 better in the end, 1 never as good as the baseline's end" in lines
    assert "speed-up: 4.82× in the mean of the others, at least 4× for 60% of all" in lines


def test_a_table_without_speed_ups():
    runs = evaluations([100, 200], sw=[-3, -2]), evaluations([100, 200], sw=[-4, -3])
    table = speedup_table(compare_sources(*runs), "a", "b")
    assert "speed-up: – in the mean of the others, at least 4× for 0% of all" in table


def test_runs_that_cannot_be_compared_are_one_sentence():
    run = evaluations([100], sw=[-2])
    with pytest.raises(UserError, match="share no source"):
        compare_sources(run, evaluations([100], de=[-2]))
    with pytest.raises(UserError, match="baseline has no evaluation"):
        compare_sources(run[:1], run)
    with pytest.raises(UserError, match="compare with it has no evaluation"):
        compare_sources(run, evaluations([100], sw=[None]))


def plot(folder, capsys, *runs):
    """Returns the output of the verb, and the figures it draws, for runs with these lines."""
    for name, lines in zip("abc", runs):
        (folder / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "metrics.jsonl").write_text(text)
    workdirs = [str(folder / name) for name, _ in zip("abc", runs)]
    assert main(["plot", "--workdir", *workdirs, "--output", str(folder / "figures")]) == 0
    drawn = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    return capsys.readouterr().out, drawn


def test_plot_draws_and_prints_speed_ups_of_two_runs(tmp_path, capsys):
    out, drawn = plot(tmp_path, capsys, *five_sources())
    assert drawn.keys() == {"loss.png", "sources.png"}
    assert drawn["sources.png"].startswith(b"\x89PNG")
    assert f"{tmp_path / 'b'} (200 steps) against the baseline {tmp_path / 'a'}" in out


@pytest.mark.parametrize("sources", [2, 107])
def test_plot_of_few_and_many_sources_none_of_which_gets_there(tmp_path, capsys, sources):
    rises = {f"s{number}": [-4, -3] for number in range(sources)}
    worse = {name: [-5, -4] for name in rises}
    runs = evaluations([100, 200], **rises), evaluations([100, 200], **worse)
    assert "sources.png" in plot(tmp_path, capsys, *runs)[1]


def test_plot_without_two_comparable_runs_has_no_speed_ups(tmp_path, capsys):
    baseline, ours = five_sources()
    for folder, runs in {
        "one": [baseline],
        "three": [baseline, ours, ours],
        "none in common": [baseline, evaluations([100], xx=[-2])],
    }.items():
        (tmp_path / folder).mkdir()
        out, drawn = plot(tmp_path / folder, capsys, *runs)
        assert drawn.keys() == {"loss.png"} and "speed-up" not in out
