"""The least time a train step can take on a machine, from what it does and the chips' rates.

No program is faster; real ones are slower, for nothing overlaps perfectly.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from switch_jax.config import Config
from switch_jax.distributed import CHIPS, Chip, all_to_all_seconds
from switch_jax.model import mfu
from switch_jax.performance.hlo import Collective

PAPER_TOKENS = 550_000 * 2**20  # what the paper trains on: 576.7 · 10⁹

# What `predict` returns.
FIELDS = (
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
    traffic: float,
    collectives: Sequence[Collective],
    teacher: Config | None = None,
) -> dict[str, Any]:
    """The least time of a step if everything overlaps, and what it would mean.

    Each resource of a device works at its published rate: matrix units, memory, the links inside a
    slice, the network between slices. None where the device's rates are not known to us.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = CHIPS.get(kind)
    if chip is None or chip.memory_rate is None:
        return dict.fromkeys(FIELDS)
    seconds = {"compute": flops / chip.flops, "memory": traffic / chip.memory_rate}
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
    """Seconds that the links inside a slice, and the network between slices, are busy."""
    inside = between = 0.0
    for one in collectives:
        devices = one.devices
        if "slice" in one.axes:
            # First within each slice; then every device has its share of what crosses slices.
            devices //= slices
            between += one.sent / devices / (chip.slice_rate or math.inf)
        if devices == 1:
            continue
        if one.kind == "all-to-all":
            inside += all_to_all_seconds(chip, one.sent, devices)
        elif chip.link_rate:
            inside += one.sent / chip.link_rate
    return {"links": inside} | ({"slices": between} if slices > 1 else {})


def matmul_flops(jaxpr: Any, devices: int) -> float:
    """FLOPs of all matmuls of a traced program, over all devices, recomputation included.

    What is inside a `shard_map` runs on each of `devices`. A loop of unknown length, as of
    dropless experts, counts once.
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
