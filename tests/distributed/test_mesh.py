"""Meshes: sizes of axes, checks that they divide, and their error messages."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from switch_jax.config.schema import MeshConfig
from switch_jax.distributed.mesh import check_mesh, make_mesh, resolve_mesh
from switch_jax.distributed.sharding import (
    LOGICAL_AXIS_RULES,
    MESH_AXES,
    num_batch_shards,
    partition_spec,
)
from switch_jax.errors import UserError
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny


def mesh_error(**overrides) -> str:
    with pytest.raises(UserError) as error:
        make_mesh(tiny(**overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def number_after(text: str, message: str) -> int:
    match = re.search(re.escape(text) + r" (\d+)", message)
    assert match, message
    return int(match[1])


@pytest.mark.parametrize(
    "mesh, devices, expected",
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"expert": 4}, 8, (1, 2, 4, 1)),
        ({"data": 2, "expert": -1, "model": 2}, 8, (1, 2, 2, 2)),
        ({"slice": 2, "expert": 2}, 8, (2, 2, 2, 1)),
        ({"data": 1, "model": -1}, 6, (1, 1, 1, 6)),
        ({}, 1, (1, 1, 1, 1)),
        ({"data": 2, "expert": 2}, 8, (1, 2, 2, 1)),  # fewer than all devices
        ({"expert": 3}, 8, (1, 2, 3, 1)),  # -1 is rounded down
    ],
)
def test_free_axes_get_the_remaining_devices(mesh, devices, expected):
    assert tuple(resolve_mesh(MeshConfig(**mesh), devices).values()) == expected


def test_a_product_below_the_device_count_uses_the_first_devices():
    mesh = make_mesh(tiny(**{"mesh.data": 2, "mesh.expert": 2}))
    assert mesh.axis_names == MESH_AXES
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert num_batch_shards(mesh) == 4


def test_a_mesh_of_too_many_devices_is_refused_with_their_number():
    message = mesh_error(**{"mesh.data": 4, "mesh.expert": 4})
    assert "data=4" in message and "expert=4" in message and "16" in message
    assert number_after("product of mesh.* at most", message) == 8


@pytest.mark.parametrize(
    "axis, size, given, overrides",
    [
        ("model", 3, "model.num_heads=2", {}),
        ("model", 4, "model.d_ff=6", {"model.num_heads": 4, "model.d_ff": 6}),
        ("model", 4, "model.vocab_size=30", {"model.num_heads": 4, "model.vocab_size": 30}),
        ("model", 4, "model.d_model=6", {"model.num_heads": 4, "model.d_model": 6}),
        ("expert", 8, "moe.num_experts=4", {}),
        (
            "data",
            8,
            "model.d_model=12",
            {"model.d_model": 12, "mesh.fsdp": True, "data.batch_size": 24},
        ),
    ],
)
def test_an_indivisible_size_is_refused_with_its_key_and_possible_sizes(
    axis, size, given, overrides
):
    overrides = {"mesh.data": 1} | overrides
    message = mesh_error(**(overrides | {f"mesh.{axis}": size}))
    assert given in message and f"mesh.{axis}={size}" in message
    match = re.search(rf"mesh\.{axis} can be ([\d, ]+)\.", message)
    suggestions = [int(number) for number in match[1].split(",")]
    assert len(suggestions) > 1
    for suggestion in (size for size in suggestions if size <= len(jax.devices())):
        make_mesh(tiny(**(overrides | {f"mesh.{axis}": suggestion})))


def test_long_lists_of_sizes_are_shortened():
    dims = ("num_heads", "d_ff", "d_model", "vocab_size")
    config = tiny(**{f"model.{name}": 5040 for name in dims})
    with pytest.raises(UserError, match=r"can be 1, 2, .* …\."):
        check_mesh(config, {"slice": 1, "data": 1, "expert": 1, "model": 11})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_indivisible_microbatch_is_refused_with_a_batch_size_that_divides(accumulate):
    overrides = {"train.accumulate": accumulate, "mesh.data": 4}
    message = mesh_error(**overrides, **{"data.batch_size": 6})
    assert "data.batch_size" in message and f"of {6 // accumulate} rows" in message
    suggestion = number_after("data.batch_size a multiple of", message)
    assert suggestion == 4 * accumulate
    make_mesh(tiny(**overrides, **{"data.batch_size": suggestion, "moe.group_size": 8}))


@pytest.mark.parametrize(
    "overrides",
    [
        {"mesh.data": 8},
        {"mesh.data": 4, "train.accumulate": 2},
        {"mesh.data": 4, "data.batch_size": 24},
        {"mesh.data": 8, "data.inputs_length": 8, "data.targets_length": 16},
        {"mesh.data": 8, "data.targets_length": 3},
    ],
)
def test_a_group_across_unsuitable_devices_is_refused_with_a_group_size_that_fits(overrides):
    message = mesh_error(**overrides, **{"moe.group_size": 64})
    suggestion = number_after("moe.group_size to", message)
    make_mesh(tiny(**overrides, **{"moe.group_size": suggestion}))


def test_a_dense_model_needs_no_divisible_groups_or_experts():
    dense = {"moe.num_experts": 0, "mesh.data": 2, "mesh.expert": 4}
    make_mesh(tiny(**dense, **{"moe.group_size": 8192}))


def test_every_logical_axis_has_a_rule_and_unknown_axes_raise():
    assert partition_spec(("layers", "expert", "embed", "mlp")) == P(None, "expert", None, "model")
    assert partition_spec(("layers", "expert", "embed", "mlp"), fsdp=True) == P(
        None, "expert", "data", "model"
    )
    assert partition_spec(("batch", None)) == P(("slice", "data", "expert"), None)
    used = {
        a
        for rule in LOGICAL_AXIS_RULES.values()
        for a in ((rule,) if isinstance(rule, str) else rule or ())
    }
    assert used == {*MESH_AXES, "fsdp"}
    with pytest.raises(KeyError, match="embedd"):
        partition_spec(("vocab", "embedd"))


def test_optimizer_memory_host_is_refused_without_host_memory():
    config = tiny(**{"optimizer.memory": "host"})
    with pytest.raises(UserError, match=r"optimizer\.memory=device"):
        TrainProgram(config, make_mesh(config))
