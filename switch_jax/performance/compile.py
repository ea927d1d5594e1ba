"""Compiles the train step for machines that are not here, and says what it would need there.

The compiler is the real one: of TPUs (`libtpu` runs on any computer), of the GPUs that are
attached, or of the CPU for any number of pretended devices. What it says is read off the program:
memory of a device, FLOPs, bytes to and from memory, bytes sent along each mesh axis.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from switch_jax.config import Config, override_config
from switch_jax.distributed import CHIPS, device_memory_bytes, make_mesh
from switch_jax.errors import UserError
from switch_jax.files import build_once, cache_root
from switch_jax.model import format_si
from switch_jax.performance import hlo
from switch_jax.performance.cost_model import cost_summary
from switch_jax.performance.hlo import Collective, HloProgram
from switch_jax.performance.roofline import FIELDS, matmul_flops, predict_step
from switch_jax.training import TrainProgram, teacher_config

CompileResult = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """Devices to compile for.

    `topology` is `v5p:8x16x16` (a TPU and the shape of a slice), `cpu:8` (so many pretended
    devices) or `gpu` (the attached ones).
    """

    topology: str
    slices: int = 1

    def devices(self) -> Sequence[jax.Device]:
        """Raises `UserError` where there is no such machine or no compiler for it.

        To be called before JAX is used for anything else.
        """
        name, _, shape = self.topology.partition(":")
        if name in ("cpu", "gpu"):
            if self.slices != 1:
                raise UserError(f"--slices is for TPUs; leave it out for {self.topology}.")
            return _cpu_devices(shape) if name == "cpu" else _gpu_devices()
        return _tpu_devices(self.topology, self.slices)


def _cpu_devices(count: str) -> Sequence[jax.Device]:
    if not count.isdigit() or int(count) < 1:
        raise UserError("--topology cpu needs a number of devices: write cpu:8.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(count))
    return jax.devices("cpu")


def _gpu_devices() -> Sequence[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        raise UserError("No GPU is attached; name a TPU topology such as v5p:8x8x8.") from None


def _tpu_devices(topology: str, slices: int) -> Sequence[jax.Device]:
    try:
        metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(
            "The TPU compiler is not installed; run `pip install 'switch_jax[tpu]'`."
        ) from None
    # Nothing is attached, nobody is to be asked what would be, and several may compile at once.
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
    except Exception as error:  # whatever the compiler's library makes of a wrong name
        reason = str(error).split(": ", 1)[-1].split("\n")[0][:200]
        raise UserError(
            f"--topology {topology} does not exist ({reason}); name a TPU and the shape of a slice,"
            " such as v4:8x8x16, v5p:8x16x16, v5e:16x16 or v6e:16x16."
        ) from error
    return described.devices


def compile_step(config: Config, target: CompileTarget) -> CompileResult:
    """What a train step of `config` needs on `target`; compiled once for each program.

    Raises `UserError` for a target or mesh that cannot be. A program that does not fit is no
    error: its `fits` is false, and what is not known of it is None.
    """
    devices = target.devices()
    taught_by = teacher_config(config)
    mesh = make_mesh(config, devices, teacher=taught_by)
    program = TrainProgram(config, mesh, taught_by)
    state, batch, teacher = program.abstract_state, program.abstract_batch, program.abstract_teacher
    traced = program.train_step.trace(state, batch, teacher)
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    text = lowered.as_text()
    facts = _compiled(lowered, text, target, mesh, _bytes_per_device((state, batch, teacher)))
    summary = cost_summary(config)
    result: CompileResult = {
        "topology": target.topology,
        "slices": target.slices,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "params": summary["params"],
        "parameter_bytes": _bytes_per_device(state.params),
        "optimizer_bytes": _bytes_per_device(_on_device(state.opt_state)),
        "teacher_bytes": _bytes_per_device(teacher),
        "parameters": _placement(program),
        "tokens_per_step": config.data.batch_size * config.data.inputs_length,
        "slots_per_token": summary["slots_per_token"],
        "hlo_bytes": len(text),
        "flops_per_device": matmul_flops(traced.jaxpr, mesh.size) / mesh.size,
        **facts,
        "temp_bytes": facts["hbm_bytes_per_device"] - facts["argument_bytes"],
    }
    if facts["collectives"] is None:
        return result | dict.fromkeys(("collective_bytes", *FIELDS))
    collectives = [Collective(**fields) for fields in facts["collectives"]]
    work = result["flops_per_device"], facts["memory_traffic_bytes"], collectives
    result["collective_bytes"] = _by_kind_and_axis(collectives)
    return result | predict_step(config, mesh, *work, taught_by)


def _compiled(
    lowered: jax.stages.Lowered, text: str, target: CompileTarget, mesh: Mesh, argument_bytes: int
) -> CompileResult:
    """What the compiler makes of a program; from the cache where it did so before."""

    def build(path: Path) -> None:
        path.write_text(json.dumps(_compile(lowered, mesh, argument_bytes)))

    path = cache_root() / "compile" / f"{_fingerprint(text, target)}.json"
    return json.loads(build_once(path, build).read_text())


def _fingerprint(text: str, target: CompileTarget) -> str:
    """Of the program, the machine, the compilers, and the reader of what they made."""
    compilers = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            compilers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    digest = hashlib.sha256(text.encode())
    digest.update(json.dumps([dataclasses.asdict(target), compilers]).encode())
    for source in (__file__, hlo.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:24]


def _compile(lowered: jax.stages.Lowered, mesh: Mesh, argument_bytes: int) -> CompileResult:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = _exhausted(error)
        return {
            "hbm_bytes_per_device": needed,
            "hbm_available_bytes": available,
            "argument_bytes": argument_bytes,
            "memory_traffic_bytes": None,
            "collectives": None,
            "compile_seconds": time.perf_counter() - began,
            "fits": False,
        }
    seconds = time.perf_counter() - began
    used, argument_bytes = _memory(compiled.memory_analysis())
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    room = chip.memory if chip and chip.memory else device_memory_bytes([*mesh.devices.flat])
    program = HloProgram(compiled.as_text() or "")
    return {
        "hbm_bytes_per_device": used,
        "hbm_available_bytes": room,
        "argument_bytes": argument_bytes,
        "memory_traffic_bytes": program.memory_bytes(),
        "collectives": [dataclasses.asdict(c) for c in program.collectives(mesh)],
        "compile_seconds": seconds,
        "fits": room is None or used <= room,
    }


def _exhausted(error: Exception) -> tuple[int, int]:
    """Bytes needed and available, from the compiler's message."""
    sizes = re.findall(r"\(?(\d+(?:\.\d+)?)([KMGT])\)?", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
        raise error
    needed, available = (int(float(n) * 1024 ** ("KMGT".index(unit) + 1)) for n, unit in sizes[:2])
    return needed, available


def _memory(analysis: Any) -> tuple[int, int]:
    """Bytes of a device in use at the worst moment, and of arguments among them."""
    arguments = analysis.argument_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if peak > arguments:
        return peak, arguments
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return arguments + results + analysis.temp_size_in_bytes, arguments


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _on_device(tree: Any) -> Any:
    """Without what lies in the memory of the host."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.memory_kind != "pinned_host" else None, tree
    )


def _placement(program: TrainProgram) -> dict[str, dict[str, Any]]:
    """Where each parameter lies: shape, mesh axes of its dimensions, shape on a device."""
    return {
        name: {
            "shape": list(leaf.shape),
            "spec": [(axes,) if isinstance(axes, str) else axes for axes in leaf.sharding.spec],
            "shard": list(leaf.sharding.shard_shape(leaf.shape)),
        }
        for name, leaf in program.abstract_state.params.items()
    }


def _by_kind_and_axis(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """Bytes that a device sends in a step: kind → mesh axes → bytes."""
    table: dict[str, dict[str, int]] = {}
    for one in collectives:
        by_axis = table.setdefault(one.kind, {})
        axes = "+".join(one.axes)
        by_axis[axes] = by_axis.get(axes, 0) + round(one.sent)
    return table


def compile_table(result: CompileResult) -> str:
    """A result as aligned lines for people."""
    lines: list[str] = []

    def line(name: str, value: str, note: str = "") -> None:
        lines.append(f"{name:28}{value:>16}  {note}".rstrip())

    mesh = " × ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    line("devices", f"{result['devices']:,}", f"{result['device_kind']}, {mesh or 'alone'}")
    used, available = result["hbm_bytes_per_device"], result["hbm_available_bytes"]
    of = f"of {_gib(available)}, {used / available:.0%}" if available else ""
    line("memory of a device", _gib(used), of if result["fits"] else f"{of}: does not fit")
    line("  parameters", _gib(result["parameter_bytes"]))
    line("  optimizer", _gib(result["optimizer_bytes"]))
    if result["teacher_bytes"]:
        line("  teacher", _gib(result["teacher_bytes"]))
    line("  gradients, activations …", _gib(_rest(result)))
    if result["slots_per_token"] is not None:
        line("expert slots per token", f"{result['slots_per_token']:.3f}")
    line("compiled in", f"{result['compile_seconds']:.0f} s")
    if not result["fits"]:
        return "\n".join(lines)
    line("a step, on a device", format_si(result["flops_per_device"], "FLOP"), "matmuls")
    line("  memory traffic", format_si(result["memory_traffic_bytes"], "B"))
    for kind, by_axis in result["collective_bytes"].items():
        for axes, size in by_axis.items():
            line(f"  {kind}", format_si(size, "B"), f"sent along {axes}")
    if result["step_seconds_roofline"] is not None:
        line("roofline step", f"{result['step_seconds_roofline']:.3f} s", result["binding"])
        for resource, seconds in result["seconds_by_resource"].items():
            line(f"  {resource}", f"{seconds:.3f} s")
        line("  MFU", f"{result['mfu_roofline']:.1%}")
        line("  tokens a day", format_si(result["tokens_per_day"], ""))
        line("  days to 576.7 G tokens", f"{result['days_to_paper_tokens']:,.1f}")
    return "\n".join(lines)


def _rest(result: CompileResult) -> int:
    """Bytes of a device in use besides parameters, optimizer state and teacher."""
    kept = sum(result[f"{part}_bytes"] for part in ("parameter", "optimizer", "teacher"))
    return result["hbm_bytes_per_device"] - kept


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def remedy(config: Config, target: CompileTarget, result: CompileResult) -> str:
    """By how much a program does not fit, what takes it, and the least change that would.

    The change is one that compiles: changes are tried from the one that costs least time.
    """
    used, available = result["hbm_bytes_per_device"], result["hbm_available_bytes"]
    message = (
        f"A train step needs {_gib(used)} of a {result['device_kind']}'s {_gib(available)},"
        f" {_gib(used - available)} too many: parameters {_gib(result['parameter_bytes'])},"
        f" optimizer {_gib(result['optimizer_bytes'])},"
        + (f" teacher {_gib(result['teacher_bytes'])}," if result["teacher_bytes"] else "")
        + f" gradients and activations {_gib(_rest(result))}"
    )
    for change in _changes(config):
        keys = [f"--config.{key}={value}" for key, value in change.items()]
        try:
            changed = override_config(config, {k: str(v) for k, v in change.items()})
            if compile_step(changed, target)["fits"]:
                return f"{message}; with {' '.join(keys)} it fits."
        except UserError:
            continue
    return f"{message}; take more chips or a smaller data.batch_size."


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """What may make a program fit, the cheaper first: less kept, then less at once, then both."""
    if config.mesh.data != 1 and not config.mesh.fsdp:
        yield {"mesh.fsdp": True}
    if config.model.remat != "full":
        yield {"model.remat": "full"}
    yield {"model.remat": "full", "train.accumulate": 2 * config.train.accumulate}
    yield {"model.remat": "full", "train.accumulate": 8 * config.train.accumulate}
