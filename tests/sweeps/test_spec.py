"""Sweep specification: every sweep of configs/sweeps is valid; invalid ones are refused."""

import dataclasses
import runpy

import pytest

from switch_jax.cli.main import main
from switch_jax.errors import UserError
from switch_jax.model.flops import flops_per_sequence, params_by_group
from switch_jax.sweeps.spec import Curves, Sweep, SweepRun, Table, figure_runs, load_sweep
from tests.support.paths import ROOT

_SIZES_FILE = runpy.run_path(str(ROOT / "configs" / "sweeps" / "_sizes.py"))
SIZES, find_size, finetuned_run = (
    _SIZES_FILE[name] for name in ("SIZES", "find_size", "finetuned_run")
)
WITH_TABLES = {"distill": (6, 7, 8), "finetune": (4, 5), "routing": (0, 1, 2, 3, 10, 11)}


def specs():
    """Yields every sweep of configs/sweeps, in every size."""
    for path in sorted((ROOT / "configs" / "sweeps").glob("[!_]*.py")):
        name = path.relative_to(ROOT)
        if path.stem.endswith("_mini"):
            yield str(name)
            continue
        for size in SIZES:
            for table in WITH_TABLES.get(path.stem, (None,)):
                yield f"{name}:size={size}" + ("" if table is None else f",table={table}")


@pytest.mark.parametrize("spec", specs())
def test_every_sweep_is_valid_and_uses_all_its_runs(spec, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = load_sweep(spec)
    configs = made.load_configs()
    made.check_comparable(configs)
    assert made.tables or made.figures
    compared = {name for table in made.tables.values() for name in table.rows.values()}
    compared |= {name for figure in made.figures.values() for name in figure_runs(figure)}
    needed = {name for run in made.runs.values() for name in run.required_runs()}
    needed |= {name for table in made.tables.values() for name in table.teachers.values()}
    assert compared | needed == set(made.runs), "a run is in no table and no figure"


def test_experts_of_every_size_take_the_same_flops(monkeypatch):
    monkeypatch.chdir(ROOT)
    for size in SIZES:
        configs = load_sweep(f"configs/sweeps/experts.py:size={size}").load_configs()
        assert len({flops_per_sequence(config) for config in configs.values()}) == 1
        assert len({sum(params_by_group(c).values()) for c in configs.values()}) > 3


def test_large_models_cost_as_much_more_as_the_paper_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    for size in SIZES.values():
        made = Sweep("", {"dense": size.dense, "large": size.large, "sparse": size.large_switch})
        flops = {n: flops_per_sequence(c) for n, c in made.load_configs().items()}
        assert 3.1 < flops["large"] / flops["dense"] < 3.9
        assert flops["large"] == flops["sparse"]


def test_fine_tuning_has_the_model_of_its_upstream_and_the_recipe_of_its_task(monkeypatch):
    monkeypatch.chdir(ROOT)
    paper = find_size("paper")
    run = finetuned_run("up", paper.large_switch, paper, "superglue")
    found = Sweep("", {"up": paper.large_switch, "down": run}).load_configs()
    up, down = found["up"], found["down"]
    assert down.init_from == "{run:up}" and run.required_runs() == {"up"}
    assert (down.model.d_model, down.moe.group_size) == (1024, up.moe.group_size)
    assert (down.model.dropout_rate, down.moe.expert_dropout_rate) == (0.1, 0.4)
    assert down.data.mixture == "super_glue" and down.train.steps == 16_000


def test_a_run_takes_the_model_of_the_run_that_it_starts_from(monkeypatch):
    """With `init_model=checkpoint`, which the preset sets; overrides of the run stay."""
    monkeypatch.chdir(ROOT)
    up = SweepRun("switch_tiny:num_experts=8", {"moe.router": "top_k", "model.start_id": 7})
    down = SweepRun("finetune:task=pairs", {"init_from": "{run:up}", "moe.router": "switch"})
    sweep = Sweep("", {"up": up, "down": down})
    found = sweep.load_configs()
    assert found["down"].moe.num_experts == 8 and found["down"].model.start_id == 7
    assert found["down"].model.d_model == found["up"].model.d_model != 768
    assert found["down"].moe.router == "switch" and found["down"].moe.expert_dropout_rate == 0.4
    assert sweep.load_run("down", {"train.seed": "3"}).moe == found["down"].moe


def test_among_compared_runs_only_a_teacher_may_have_more_steps(monkeypatch):
    monkeypatch.chdir(ROOT)
    dense = find_size("mini").dense
    runs = {"dense": dense, "other": dense.but({"train.steps": 1600})}
    table = Table("", "", {"dense": "dense", "other": "other"}, teachers={"dense": "other"})
    made = Sweep("", runs, tables={"of": table})
    made.check_comparable(made.load_configs())
    made = Sweep("", runs, tables={"of": dataclasses.replace(table, teachers={})})
    with pytest.raises(UserError, match=r"train\.steps is 1600 in run 'other'"):
        made.check_comparable(made.load_configs())


def test_references_become_paths():
    run = SweepRun(
        "c.py", {"init_from": "{run:a}/checkpoints/8", "data.mixture": "pairs:/x/{split}"}
    )
    assert run.required_runs() == {"a"}
    assert run.override_texts({"a": "/w/a-0"}) == {
        "init_from": "/w/a-0/checkpoints/8",
        "data.mixture": "pairs:/x/{split}",
    }
    assert run.override_texts()["init_from"] == "{run:a}/checkpoints/8"


BAD = {
    "size": ("configs/sweeps/experts.py:size=huge", "no size 'huge'"),
    "table": ("configs/sweeps/routing.py:table=7", "no table 7"),
    "file": ("configs/sweeps/none.py", "does not exist"),
    "config": ("configs/switch_mini.py", "get_sweep"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_and_arguments_end_in_one_sentence(case, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    spec, words = BAD[case]
    assert main(["sweep", "--config", spec, "--workdir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_an_invalid_override_is_reported_with_its_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = load_sweep("configs/sweeps/experts_mini.py").but({"train.stepz": "3"})
    with pytest.raises(UserError, match=r"Run 'dense'.*train\.stepz.*train\.steps"):
        made.load_configs()


MINI = SweepRun("configs/switch_tiny.py")
INCOMPLETE = {
    "no run 'b'": Sweep("", {"a": MINI}, tables={"t": Table("", "", {"A": "b"})}),
    "no row 'C'": Sweep("", {"a": MINI}, tables={"t": Table("", "", {"A": "a"}, {"C": "1"})}),
    "need each other": Sweep(
        "", {"a": MINI.but({"init_from": "{run:b}"}), "b": MINI.but({"init_from": "{run:a}"})}
    ),
    "letters": Sweep("", {"a/b": MINI}),
    "Table '../t'.*letters": Sweep("", {"a": MINI}, tables={"../t": Table("", "", {"A": "a"})}),
    "no run 'x'": Sweep("", {"a": MINI.but({"init_from": "{run:x}"})}),
    "figure 'f'.*no run 'b'": Sweep("", {"a": MINI}, figures={"f": Curves("", "", {"A": "b"})}),
}


@pytest.mark.parametrize("words", INCOMPLETE)
def test_a_sweep_that_contradicts_itself_is_refused(words, monkeypatch, tmp_path):
    path = tmp_path / "s.py"
    path.touch()
    monkeypatch.setattr(
        runpy, "run_path", lambda path: {"get_sweep": lambda arg: INCOMPLETE[words]}
    )
    with pytest.raises(UserError, match=words):
        load_sweep(str(path))


@pytest.mark.parametrize("key, value", [("train.steps", 7), ("data.batch_size", 8)])
def test_unequal_runs_are_not_compared(key, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = {"A": "a", "B": "b"}
    made = Sweep("", {"a": MINI, "b": MINI.but({key: value})}, figures={"f": Curves("", "", named)})
    with pytest.raises(UserError, match=f"figure 'f'.*{key}.*'b'"):
        made.check_comparable(made.load_configs())
    alone = Sweep("", dict(made.runs))
    alone.check_comparable(alone.load_configs())
