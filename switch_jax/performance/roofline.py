"""Two predictions of the time of a train step: the roofline and the compiler's cost model.

The roofline is a lower bound from the step's work and the chip's rates, and so its MFU is an upper
bound: compute, memory traffic and communication never overlap perfectly. XLA's cost model knows the
instructions, but neither kernels nor copies that run beside them; it overlaps nothing.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from switch_jax.config import Config
from switch_jax.distributed import CHIPS, Chip, all_to_all_seconds, axes_span
from switch_jax.model import mfu
from switch_jax.performance.hlo import Collective

PAPER_TOKENS = 550_000 * 2**20  # training tokens of the paper: 576.7 · 10⁹

# Keys of the result of `predict_step`.
ROOFLINE_FIELDS = (
    "seconds_by_resource",
    "step_seconds_roofline",
    "binding",
    "mfu_roofline",
    "step_seconds_estimated",
    "mfu_estimated",
    "tokens_per_day",
    "days_to_paper_tokens",
)


class Flops(NamedTuple):
    """Matmul FLOPs of a traced program, over all devices."""

    total: float = 0.0
    in_kernels: float = 0.0  # part of `total` in Pallas kernels
    # Loops, and grids of kernels, whose length depends on data; each counts as one iteration.
    unknown_loops: int = 0

    def times(self, n: float) -> "Flops":
        """Returns the FLOPs of `n` executions."""
        return Flops(n * self.total, n * self.in_kernels, self.unknown_loops)

    def plus(self, other: "Flops") -> "Flops":
        """Returns the FLOPs of both."""
        return Flops(
            self.total + other.total,
            self.in_kernels + other.in_kernels,
            self.unknown_loops + other.unknown_loops,
        )


class StepWork(NamedTuple):
    """Work of a compiled train step on one device."""

    flops: float  # of matmuls
    kernel_flops: float  # part of `flops` in Pallas kernels
    memory_traffic: float  # bytes read from and written to the device's memory
    collectives: Sequence[Collective]
    cycles: int | None = None  # by XLA's cost model, without kernels; None where it has none


def predict_step(
    config: Config, mesh: Mesh, work: StepWork, teacher: Config | None = None
) -> dict[str, Any]:
    """Returns the least time of a step and XLA's estimate, and MFU and training time at them.

    In the roofline each resource of a device works at its published rate, and all of them at the
    same time: matrix units, memory, the links inside a slice, the network between slices. XLA's
    estimate is the sum of the estimated cycles of all instructions, and kernels at the rate of the
    matrix units. All values are None where the device's rates are unknown.

    Args:
      config: of the train step.
      mesh: devices that run it.
      work: of one device.
      teacher: config of the teacher in distillation.

    Returns `ROOFLINE_FIELDS`: seconds by resource and of a step, the resource that takes longest,
    MFU (0 to 1) at that time; seconds of a step by XLA's cost model and MFU at that time; tokens
    per day and days to `PAPER_TOKENS` by the roofline.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = CHIPS.get(kind)
    if chip is None or chip.memory_rate is None:
        return dict.fromkeys(ROOFLINE_FIELDS)
    seconds = {
        "compute": work.flops / chip.flops,
        "memory": work.memory_traffic / chip.memory_rate,
        **network_seconds(chip, work.collectives, mesh.shape),
    }
    binding = max(seconds, key=lambda name: seconds[name])
    step, estimated = seconds[binding], None
    if work.cycles is not None and chip.clock is not None:
        estimated = work.cycles / chip.clock + work.kernel_flops / chip.flops
    tokens = config.data.batch_size * config.data.inputs_length
    return {
        "seconds_by_resource": seconds,
        "step_seconds_roofline": step,
        "binding": binding,
        "mfu_roofline": mfu(config, step, kind, mesh.devices.size, teacher),
        "step_seconds_estimated": estimated,
        "mfu_estimated": estimated and mfu(config, estimated, kind, mesh.devices.size, teacher),
        "tokens_per_day": tokens / step * 86400,
        "days_to_paper_tokens": PAPER_TOKENS * step / tokens / 86400,
    }


def network_seconds(
    chip: Chip, collectives: Sequence[Collective], mesh_shape: Mapping[str, int]
) -> dict[str, float]:
    """Returns the seconds that `links` inside a slice, and the network between `slices`, are busy.

    `slices` is in the result only if there are several. The links of GPUs are those of a host, or
    for groups on several hosts the network between these.
    """
    inside = between = 0.0
    slices = mesh_shape["slice"]
    for collective in collectives:
        devices, sent = collective.devices, collective.bytes_sent
        if "slice" in collective.axes:
            # Reduced within each slice first: every device then sends its part between slices.
            devices //= slices
            between += sent / devices / (chip.slice_rate or math.inf)
        if devices == 1:
            continue
        span = axes_span(mesh_shape, collective.axes)
        if collective.kind == "all-to-all":
            inside += all_to_all_seconds(chip, sent, devices, span)
        else:
            inside += sent / (chip.rate_within(span) or math.inf)
    return {"links": inside} | ({"slices": between} if slices > 1 else {})


def matmul_flops(jaxpr: Any, devices: int) -> Flops:
    """Returns the FLOPs of all matmuls of a traced program, over all devices.

    Recomputation counts. The body of a `shard_map` runs on each of `devices`, the body of a Pallas
    kernel once per element of its grid.
    """
    total = Flops()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total = total.plus(Flops(2.0 * depth * math.prod(equation.outvars[0].aval.shape)))
            continue
        inner = [
            matmul_flops(value, devices)
            for param in params.values()
            for value in (param if isinstance(param, tuple | list) else (param,))
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        if name == "cond":
            total = total.plus(max(inner, default=Flops()))
            continue
        body = functools.reduce(Flops.plus, inner, Flops())
        if name == "scan":
            body = body.times(params["length"])
        elif name == "shard_map":
            body = body.times(devices)
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            known = [size for size in grid if isinstance(size, int)]
            flops = math.prod(known) * body.total
            unknown = len(grid) > len(known) and body.total > 0
            body = Flops(flops, flops, body.unknown_loops + unknown)
        elif name == "while":
            body = body._replace(unknown_loops=body.unknown_loops + (body.total > 0))
        total = total.plus(body)
    return total
