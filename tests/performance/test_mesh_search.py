"""Legal meshes, ranked, with memory that adds up."""

import dataclasses
import math

import jax
import pytest

from switch_jax.config import load
from switch_jax.config.load import load_config
from switch_jax.distributed.hardware import CHIPS, Chip, all_to_all_seconds, chip_of_topology
from switch_jax.distributed.mesh import check_mesh, make_mesh
from switch_jax.errors import UserError
from switch_jax.performance.cost_model import cost_summary
from switch_jax.performance.mesh_search import MeshSuggestion, _Work, suggest_meshes
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny

V4, V5P = CHIPS["TPU v4"], CHIPS["TPU v5"]


def preset(name: str, **overrides: str) -> load.Config:
    return load_config(f"configs/{name}.py", overrides)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("name", ["switch_base", "switch_large", "switch_xxl", "switch_c"])
def test_suggestions_are_legal_and_the_fastest_that_fits_comes_first(name):
    found = suggest_meshes(preset(name), V5P, 512)
    assert found[0].fits
    order = [(not one.fits, one.step_seconds) for one in found]
    assert order == sorted(order)
    for one in found:
        assert math.prod(one.mesh.values()) == 512
        check_mesh(preset(name, **{"mesh.fsdp": str(one.fsdp)}), one.mesh)
        assert one.fits == (one.memory <= V5P.memory)


def test_what_fits_nowhere_is_ranked_all_the_same():
    assert not any(one.fits for one in suggest_meshes(preset("switch_c"), V4, 512))  # nor compiled


def test_what_needs_the_least_communication_is_suggested():
    """Experts over all chips for Switch-C; no model parallelism for what fits without."""
    assert {"data", "model"} & {a for a, n in best("switch_base", 64).mesh.items() if n > 1} <= {
        "data"
    }
    assert best("switch_c", 1024).mesh["expert"] >= 512
    slow = dataclasses.replace(V4, link_rate=V4.link_rate / 100)
    assert suggest_meshes(preset("t5_base"), slow, 64)[0].mesh["model"] == 1


def best(name: str, devices: int) -> MeshSuggestion:
    return suggest_meshes(preset(name), V4, devices)[0]


def test_parameters_on_a_device_are_those_of_the_program():
    mesh = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2, "mesh.fsdp": True}
    made = tiny(**mesh)
    program = TrainProgram(made, make_mesh(made))
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves(program.abstract_state.params)
    )
    work = _Work(made, V4)
    assert work.suggestion(dict(program.mesh.shape), fsdp=True).memory_bytes["parameters"] == held


def test_compute_is_that_of_the_accounting():
    made = preset("switch_base")
    seconds = suggest_meshes(made, V4, 64)[0].seconds
    flops = cost_summary(made)["train_flops_per_step"]
    assert seconds["compute"] == pytest.approx(flops / 64 / V4.flops)


def test_recomputing_and_accumulating_take_less_memory_and_more_time():
    plain, full, parts = (
        suggest_meshes(preset("switch_large", **values), V4, 128)[0]
        for values in (
            {},
            {"model.remat": "full"},
            {"model.remat": "full", "train.accumulate": "4"},
        )
    )
    kept = [one.memory_bytes["activations"] for one in (plain, full, parts)]
    assert kept == sorted(kept, reverse=True)
    assert plain.seconds["compute"] < full.seconds["compute"]


def test_several_slices_cost_time_between_them():
    one, two = (suggest_meshes(preset("switch_base"), V4, 128, slices)[0] for slices in (1, 2))
    assert two.mesh["slice"] == 2
    assert "slices" not in one.seconds and two.seconds["slices"] > 0


def test_no_legal_mesh_says_why():
    with pytest.raises(UserError, match=r"data\.batch_size"):
        suggest_meshes(preset("t5_base"), V4, 7)


def test_topologies():
    assert chip_of_topology("v5p:8x16x16") == (CHIPS["TPU v5"], 2048)
    assert chip_of_topology("h100:64") == (CHIPS["NVIDIA H100 80GB HBM3"], 64)
    for wrong in ("v9:2x2", "v4", "v4:", "v4:2x", "cpu:8"):
        with pytest.raises(UserError, match="--topology"):
            chip_of_topology(wrong)


def test_the_middle_of_a_torus_limits_an_exchange_of_many():
    chip = Chip(1.0, link_rate=600.0, torus=3)
    # Two links long, in each of three dimensions half a link on average.
    assert all_to_all_seconds(chip, 600.0, 8) == 1.5
    # 64 links long: 4096 × 600 / 4 bytes each way through 2 × 4096 / 64 links of 100 bytes/s.
    assert all_to_all_seconds(chip, 600.0, 64**3) == pytest.approx(600 / 4 * 64 / 2 / 100)
    assert all_to_all_seconds(Chip(1.0, link_rate=600.0), 600.0, 4096) == 1.0
