"""CompileTarget: devices to compile for, attached or described, and the compiler's options.

A described device has no hardware behind it. TPUs are described by `libtpu`, NVIDIA GPUs by the
table below and XLA's CUDA compiler; both run on any computer.
"""

import dataclasses
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from switch_jax.distributed import CHIPS, TOPOLOGY_KINDS, devices_of_topology, hosts_of_gpus
from switch_jax.errors import UserError

_MAX_CPU_DEVICES = 4096  # emulated; every one has threads

_EXAMPLES = "a TPU such as v5p:8x8x8, GPUs such as h100:8, emulated devices as cpu:8, or gpu"


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """Devices to compile for.

    topology: `v5p:8x16x16` (a TPU and the shape of a slice), `h100:8` or `h100:4x8` (a GPU and the
      number of GPUs, or of hosts and of GPUs on each), `cpu:8` (emulated devices) or `gpu` (the
      attached GPUs).
    slices: number of TPU slices.
    """

    topology: str
    slices: int = 1

    @property
    def name(self) -> str:
        """Name of the kind of device: the part before the colon."""
        return self.topology.partition(":")[0]

    def devices(self) -> Sequence[jax.Device]:
        """Returns the devices; call it before JAX is used for anything else.

        Raises `UserError` where the topology does not exist or its compiler is not installed.
        """
        is_tpu = self.name.startswith(("v", "tpu"))
        if not is_tpu and self.slices != 1:
            raise UserError(f"--slices is for TPUs; leave it out for {self.topology}.")
        if self.topology == "gpu":
            return _attached_gpus()
        count = devices_of_topology(self.topology, self.slices)
        if self.name == "cpu":
            return _cpu_devices(count)
        if is_tpu:
            return _tpu_devices(self.topology, self.slices)
        if self.name in _GPUS:
            return _described_gpus(self.name, self.topology)
        raise UserError(f"--topology {self.topology} cannot be compiled for; name {_EXAMPLES}.")

    def compiler_options(self) -> dict[str, Any]:
        """Returns XLA options that differ from the defaults."""
        if self.name not in _GPUS:
            return {}
        # Without a device nothing is autotuned, and the default tiles of Triton's matmuls do not
        # suit all shapes: "Couldn't find output tile sizes". cuBLAS takes their place.
        return {"xla_gpu_enable_triton_gemm": False}


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    if count > _MAX_CPU_DEVICES:
        raise UserError(f"--topology cpu:{count} must have at most {_MAX_CPU_DEVICES} devices.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")


def _attached_gpus() -> Sequence[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        raise UserError(f"No GPU is attached; name {_EXAMPLES.rpartition(',')[0]}.") from None


def _tpu_devices(topology: str, slices: int) -> Sequence[jax.Device]:
    _check_installed("libtpu", "TPU", "tpu")
    # libtpu must neither look for attached TPUs, nor query a metadata server for their type, nor
    # lock out other processes that compile.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **options)
    except Exception as error:  # libtpu raises various types for an unknown name
        reason = str(error).split(": ", 1)[-1].split("\n")[0][:200]
        raise UserError(
            f"--topology {topology} does not exist ({reason}); name a TPU and the shape of a slice,"
            " such as v4:8x8x16, v5p:8x16x16, v5e:16x16 or v6e:16x16."
        ) from error
    return described.devices


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Facts of a GPU for XLA's CUDA compiler, besides those in `CHIPS`; sizes in bytes."""

    major: int  # of the compute capability
    minor: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # at most, where a kernel asks for it


# By name in `--topology`. Source: XLA's `gpu_specs` and NVIDIA's data sheets.
_GPUS = {
    "a100": _Gpu(8, 0, 108, 64, 1.41, 41943040, 167936, 166912),
    "h100": _Gpu(9, 0, 132, 128, 1.98, 52428800, 233472, 232448),
    "h200": _Gpu(9, 0, 132, 128, 1.98, 52428800, 233472, 232448),
    "b200": _Gpu(10, 0, 148, 128, 1.965, 132644864, 233472, 232448),
}

# As XLA's `GpuTargetConfigProto` in text format.
_TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_cache}
  memory_bandwidth: {chip.memory_rate:.0f}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {gpu.major} minor: {gpu.minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""


def _described_gpus(name: str, topology: str) -> Sequence[jax.Device]:
    _check_installed("jax-cuda13-pjrt", "CUDA", "cuda-compile")
    jax.config.update("jax_platforms", "cpu")
    hosts, gpus = hosts_of_gpus(topology)
    kind = TOPOLOGY_KINDS[name]
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=_TARGET_CONFIG.format(gpu=_GPUS[name], chip=CHIPS[kind], kind=kind),
        topology=f"1x{hosts}x{gpus}",
    )
    return described.devices


def _check_installed(package: str, compiler: str, extra: str) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"The {compiler} compiler is not installed; run `pip install 'switch_jax[{extra}]'`."
        ) from None
