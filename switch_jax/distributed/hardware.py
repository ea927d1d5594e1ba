"""Hardware: published rates of accelerators, and memory of the devices that are attached."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from switch_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates and sizes of one JAX device; None where they are not known."""

    flops: float  # dense bfloat16, FLOP/s
    memory_rate: float | None = None  # main memory (HBM), bytes/s
    link_rate: float | None = None  # all links within a slice or box together, one way, bytes/s
    torus: int = 0  # dimensions of a slice's network; 0: every chip has a link to every other
    # A chip's share of the network between TPU slices, or between hosts of GPUs, bytes/s.
    slice_rate: float | None = None
    memory: int | None = None  # bytes a program may use; of a TPU: the compiler's limit
    clock: float | None = None  # of a TPU's cores, Hz

    def rate_within(self, span: int) -> float | None:
        """Rate of a chip to others among `span` consecutive ones of a slice or of hosts, bytes/s.

        The links of a GPU end at its host.
        """
        on_one_host = self.torus > 0 or span <= GPUS_PER_HOST
        return self.link_rate if on_one_host else self.slice_rate or self.link_rate


GPUS_PER_HOST = 8
"""GPUs of a host, which NVLink connects."""
_MAX_DEVICES = 2**20  # of a described machine


def _gib(value: float) -> int:
    """Bytes of `value` GiB; 1.074 GB are one GiB."""
    return int(value * 2**30)


# By `jax.Device.device_kind`. Exact names: a fraction of a GPU (MIG) or another board of the same
# family is another device. TPU v2, v3 and 7x chips are two devices each, with half of the chip's
# figures.
#
# Sources. TPU FLOP/s and links: Google's pages (cloud.google.com/tpu/docs/v4, …). HBM rates: JAX's
# table (`jax.experimental.pallas.tpu.get_tpu_info`); Google's pages have 1200 (v4), 800 (v5e), 2765
# (v5p) and 1600 GB/s (v6e). Memory: what the TPU's compiler lets a program use. `slice_rate` of
# v4 and v5p: 200 Gb/s for a host of four chips. Clock: FLOP/s / (2 · multipliers of the matrix
# units), which are 8 · 128² in v4 and v5p, 4 · 128² in v5e and 4 · 256² in v6e.
# GPU: NVIDIA's data sheets; between hosts, one network adapter per GPU as in its DGX systems, of
# 200 (A100) or 400 Gb/s.
CHIPS = {
    "TPU v2": Chip(22.5e12),
    "TPU v3": Chip(61.5e12),
    "TPU v4": Chip(275e12, 1230e9, 300e9, 3, 6.25e9, _gib(30.75), 1.05e9),
    "TPU v5 lite": Chip(197e12, 820e9, 200e9, 2, 3.125e9, _gib(15.75), 1.5e9),
    "TPU v5": Chip(459e12, 2460e9, 600e9, 3, 6.25e9, _gib(95.74), 1.75e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 400e9, 2, 12.5e9, _gib(31.25), 1.75e9),
    "TPU7x": Chip(1153.5e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1555e9, 300e9, slice_rate=25e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 300e9, slice_rate=25e9, memory=_gib(80)),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1935e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 450e9, slice_rate=50e9, memory=_gib(80)),
    "NVIDIA H100 PCIe": Chip(756e12, 2000e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 450e9, slice_rate=50e9, memory=_gib(141 / 1.074)),
    "NVIDIA B200": Chip(2250e12, 8000e9, 900e9, slice_rate=50e9, memory=_gib(192 / 1.074)),
    "NVIDIA GB200": Chip(2500e12, 8000e9, 900e9),
}
"""Published rates and memory of accelerators, by `jax.Device.device_kind`."""

# Other names of the same devices.
CHIPS |= {
    "TPU v5e": CHIPS["TPU v5 lite"],
    "TPU v5p": CHIPS["TPU v5"],
    "TPU v6e": CHIPS["TPU v6 lite"],
}

TOPOLOGY_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
"""`jax.Device.device_kind` by the name in `--topology`."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a `jax.Device.device_kind`; None where it is not known."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else chip.flops


def devices_of_topology(topology: str, slices: int = 1) -> int:
    """Returns the number of devices of a topology such as `v5p:8x16x16`, `h100:64` or `cpu:8`.

    Raises `UserError` where the topology is not of this form, or has no devices or too many.
    """
    _, _, shape = topology.partition(":")
    if not re.fullmatch(r"\d{1,9}(x\d{1,9}){0,3}", shape, re.ASCII):
        raise UserError(
            f"--topology {topology} must be a name with a number or shape of devices, such as"
            " v5p:8x16x16, h100:64 or cpu:8."
        )
    devices = slices * math.prod(int(size) for size in shape.split("x"))
    if not 1 <= devices <= _MAX_DEVICES:
        raise UserError(
            f"--topology {topology} has {devices:,} devices; make them at least 1 and at most"
            f" {_MAX_DEVICES:,}."
        )
    return devices


def hosts_of_gpus(topology: str) -> tuple[int, int]:
    """Returns the number of hosts, and of GPUs on each, of `h100:8`, `h100:4x8` or `h100:64`.

    A number above eight stands for hosts of eight. Raises `UserError` for any other shape.
    """
    devices = devices_of_topology(topology)
    shape = [int(size) for size in topology.partition(":")[2].split("x")]
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 1 and devices <= GPUS_PER_HOST:
        return 1, devices
    if len(shape) == 1 and devices % GPUS_PER_HOST == 0:
        return devices // GPUS_PER_HOST, GPUS_PER_HOST
    raise UserError(
        f"--topology {topology} must have up to {GPUS_PER_HOST} GPUs, a multiple of"
        f" {GPUS_PER_HOST}, or HOSTSxGPUS, such as h100:4, h100:64 or h100:4x8."
    )


def chip_of_topology(topology: str, slices: int = 1) -> tuple[Chip, int]:
    """Returns the chip and the number of chips of a topology such as `v5p:8x16x16` or `h100:64`.

    Raises `UserError` where the topology is not of this form or its chip is not known.
    """
    name, _, _ = topology.partition(":")
    if name not in TOPOLOGY_KINDS:
        raise UserError(
            f"--topology {topology} must be one of {', '.join(TOPOLOGY_KINDS)} with its number or"
            " shape, such as v5p:8x16x16 or h100:64."
        )
    return CHIPS[TOPOLOGY_KINDS[name]], devices_of_topology(topology, slices)


def all_to_all_seconds(chip: Chip, size: float, devices: int, span: int | None = None) -> float:
    """Least seconds of an all-to-all in which each of `devices` sends `size` bytes to the others.

    `span`: number of consecutive devices that the group is spread over; None: `devices`.

    The larger of two bounds: `size` through a chip's links, and the traffic through the middle of
    the torus. There n·size/4 bytes go one way through 2·n/k links, for n devices in a torus of k
    chips along each dimension; each link has its share of the chip's rate. NaN where the chip's
    link rate is not known.
    """
    rate = chip.rate_within(span or devices)
    if rate is None:
        return math.nan
    seconds = size / rate
    if chip.torus:
        length = devices ** (1 / chip.torus)
        seconds = max(seconds, size * length / 8 / (rate / (2 * chip.torus)))
    return seconds


def device_memory_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program may use on one of `devices`, which are alike; None where not known.

    A CPU device has an equal part of the host's memory.
    """
    # Only a device of this process has statistics.
    device = next(d for d in devices if d.process_index == jax.process_index())
    if device.platform == "cpu":
        local = max(1, len(jax.local_devices(backend="cpu")))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, jax.errors.JaxRuntimeError):  # of a topology, not an attached device
        return None


def host_memory_kind(mesh: Mesh) -> str:
    """Returns the JAX memory kind of the devices' host; raises `UserError` where there is none."""
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds or device.platform == "cpu":
        raise UserError(
            f"optimizer.memory=host is not possible on {device.device_kind}, which has no host"
            " memory of its own; set optimizer.memory=device."
        )
    return "pinned_host"
