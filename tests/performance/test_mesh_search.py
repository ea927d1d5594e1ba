"""Mesh search: legal meshes, their order, and predictions against compiled programs."""

import dataclasses
import json
import math

import jax
import pytest

from switch_jax.config import Config
from switch_jax.config.load import load_config
from switch_jax.distributed.hardware import CHIPS, Chip, all_to_all_seconds, chip_of_topology
from switch_jax.distributed.mesh import check_mesh, make_mesh
from switch_jax.errors import UserError
from switch_jax.model.flops import flops_by_part
from switch_jax.performance.cost_model import cost_summary
from switch_jax.performance.mesh_search import (
    PASSES_PER_STEP,
    MeshSuggestion,
    predict_mesh,
    suggest_meshes,
)
from switch_jax.performance.roofline import matmul_flops
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny
from tests.support.paths import CONFIGS, GOLDEN, ROOT

V4, V5P = CHIPS["TPU v4"], CHIPS["TPU v5"]


# Compile results as docs/scale.md has them; null where the program does not fit, or where the
# page has no figure.
COMPILED = json.loads((GOLDEN / "compiled_meshes.json").read_text())


def preset(name: str, **overrides: str) -> Config:
    return load_config(str(CONFIGS / f"{name}.py"), overrides)


@pytest.mark.parametrize("name", ["switch_base", "switch_large", "switch_xxl", "switch_c"])
def test_suggestions_are_legal_and_the_fastest_that_fits_comes_first(name):
    suggestions = suggest_meshes(preset(name), V5P, 512)
    assert suggestions[0].fits
    order = [(not suggestion.fits, suggestion.step_seconds) for suggestion in suggestions]
    assert order == sorted(order)
    for suggestion in suggestions:
        assert math.prod(suggestion.mesh.values()) == 512
        config = preset(name, **{"mesh.fsdp": str(suggestion.fsdp)})
        check_mesh(config, suggestion.mesh)
        assert suggestion.fits == (suggestion.memory <= V5P.memory)


def test_meshes_are_ranked_even_if_none_fits():
    suggestions = suggest_meshes(preset("switch_c"), V4, 256)  # 23 GiB of parameters each
    assert suggestions and not any(suggestion.fits for suggestion in suggestions)


def best(name: str, devices: int) -> MeshSuggestion:
    return suggest_meshes(preset(name), V4, devices)[0]


def test_the_mesh_with_the_least_communication_is_suggested():
    """Experts over all chips for Switch-C; no model parallelism for a model that fits without."""
    axes = {axis for axis, size in best("switch_base", 64).mesh.items() if size > 1}
    assert {"data", "model"} & axes <= {"data"}
    assert best("switch_c", 1024).mesh["expert"] >= 512
    slow = dataclasses.replace(V4, link_rate=V4.link_rate / 100)
    assert suggest_meshes(preset("t5_base"), slow, 64)[0].mesh["model"] == 1


def test_parameter_bytes_of_a_device_equal_those_of_the_train_program():
    mesh = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2, "mesh.fsdp": True}
    config = tiny(**mesh)
    program = TrainProgram(config, make_mesh(config))
    expected = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves(program.abstract_state.params)
    )
    suggestion = predict_mesh(config, V4, dict(program.mesh.shape), fsdp=True)
    assert suggestion.memory_bytes["parameters"] == expected


def test_compute_seconds_equal_those_of_the_cost_model():
    config = preset("switch_base")
    seconds = suggest_meshes(config, V4, 64)[0].seconds
    flops = cost_summary(config)["train_flops_per_step"]
    assert seconds["compute"] == pytest.approx(flops / 64 / V4.flops)


def suggestion_for(compiled: dict) -> MeshSuggestion:
    """The prediction for the mesh of a compile result."""
    chip, _ = chip_of_topology(compiled["topology"])
    config = preset(compiled["preset"], **{"train.accumulate": str(compiled["accumulate"])})
    return predict_mesh(config, chip, compiled["mesh"], fsdp=compiled["fsdp"])


def axis_sizes(compiled: dict) -> list[str]:
    return [f"{axis}{size}" for axis, size in compiled["mesh"].items() if size > 1]


@pytest.mark.parametrize(
    "compiled", COMPILED, ids=lambda c: "-".join([c["preset"], c["topology"], *axis_sizes(c)])
)
def test_predictions_are_near_the_compiled_program(compiled):
    """The bounds are those that the module's docstring names."""
    suggestion = suggestion_for(compiled)
    memory_gib = suggestion.memory / 2**30
    assert 0.91 < memory_gib / compiled["memory_gib"] < 1.35
    if compiled["hbm_traffic_gb"] is not None:
        chip, _ = chip_of_topology(compiled["topology"])
        traffic_gb = suggestion.seconds["memory"] * chip.memory_rate / 1e9
        assert 0.62 < traffic_gb / compiled["hbm_traffic_gb"] < 1.65
    if compiled["step_ms"] is not None:
        assert 0.78 < 1e3 * suggestion.step_seconds / compiled["step_ms"] < 1.26


def test_predictions_rank_meshes_as_compiling_does():
    meshes = [c for c in COMPILED if (c["preset"], c["topology"]) == ("switch_base", "v4:4x4x4")]
    assert len(meshes) == 3
    compiled_ms = [math.inf if c["step_ms"] is None else c["step_ms"] for c in meshes]
    predicted = [suggestion_for(c).step_seconds for c in meshes]
    assert sorted(range(3), key=compiled_ms.__getitem__) == sorted(
        range(3), key=predicted.__getitem__
    )


def test_stored_compile_results_are_those_of_the_documentation():
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.partition("<!-- ranking -->")[2].partition("<!-- end of ranking -->")[0]
    rows = [row.strip("| ").split(" | ") for row in table.strip().splitlines()[2:]]
    documented = [(row[0], row[1].split(" × ")[-1], row[4], float(row[6])) for row in rows]
    assert documented == [
        (c["preset"], c["topology"], str(c["step_ms"] or "does not fit"), c["memory_gib"])
        for c in COMPILED
        if not c["topology"].startswith("h100")
    ]


@pytest.mark.parametrize("remat", PASSES_PER_STEP)
def test_passes_per_step_are_those_of_the_traced_train_step(remat):
    config = preset("switch_base", **{"model.remat": remat, "mesh.data": "1"})
    program = TrainProgram(config, make_mesh(config))
    traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
    forward = config.data.batch_size * sum(flops_by_part(config).values())
    assert matmul_flops(traced.jaxpr, 1).total / forward == pytest.approx(
        PASSES_PER_STEP[remat], abs=0.2
    )


def test_recomputing_and_accumulating_take_less_memory_and_more_time():
    plain, full, parts = (
        suggest_meshes(preset("switch_large", **values), V4, 128)[0]
        for values in (
            {},
            {"model.remat": "full"},
            {"model.remat": "full", "train.accumulate": "4"},
        )
    )
    activations = [s.memory_bytes["activations"] for s in (plain, full, parts)]
    assert activations == sorted(activations, reverse=True)
    assert plain.seconds["compute"] < full.seconds["compute"]


def test_several_slices_cost_time_between_them():
    one, two = (suggest_meshes(preset("switch_base"), V4, 128, slices)[0] for slices in (1, 2))
    assert two.mesh["slice"] == 2
    assert "slices" not in one.seconds and two.seconds["slices"] > 0


def test_no_legal_mesh_is_an_error_that_names_the_reason():
    with pytest.raises(UserError, match=r"data\.batch_size"):
        suggest_meshes(preset("t5_base"), V4, 7)


def test_chip_and_number_of_devices_of_a_topology():
    assert chip_of_topology("v5p:8x16x16") == (CHIPS["TPU v5"], 2048)
    assert chip_of_topology("h100:64") == (CHIPS["NVIDIA H100 80GB HBM3"], 64)
    assert chip_of_topology("v5e:4x4", 2) == (CHIPS["TPU v5e"], 32)
    wrong = ("v9:2x2", "v4", "v4:", "v4:2x", "cpu:8", "v5e:0x4", "v5e:-1", "v5e:٤", "h100:9999999")
    for topology in wrong:
        with pytest.raises(UserError, match="--topology"):
            chip_of_topology(topology)


def test_the_bisection_of_a_torus_limits_an_all_to_all_of_many_devices():
    chip = Chip(1.0, link_rate=600.0, torus=3)
    # Two links long, in each of three dimensions half a link on average.
    assert all_to_all_seconds(chip, 600.0, 8) == 1.5
    # 64 links long: 4096 × 600 / 4 bytes each way through 2 × 4096 / 64 links of 100 bytes/s.
    assert all_to_all_seconds(chip, 600.0, 64**3) == pytest.approx(600 / 4 * 64 / 2 / 100)
    assert all_to_all_seconds(Chip(1.0, link_rate=600.0), 600.0, 4096) == 1.0
