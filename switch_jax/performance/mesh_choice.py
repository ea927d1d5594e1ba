"""Mesh choice: the mesh of a config that gives none, from the ranking of `mesh_search.py`."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from switch_jax.config import Config, MeshConfig
from switch_jax.distributed import CHIPS
from switch_jax.performance.mesh_search import MeshSuggestion, suggest_meshes
from switch_jax.training import teacher_config


def choose_mesh(config: Config, devices: Sequence[jax.Device]) -> MeshSuggestion | None:
    """Returns the mesh over `devices` that fits and has the shortest predicted step.

    Where none fits, it is the one that needs least memory. Returns None where nothing is to be
    chosen: the config gives sizes, there is one device, or the rates of the devices are not known;
    then `make_mesh` splits the batch over all devices. Losses do not depend on the choice.

    Raises `UserError` where no mesh is legal, or the config's teacher does not fit.
    """
    given = dataclasses.replace(config.mesh, fsdp=False) != MeshConfig()
    if given or len(devices) == 1 or devices[0].device_kind not in CHIPS:
        return None
    suggestions = _suggestions(config, devices)
    best = suggestions[0]
    return best if best.fits else min(suggestions, key=lambda suggestion: suggestion.memory)


def fitting_mesh(config: Config, devices: Sequence[jax.Device]) -> MeshSuggestion | None:
    """Returns the mesh with the shortest predicted step of those that fit, whatever config.mesh is.

    Returns None where none is predicted to fit, or the rates of the devices are not known.
    """
    if devices[0].device_kind not in CHIPS:
        return None
    config = dataclasses.replace(config, mesh=MeshConfig())
    best = _suggestions(config, devices)[0]
    return best if best.fits else None


def _suggestions(config: Config, devices: Sequence[jax.Device]) -> list[MeshSuggestion]:
    chip = CHIPS[devices[0].device_kind]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return suggest_meshes(config, chip, len(devices), slices, teacher_config(config))


def with_mesh(config: Config, suggestion: MeshSuggestion | None) -> Config:
    """Returns the config with the sizes of a chosen mesh; the same config for None."""
    if suggestion is None:
        return config
    mesh = MeshConfig(**suggestion.mesh, fsdp=suggestion.fsdp)
    return dataclasses.replace(config, mesh=mesh)


def describe_choice(suggestion: MeshSuggestion, num_devices: int) -> str:
    """Returns a sentence that says which mesh was chosen, and why."""
    sizes = [f"mesh.{axis}={size}" for axis, size in suggestion.mesh.items() if size > 1]
    sizes += ["mesh.fsdp=True"] if suggestion.fsdp else []
    reason = (
        f"it fits and has the shortest predicted step, {1e3 * suggestion.step_seconds:,.0f} ms"
        if suggestion.fits
        else "none is predicted to fit, and it needs least memory,"
        f" {suggestion.memory / 2**30:,.1f} GiB of a device"
    )
    used = math.prod(suggestion.mesh.values())
    return f"chose {' '.join(sizes)} for {used} of {num_devices} devices: {reason}"
