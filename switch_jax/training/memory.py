"""Memory check of a run: whether a device can hold the state and a batch, before any allocation."""

import jax

from switch_jax.distributed import bytes_per_device, device_memory_bytes
from switch_jax.errors import UserError
from switch_jax.model import format_si
from switch_jax.training.step import TrainProgram

_HOST = "pinned_host"  # memory kind of a state that is on the host between two steps


def check_memory(program: TrainProgram) -> None:
    """Raises `UserError` where state, teacher and batch need more than the memory of a device.

    Gradients and activations need memory, too: what passes may still not fit, and `switch-jax
    compile` says whether it does.
    """
    devices = [*program.mesh.devices.flat]
    available = device_memory_bytes(devices)
    state = program.abstract_state
    on_device = [
        leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.sharding.memory_kind != _HOST
    ]
    sizes = {
        "parameters": bytes_per_device((state.params, state.weights)),
        "optimizer state": bytes_per_device(on_device),
        "teacher": bytes_per_device(program.abstract_teacher),
        "a batch": bytes_per_device(program.abstract_batch),
    }
    needed = sum(sizes.values())
    if available is None or needed <= available:
        return
    parts = ", ".join(f"{name} {format_si(size, 'B')}" for name, size in sizes.items() if size)
    raise UserError(
        f"Training needs {format_si(needed, 'B')} on a device ({parts}), and a"
        f" {devices[0].device_kind} has {format_si(available, 'B')}; make the model or the batch"
        " smaller (model.*, moe.num_experts, data.*), or split them over more devices (mesh.*)."
    )
