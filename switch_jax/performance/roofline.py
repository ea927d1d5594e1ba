"""Roofline: lower bound on the time of a train step, from its work and the chip's rates.

A real program is slower than the roofline, because compute, memory traffic and communication
never overlap perfectly.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from switch_jax.config import Config
from switch_jax.distributed import CHIPS, Chip, all_to_all_seconds
from switch_jax.model import mfu
from switch_jax.performance.hlo import Collective

PAPER_TOKENS = 550_000 * 2**20  # training tokens of the paper: 576.7 · 10⁹

# Keys of the result of `predict_step`.
ROOFLINE_FIELDS = (
    "seconds_by_resource",
    "step_seconds_roofline",
    "binding",
    "mfu_roofline",
    "tokens_per_day",
    "days_to_paper_tokens",
)


def predict_step(
    config: Config,
    mesh: Mesh,
    flops: float,
    memory_traffic: float,
    collectives: Sequence[Collective],
    teacher: Config | None = None,
) -> dict[str, Any]:
    """Returns the least time of a step, and MFU and training time at that step time.

    Each resource of a device works at its published rate, and all of them at the same time: matrix
    units, memory, the links inside a slice, the network between slices. All values are None where
    the device's rates are unknown.

    Args:
      config: of the train step.
      mesh: devices that run it.
      flops: matmul FLOPs of a step on one device.
      memory_traffic: bytes that a device reads from and writes to its memory in a step.
      collectives: collectives of a step.
      teacher: config of the teacher in distillation.

    Returns `ROOFLINE_FIELDS`: seconds by resource and of a step, the resource that takes longest,
    MFU (0 to 1), tokens per day, and days to `PAPER_TOKENS`.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = CHIPS.get(kind)
    if chip is None or chip.memory_rate is None:
        return dict.fromkeys(ROOFLINE_FIELDS)
    seconds = {"compute": flops / chip.flops, "memory": memory_traffic / chip.memory_rate}
    seconds |= network_seconds(chip, collectives, mesh.shape["slice"])
    binding = max(seconds, key=lambda name: seconds[name])
    step = seconds[binding]
    tokens = config.data.batch_size * config.data.inputs_length
    return {
        "seconds_by_resource": seconds,
        "step_seconds_roofline": step,
        "binding": binding,
        "mfu_roofline": mfu(config, step, kind, mesh.devices.size, teacher),
        "tokens_per_day": tokens / step * 86400,
        "days_to_paper_tokens": PAPER_TOKENS * step / tokens / 86400,
    }


def network_seconds(chip: Chip, collectives: Sequence[Collective], slices: int) -> dict[str, float]:
    """Returns the seconds that `links` inside a slice, and the network between `slices`, are busy.

    `slices` is in the result only if there are several.
    """
    inside = between = 0.0
    for collective in collectives:
        devices, sent = collective.devices, collective.bytes_sent
        if "slice" in collective.axes:
            # Reduced within each slice first: every device then sends its part between slices.
            devices //= slices
            between += sent / devices / (chip.slice_rate or math.inf)
        if devices == 1:
            continue
        if collective.kind == "all-to-all":
            inside += all_to_all_seconds(chip, sent, devices)
        elif chip.link_rate:
            inside += sent / chip.link_rate
    return {"links": inside} | ({"slices": between} if slices > 1 else {})


def matmul_flops(jaxpr: Any, devices: int) -> float:
    """Returns the FLOPs of all matmuls of a traced program, over all devices.

    Recomputation counts. The body of a `shard_map` runs on each of `devices`. A loop of unknown
    length, such as that of dropless experts, counts once.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        times = {"scan": params.get("length"), "shard_map": devices}.get(name, 1)
        inner = [
            matmul_flops(value, devices)
            for param in params.values()
            for value in (param if isinstance(param, tuple | list) else (param,))
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total
