"""Meshes that are chosen where a config gives none."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from switch_jax.config import load_config
from switch_jax.distributed import CHIPS, check_mesh
from switch_jax.performance import CompileTarget, choose_mesh, describe_choice, remedy, with_mesh
from switch_jax.performance.mesh_choice import fitting_mesh
from tests.support.configs import tiny


def described(kind: str, count: int, slices: int = 1) -> list[SimpleNamespace]:
    """Devices that are only described, as the TPU compiler does."""
    return [
        SimpleNamespace(device_kind=kind, slice_index=i * slices // count) for i in range(count)
    ]


@pytest.mark.parametrize(
    "preset, kind, count, slices",
    [
        ("switch_c", "TPU v4", 1024, 1),
        ("switch_base", "TPU v4", 64, 1),
        ("switch_base", "TPU v5 lite", 512, 2),
        ("switch_xxl", "TPU v5", 512, 1),
        ("switch_base", "NVIDIA H100 80GB HBM3", 64, 1),
    ],
)
def test_the_chosen_mesh_of_a_preset_is_legal_and_fits(preset, kind, count, slices):
    config = load_config(preset)
    chosen = choose_mesh(config, described(kind, count, slices))
    assert chosen.fits and chosen.memory <= CHIPS[kind].memory
    assert chosen.mesh["slice"] == slices
    placed = with_mesh(config, chosen)
    check_mesh(placed, chosen.mesh)
    sentence = describe_choice(chosen, count)
    assert f"for {count} of {count} devices: it fits" in sentence
    sizes = {axis: int(n) for axis, n in re.findall(r"mesh\.(\w+)=(\d+)", sentence)}
    assert sizes == {axis: n for axis, n in chosen.mesh.items() if n > 1}


def test_a_given_mesh_is_obeyed_and_nothing_is_chosen_without_a_choice():
    devices = described("TPU v4", 8)
    assert choose_mesh(tiny(), devices) is not None
    for mesh in ({"mesh.expert": 4}, {"mesh.data": 8}, {"mesh.model": 2}, {"mesh.slice": 2}):
        assert choose_mesh(tiny(**mesh), devices) is None, mesh
    assert choose_mesh(tiny(), devices[:1]) is None
    assert choose_mesh(tiny(), described("cpu", 8)) is None, "rates are not known"
    assert with_mesh(tiny(), None) == tiny()


def test_fsdp_alone_is_kept_and_leaves_the_sizes_to_the_choice():
    chosen = choose_mesh(tiny(**{"mesh.fsdp": True}), described("TPU v4", 8))
    assert chosen.fsdp


def test_where_none_fits_the_mesh_with_the_least_memory_is_taken():
    config, devices = load_config("switch_c"), described("TPU v4", 64)
    chosen = choose_mesh(config, devices)
    assert not chosen.fits
    assert "none is predicted to fit" in describe_choice(chosen, 64)
    assert fitting_mesh(config, devices) is None


def test_a_mesh_that_does_not_fit_is_answered_with_one_that_does(monkeypatch):
    """The paper's largest model with its parameters whole on each chip."""
    config = load_config("switch_c", {"mesh.data": "1024", "mesh.expert": "1"})
    target = CompileTarget("v4:8x8x16")
    monkeypatch.setattr(CompileTarget, "devices", lambda _: described("TPU v4", 1024))
    tried = []

    def compiled(changed, _):
        tried.append(changed.mesh)
        return {"fits": changed.mesh.expert > 1}

    monkeypatch.setattr("switch_jax.performance.compile.compile_step", compiled)
    result = {"device_kind": "TPU v4", "mesh": {"data": 1024}, "fsdp": False}
    sizes = ("hbm_bytes_per_device", "parameter_bytes", "optimizer_bytes", "teacher_bytes")
    result |= dict.fromkeys(sizes, 2**44) | {"hbm_available_bytes": 30 * 2**30}
    sentence = remedy(config, target, result)
    best = fitting_mesh(config, described("TPU v4", 1024))
    assert f"--config.mesh.expert={best.mesh['expert']}" in sentence and "it fits" in sentence
    assert dataclasses.asdict(tried[-1]) == {**best.mesh, "fsdp": best.fsdp}
