"""Ahead-of-time compilation for machines that are not attached."""

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from switch_jax.distributed.hardware import Chip
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.flops import flops_by_part
from switch_jax.performance.compile import _needed_and_available_bytes, remedy
from switch_jax.performance.compile_target import CompileTarget
from switch_jax.performance.hlo import Collective
from switch_jax.performance.placement_plot import draw_placement
from switch_jax.performance.roofline import matmul_flops, network_seconds
from switch_jax.training.step import TrainProgram
from tests.support import runs
from tests.support.configs import tiny

CONFIG = """
from switch_jax.config import defaults

def get_config(arg=""):
    config = defaults()
    config.model.update(
        vocab_size=64, d_model=16, d_ff=32, num_heads=2, head_dim=8, dtype="float32",
        num_encoder_layers=1, num_decoder_layers=1,
    )
    config.moe.update(num_experts=4, every=1, min_capacity=1, group_size=16)
    config.data.update(inputs_length=16, targets_length=8, batch_size=16)
    config.optimizer.name = "sgd"
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compile") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    return {"SWITCH_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


def compile_arguments(config_file, *more: object) -> list[object]:
    mesh = ["--config.mesh.data=2", "--config.mesh.expert=2", "--config.mesh.model=2"]
    return ["compile", "--config", config_file, "--topology", "cpu:8", *mesh, *more]


@pytest.fixture(scope="module")
def result(config_file, cache) -> dict:
    return json.loads(runs.run(*compile_arguments(config_file, "--json"), **cache)[0])


def test_json_has_the_documented_values(result):
    assert result["devices"] == 8 and result["fits"] is True
    assert result["mesh"] == {"slice": 1, "data": 2, "expert": 2, "model": 2}
    assert result["hbm_bytes_per_device"] == result["argument_bytes"] + result["temp_bytes"]
    assert 0 < result["hbm_bytes_per_device"] < result["hbm_available_bytes"]
    assert result["parameter_bytes"] <= result["argument_bytes"]
    assert result["compile_seconds"] > 0 and result["flops_per_device"] > 0
    assert result["collective_bytes"]["all-to-all"].keys() == {"expert"}
    assert set(result["collective_bytes"]["all-reduce"]) >= {"data+expert", "model"}
    # The rates of a CPU are unknown.
    assert result["step_seconds_roofline"] is result["mfu_roofline"] is None
    placement = result["parameters"]["encoder/runs/0/layers/0/mlp/experts/wi"]
    assert placement == {
        "shape": [1, 4, 16, 32],
        "spec": [None, ["expert"], None, ["model"]],
        "shard": [1, 2, 16, 16],
    }


def test_a_program_is_compiled_once_and_plotted(config_file, cache, result, tmp_path):
    picture = tmp_path / "placement.png"
    (cached,) = Path(cache["SWITCH_JAX_CACHE"], "compile").glob("*.json")
    cached.write_text(json.dumps(json.loads(cached.read_text()) | {"compile_seconds": 12345}))
    out, _ = runs.run(*compile_arguments(config_file, "--output", picture), **cache)
    assert "compiled in 12345 s" in " ".join(out.split())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_impossible_meshes_and_topologies_are_an_error_of_one_sentence(config_file):
    arguments = ["compile", "--config", config_file, "--topology", "cpu:8"]
    _, err = runs.run(*arguments, "--config.mesh.expert=3", code=2)
    assert "mesh.expert can be" in err and err.strip().count("\n") == 0, err
    for topology, slices, words in (
        ("cpu", 1, "cpu:8"),
        ("cpu:8", 2, "--slices is for TPUs"),
        ("gpu", 1, "No GPU"),
    ):
        with pytest.raises(UserError, match=words):
            CompileTarget(topology, slices).devices()


def test_memory_is_parsed_from_the_error_of_the_compiler():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (39.20G) exceeds available HBM (30.75G)."
    )
    assert _needed_and_available_bytes(RuntimeError(message)) == (
        int(39.2 * 2**30),
        int(30.75 * 2**30),
    )
    with pytest.raises(RuntimeError, match="else"):
        _needed_and_available_bytes(RuntimeError("something else (3G) went wrong (4G)"))


def test_the_remedy_names_memory_by_part_and_a_compiled_change(monkeypatch):
    config, target = tiny(**{"mesh.data": 2}), CompileTarget("v4:2x2x1")
    result = {
        "device_kind": "TPU v4",
        "mesh": {"slice": 1, "data": 2, "expert": 1, "model": 1},
        "fsdp": False,
        "hbm_bytes_per_device": 40 * 2**30,
        "hbm_available_bytes": 30 * 2**30,
        "parameter_bytes": 8 * 2**30,
        "optimizer_bytes": 2 * 2**30,
        "teacher_bytes": 3 * 2**30,
    }
    tried = []

    def compile_step(changed, _):
        tried.append((changed.mesh.fsdp, changed.model.remat, changed.train.accumulate))
        return {"fits": changed.train.accumulate == 2}

    monkeypatch.setattr("switch_jax.performance.compile.compile_step", compile_step)
    # The two chips of which no other mesh is proposed: their kind has no known rates.
    unknown = [SimpleNamespace(device_kind="TPU v99")] * 2
    monkeypatch.setattr(CompileTarget, "devices", lambda _: unknown)
    sentence = remedy(config, target, result)
    assert "40.00 GiB of a TPU v4's 30.00 GiB, 10.00 GiB too many" in sentence
    assert "parameters 8.00 GiB, optimizer 2.00 GiB, teacher 3.00 GiB" in sentence
    assert "activations 27.00" in sentence
    assert "--config.model.remat=full --config.train.accumulate=2 it fits" in sentence
    assert tried == [(True, "none", 1), (False, "full", 1), (False, "full", 2)]
    monkeypatch.setattr("switch_jax.performance.compile.compile_step", lambda *_: {"fits": False})
    assert "more chips" in remedy(config, target, result)


def test_traced_flops_equal_those_of_the_cost_model():
    """Forward as computed; a train step takes three times that, four with recomputation."""
    values = {"mesh.data": 2, "mesh.expert": 2, "moe.eval_capacity_factor": 1.25}
    forward = sum(flops_by_part(tiny(**values)).values())
    for remat, passes in (("none", 3), ("full", 4)):
        config = tiny(**values, **{"model.remat": remat})
        program = TrainProgram(config, make_mesh(config))
        step = program.train_step.trace(program.abstract_state, program.abstract_batch)
        flops = matmul_flops(step.jaxpr, 4).total / config.data.batch_size
        logits = flops_by_part(config)["logits"]  # outside of what is recomputed
        expected = passes * forward - (logits if passes == 4 else 0)
        assert flops == pytest.approx(expected, rel=0.02)
        evaluation = program.sharded.eval_step.trace(
            program.abstract_state.params, program.abstract_batch
        )
        flops = matmul_flops(evaluation.jaxpr, 4).total / config.data.batch_size
        assert flops == pytest.approx(forward, rel=1e-6)


def test_tiles_of_a_kernel_whose_number_depends_on_data_are_said():
    """The kernel of dropless experts: 2 × 3 known tiles of the weights, those of rows unknown."""
    jaxpr = jax.make_jaxpr(lambda *arrays: gmm(*arrays, jnp.float32, (128, 128, 128)))(
        jnp.zeros((512, 256)), jnp.zeros((4, 256, 384)), jnp.zeros(4, jnp.int32)
    )
    flops = matmul_flops(jaxpr.jaxpr, 1)
    assert flops == (2 * 3 * 2 * 128**3, flops.total, 1)


def test_roofline_by_hand():
    chip = Chip(100.0, memory_rate=10.0, link_rate=4.0, slice_rate=1.0, torus=2)
    mesh = {"slice": 1, "data": 4, "expert": 1, "model": 1}
    inside = Collective("all-reduce", ("data",), 4, size=8, times=2)  # sends 2 · 3/4 · 8 · 2
    assert network_seconds(chip, [inside], mesh) == {"links": 6.0}
    # Over two slices of four: 2 · 7/8 · 8 bytes inside; each device sends a quarter between slices.
    across = Collective("all-reduce", ("slice", "data"), 8, size=8, times=1)
    seconds = network_seconds(chip, [across], mesh | {"slice": 2})
    assert seconds == {"links": 3.5, "slices": 3.5}


def test_groups_on_several_hosts_of_gpus_use_the_network_between_them():
    chip = Chip(100.0, memory_rate=10.0, link_rate=8.0, slice_rate=2.0)  # no torus: GPUs
    mesh = {"slice": 1, "data": 2, "expert": 8, "model": 1}
    on_a_host = Collective("all-gather", ("expert",), 8, size=8, times=1)  # sends 7
    assert network_seconds(chip, [on_a_host], mesh) == {"links": 7 / 8}
    across = Collective("all-gather", ("data",), 2, size=8, times=1)  # sends 4, to another host
    assert network_seconds(chip, [across], mesh) == {"links": 4 / 2}
    exchange = Collective("all-to-all", ("data", "expert"), 16, size=16, times=1)  # sends 15
    assert network_seconds(chip, [exchange], mesh) == {"links": 15 / 2}


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for layers in (4, 12):
        depth = {"model.num_encoder_layers": layers, "model.num_decoder_layers": layers}
        config = tiny(**depth, **{"mesh.data": 2, "mesh.expert": 2})
        program = TrainProgram(config, make_mesh(config))
        lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
        sizes.append(len(lowered.as_text()))
    # The growth comes from the metrics of each layer, which are separate scalars.
    assert sizes[1] < 1.2 * sizes[0]


@pytest.mark.skipif(
    not any(d.metadata["Name"] == "libtpu" for d in metadata.distributions()),
    reason="the TPU compiler is not installed",
)
def test_the_tpu_compilers_all_to_all_is_in_bfloat16(config_file, cache):
    more = ["--config.model.dtype=bfloat16", "--config.mesh.data=2", "--config.mesh.expert=2"]
    arguments = ["compile", "--config", config_file, "--topology", "v5e:2x2", *more, "--json"]
    result = json.loads(runs.run(*arguments, **cache)[0])
    assert result["device_kind"] == "TPU v5 lite" and result["fits"]
    assert result["hbm_available_bytes"] == int(15.75 * 2**30)
    assert result["binding"] in ("compute", "memory", "links")
    assert 0 < result["mfu_roofline"] < 1
    layers = json.loads(runs.run("inspect", "--config", config_file, "--json")[0])["moe"]
    # A device's slots: those of 4 experts in the groups of its 4 rows. Half of them stay local.
    slots = sum(4 * layer["capacity"] * 4 // layer["group_rows"] for layer in layers)
    (exchanged,) = result["collective_bytes"]["all-to-all"].values()
    assert exchanged == 4 * slots * 16 * 2 // 2


def test_placement_plots_of_a_large_mesh(tmp_path, result):
    """Squares of many devices have no outlines; some parameters are not split."""
    large = result | {"mesh": {"slice": 2, "data": 4, "expert": 64, "model": 1}, "devices": 512}
    draw_placement(large, tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1000
