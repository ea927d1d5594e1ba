"""Ahead-of-time compilation of the train step, for a machine that need not be attached.

The compiler is the real one: for TPUs (`libtpu` runs on any computer), for the attached GPUs, or
for any number of emulated CPU devices. The result is read from the compiled program: memory per
device, FLOPs, memory traffic, and bytes sent along each mesh axis.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from switch_jax.config import Config, override_config
from switch_jax.distributed import (
    CHIPS,
    bytes_per_device,
    device_memory_bytes,
    make_mesh,
)
from switch_jax.errors import UserError
from switch_jax.files import build_once, cache_root
from switch_jax.model import format_si
from switch_jax.performance import hlo
from switch_jax.performance.compile_target import CompileTarget
from switch_jax.performance.cost_model import cost_summary
from switch_jax.performance.hlo import Collective, HloProgram
from switch_jax.performance.mesh_choice import (
    choose_mesh,
    describe_choice,
    fitting_mesh,
    with_mesh,
)
from switch_jax.performance.roofline import (
    ROOFLINE_FIELDS,
    StepWork,
    matmul_flops,
    predict_step,
)
from switch_jax.training import TrainProgram, teacher_config

CompileResult = dict[str, Any]


def compile_step(config: Config, target: CompileTarget) -> CompileResult:
    """Compiles a train step of `config` for `target`; results are cached by program.

    Returns the values of `switch-jax compile --json`. Of a program that does not fit in memory,
    `fits` is false and unknown values are None. Raises `UserError` for a target or mesh that is
    not possible.
    """
    devices = target.devices()
    chosen = choose_mesh(config, devices)
    config = with_mesh(config, chosen)
    teacher_model = teacher_config(config)
    mesh = make_mesh(config, devices, teacher=teacher_model)
    program = TrainProgram(config, mesh, teacher_model)
    state, batch, teacher = program.abstract_state, program.abstract_batch, program.abstract_teacher
    traced = program.train_step.trace(state, batch, teacher)
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    program_text = lowered.as_text()
    argument_bytes = bytes_per_device((state, batch, teacher))
    compiled = _compile_cached(lowered, program_text, target, mesh, argument_bytes)
    summary = cost_summary(config)
    flops = matmul_flops(traced.jaxpr, mesh.size)
    result: CompileResult = {
        "topology": target.topology,
        "slices": target.slices,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "fsdp": config.mesh.fsdp,
        "mesh_choice": chosen and describe_choice(chosen, len(devices)),
        "params": summary["params"],
        "parameter_bytes": bytes_per_device(state.params),
        "optimizer_bytes": bytes_per_device(_device_leaves(state.opt_state)),
        "teacher_bytes": bytes_per_device(teacher),
        "parameters": _placement(program),
        "tokens_per_step": config.data.batch_size * config.data.inputs_length,
        "slots_per_token": summary["slots_per_token"],
        "hlo_bytes": len(program_text),
        "flops_per_device": flops.total / mesh.size,
        "kernel_flops_per_device": flops.in_kernels / mesh.size,
        **compiled,
        "unknown_loops": max(flops.unknown_loops, compiled["unknown_loops"] or 0),
        "temp_bytes": compiled["hbm_bytes_per_device"] - compiled["argument_bytes"],
    }
    if compiled["collectives"] is None:
        return result | dict.fromkeys(("collective_bytes", *ROOFLINE_FIELDS))
    collectives = [Collective(**fields) for fields in compiled["collectives"]]
    work = StepWork(
        result["flops_per_device"],
        result["kernel_flops_per_device"],
        compiled["memory_traffic_bytes"],
        collectives,
        compiled["estimated_cycles"],
    )
    result["collective_bytes"] = _bytes_by_kind_and_axes(collectives)
    return result | predict_step(config, mesh, work, teacher_model)


def _compile_cached(
    lowered: jax.stages.Lowered,
    program_text: str,
    target: CompileTarget,
    mesh: Mesh,
    argument_bytes: int,
) -> CompileResult:
    """Returns the result of `_compile`, from the cache if the program was compiled before."""

    def build(path: Path) -> None:
        path.write_text(json.dumps(_compile(lowered, target, mesh, argument_bytes)))

    path = cache_root() / "compile" / f"{_fingerprint(program_text, target)}.json"
    return json.loads(build_once(path, build).read_text())


def _fingerprint(program_text: str, target: CompileTarget) -> str:
    """Returns a hash of the program, the target, compiler versions, and the code that parses."""
    compilers = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt"):
        try:
            compilers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    digest = hashlib.sha256(program_text.encode())
    digest.update(json.dumps([dataclasses.asdict(target), compilers]).encode())
    for source in (__file__, hlo.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:24]


def _compile(
    lowered: jax.stages.Lowered, target: CompileTarget, mesh: Mesh, argument_bytes: int
) -> CompileResult:
    """Compiles; returns memory, collectives and compile time.

    `argument_bytes` is the result's where the program does not fit and the compiler does not
    report them.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile(target.compiler_options() or None)
    except jax.errors.JaxRuntimeError as error:
        needed, capacity = _needed_and_available_bytes(error)
        return {
            "hbm_bytes_per_device": needed,
            "hbm_available_bytes": capacity,
            "argument_bytes": argument_bytes,
            "memory_traffic_bytes": None,
            "estimated_cycles": None,
            "unknown_loops": None,
            "collectives": None,
            "compile_seconds": time.perf_counter() - start,
            "fits": False,
        }
    seconds = time.perf_counter() - start
    used, argument_bytes = _peak_and_argument_bytes(compiled.memory_analysis())
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    available = chip.memory if chip and chip.memory else device_memory_bytes([*mesh.devices.flat])
    program = HloProgram(compiled.as_text() or "")
    return {
        "hbm_bytes_per_device": used,
        "hbm_available_bytes": available,
        "argument_bytes": argument_bytes,
        "memory_traffic_bytes": program.memory_bytes(),
        "estimated_cycles": program.estimated_cycles(),
        "unknown_loops": program.unknown_loops(),
        "collectives": [dataclasses.asdict(c) for c in program.collectives(mesh)],
        "compile_seconds": seconds,
        "fits": available is None or used <= available,
    }


def _needed_and_available_bytes(error: Exception) -> tuple[int, int]:
    """Parses the compiler's message on exhausted memory; raises any other error again."""
    sizes = re.findall(r"\(?(\d+(?:\.\d+)?)([KMGT])\)?", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
        raise error
    needed, available = (int(float(n) * 1024 ** ("KMGT".index(unit) + 1)) for n, unit in sizes[:2])
    return needed, available


def _peak_and_argument_bytes(analysis: Any) -> tuple[int, int]:
    """Returns the peak memory of a device, arguments included, and the bytes of arguments."""
    arguments = analysis.argument_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if peak > arguments:
        return peak, arguments
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return arguments + results + analysis.temp_size_in_bytes, arguments


def _device_leaves(tree: Any) -> Any:
    """Returns `tree` without the leaves in host memory."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.memory_kind != "pinned_host" else None, tree
    )


def _placement(program: TrainProgram) -> dict[str, dict[str, Any]]:
    """Returns shape, mesh axes of each dimension, and shape per device of every parameter."""
    return {
        name: {
            "shape": list(leaf.shape),
            "spec": [(axes,) if isinstance(axes, str) else axes for axes in leaf.sharding.spec],
            "shard": list(leaf.sharding.shard_shape(leaf.shape)),
        }
        for name, leaf in program.abstract_state.params.items()
    }


def _bytes_by_kind_and_axes(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """Returns the bytes that a device sends in a step: kind → mesh axes → bytes."""
    by_kind: dict[str, dict[str, int]] = {}
    for collective in collectives:
        by_axes = by_kind.setdefault(collective.kind, {})
        axes = "+".join(collective.axes)
        by_axes[axes] = by_axes.get(axes, 0) + round(collective.bytes_sent)
    return by_kind


def compile_table(result: CompileResult) -> str:
    """Returns a result of `compile_step` as aligned lines."""
    lines: list[str] = []

    def add_line(name: str, value: str, note: str = "") -> None:
        lines.append(f"{name:28}{value:>16}  {note}".rstrip())

    mesh = " × ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    add_line("devices", f"{result['devices']:,}", f"{result['device_kind']}, {mesh or 'alone'}")
    if result["mesh_choice"]:
        lines.append(result["mesh_choice"])
    used, available = result["hbm_bytes_per_device"], result["hbm_available_bytes"]
    share = f"of {_gib(available)}, {used / available:.0%}" if available else ""
    add_line(
        "memory of a device", _gib(used), share if result["fits"] else f"{share}: does not fit"
    )
    add_line("  parameters", _gib(result["parameter_bytes"]))
    add_line("  optimizer", _gib(result["optimizer_bytes"]))
    if result["teacher_bytes"]:
        add_line("  teacher", _gib(result["teacher_bytes"]))
    add_line("  gradients, activations …", _gib(_remaining_bytes(result)))
    if result["slots_per_token"] is not None:
        add_line("expert slots per token", f"{result['slots_per_token']:.3f}")
    add_line("compiled in", f"{result['compile_seconds']:.0f} s")
    if not result["fits"]:
        return "\n".join(lines)
    add_line("a step, on a device", format_si(result["flops_per_device"], "FLOP"), "matmuls")
    add_line("  memory traffic", format_si(result["memory_traffic_bytes"], "B"))
    for kind, by_axes in result["collective_bytes"].items():
        for axes, size in by_axes.items():
            add_line(f"  {kind}", format_si(size, "B"), f"sent along {axes}")
    if result["unknown_loops"]:
        note = "loops whose length depends on data count as one iteration: figures are too low"
        add_line("  of unknown length", str(result["unknown_loops"]), note)
    if result["step_seconds_roofline"] is not None:
        binding = f"{result['binding']}; a lower bound"
        add_line("roofline step", f"{result['step_seconds_roofline']:.3f} s", binding)
        for resource, seconds in result["seconds_by_resource"].items():
            add_line(f"  {resource}", f"{seconds:.3f} s")
        add_line("  MFU", f"{result['mfu_roofline']:.1%}", "an upper bound")
        add_line("  tokens a day", format_si(result["tokens_per_day"], ""))
        add_line("  days to 576.7 G tokens", f"{result['days_to_paper_tokens']:,.1f}")
    if result["step_seconds_estimated"] is not None:
        note = "no overlap; kernels at the peak rate"
        add_line("step by XLA's cost model", f"{result['step_seconds_estimated']:.3f} s", note)
        add_line("  MFU", f"{result['mfu_estimated']:.1%}")
    return "\n".join(lines)


def _remaining_bytes(result: CompileResult) -> int:
    """Returns the bytes in use on a device besides parameters, optimizer state and teacher."""
    state = sum(result[f"{part}_bytes"] for part in ("parameter", "optimizer", "teacher"))
    return result["hbm_bytes_per_device"] - state


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def remedy(config: Config, target: CompileTarget, result: CompileResult) -> str:
    """Returns a sentence for a program that does not fit: its memory, and a change that fits.

    The change was compiled: changes are tried in the order of the time that they cost.
    """
    used, available = result["hbm_bytes_per_device"], result["hbm_available_bytes"]
    message = (
        f"A train step needs {_gib(used)} of a {result['device_kind']}'s {_gib(available)},"
        f" {_gib(used - available)} too many: parameters {_gib(result['parameter_bytes'])},"
        f" optimizer {_gib(result['optimizer_bytes'])},"
        + (f" teacher {_gib(result['teacher_bytes'])}," if result["teacher_bytes"] else "")
        + f" gradients and activations {_gib(_remaining_bytes(result))}"
    )
    for change in _memory_saving_changes(config, target, result):
        keys = [f"--config.{key}={value}" for key, value in change.items()]
        try:
            changed = override_config(config, {k: str(v) for k, v in change.items()})
            if compile_step(changed, target)["fits"]:
                return f"{message}; with {' '.join(keys)} it fits."
        except UserError:
            continue
    return f"{message}; take more chips or a smaller data.batch_size."


def _memory_saving_changes(
    config: Config, target: CompileTarget, result: CompileResult
) -> Iterator[dict[str, Any]]:
    """Yields changes of config keys that save memory, those that cost least time first.

    A mesh is proposed where another one than that of `result` is predicted to fit.
    """
    if result["mesh"]["data"] != 1 and not result["fsdp"]:
        yield {"mesh.fsdp": True}
    accumulate = config.train.accumulate
    full = {"model.remat": "full"}
    savings: list[dict[str, Any]] = [{}] if config.model.remat == "full" else [{}, full]
    savings += [full | {"train.accumulate": n * accumulate} for n in (2, 8)]
    for saving in savings:
        if saving:
            yield saving
        changed = override_config(config, {k: str(v) for k, v in saving.items()})
        mesh = fitting_mesh(changed, target.devices())
        if mesh is not None and mesh.mesh != result["mesh"]:
            sizes = {f"mesh.{axis}": size for axis, size in mesh.mesh.items()}
            yield saving | sizes | {"mesh.fsdp": mesh.fsdp}
