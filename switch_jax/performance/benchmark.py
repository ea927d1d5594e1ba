"""Step time of a config against its FLOP-matched dense twin, side by side in one run.

The twin is the same model with `moe.num_experts=0`: as many FLOPs a token, if capacity were
exactly used. Timed are the train step, the forward pass (the evaluation step), one feed-forward
layer alone, forward and backward, on the encoder's tokens, and decoding behind encoded inputs.
Runs of the two models alternate, so that a machine whose speed drifts drifts for both.
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from switch_jax.config import Config
from switch_jax.data import SyntheticIterator
from switch_jax.distributed import batch_sharding, make_mesh, num_batch_shards
from switch_jax.errors import UserError
from switch_jax.inference import (
    SamplingOptions,
    beam_search,
    bind_decoder,
    decode_loop,
    encode_inputs,
    greedy_choice,
)
from switch_jax.model import Mlp, RoutingSpec, SwitchMlp, mfu, process_rows
from switch_jax.training import TrainProgram, teacher_config, teacher_parameters

MODELS = ("sparse", "dense")

# Inputs at once (on each part of a mesh that has its own rows), and beams; 1 is greedy.
DECODING = {"greedy_1": (1, 1), "greedy_32": (32, 1), "beam4_1": (1, 4), "beam4_32": (32, 4)}
MAX_DECODED = 32  # tokens, at the most as many as the targets have
Lower = Callable[[], jax.stages.Lowered]

# Calls what was compiled, on what its last call returned (None at first).
Advance = Callable[[Callable, Any], Any]


def run_benchmark(config: Config, repeats: int) -> dict[str, Any]:
    """Times both models; returns seconds (median, min, max), ratios, speed and memory.

    Raises `UserError` for a config without experts.
    """
    if not config.sparse:
        raise UserError("bench compares experts with a dense model; set moe.num_experts above 0.")
    dense = dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=0))
    teacher = teacher_config(config)
    mesh = make_mesh(config, teacher=teacher)
    result: dict[str, Any] = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "repeats": repeats,
    }
    with tempfile.TemporaryDirectory() as folder:
        _use_compilation_cache(folder)
        programs = {m: TrainProgram(c, mesh, teacher) for m, c in zip(MODELS, (config, dense))}
        for part, prepare in PARTS.items():
            cases = {m: _Case(*prepare(p.config, p)) for m, p in programs.items()}
            seconds = alternate({m: case.call for m, case in cases.items()}, repeats)
            result[part] = _compare({m: case.report(seconds[m]) for m, case in cases.items()})
        result["decode"] = _decoding(programs, repeats)
    for model, one in zip(MODELS, (config, dense)):
        step = result["train_step"][model]
        tokens = config.data.batch_size * (config.data.inputs_length + config.data.targets_length)
        step["tokens_per_second"] = tokens / step["seconds"]
        step["mfu"] = mfu(one, step["seconds"], result["device_kind"], result["devices"], teacher)
    return result


class _Case:
    """One part of one model: compiled, and called again and again."""

    def __init__(self, lower: Lower, advance: Advance):
        began = time.perf_counter()
        lower().compile()
        self._compile = time.perf_counter() - began
        # As a second start of the same config would: from the compilation cache.
        jax.clear_caches()
        began = time.perf_counter()
        compiled = lower().compile()
        self._compile_cached = time.perf_counter() - began
        self.call = _repeated(compiled, advance)
        self._memory: Any = compiled.memory_analysis()

    def report(self, seconds: list[float]) -> dict[str, Any]:
        memory = self._memory
        return {
            **_summary(seconds),
            "compile_seconds": self._compile,
            "compile_seconds_cached": self._compile_cached,
            "memory_bytes": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        }


def alternate(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each case. They take turns, so that a machine whose speed
    drifts drifts for all, and begin with a call that is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, call in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def train_step_case(config: Config, program: TrainProgram) -> Callable[[], Any]:
    """A compiled train step on synthetic tokens, for `alternate`."""
    lower, advance = _train_step(config, program)
    return _repeated(lower().compile(), advance)


def _repeated(compiled: Callable, advance: Advance) -> Callable[[], Any]:
    """Calls `compiled` once more, on what its last call left."""
    last = None

    def call() -> Any:
        nonlocal last
        last = advance(compiled, last)
        return last

    return call


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def _compare(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sparse, dense = (reports[model]["seconds"] for model in MODELS)
    return {**reports, "ratio": sparse / dense}


def _train_step(config: Config, program: TrainProgram) -> tuple[Lower, Advance]:
    batch = program.sharded.shard_batch(next(SyntheticIterator(config, process_rows(program.mesh))))
    teacher = teacher_parameters(program)

    def advance(call, state):
        return call(program.init() if state is None else state, batch, teacher)[0]

    return partial(program.train_step.lower, program.abstract_state, batch, teacher), advance


def _forward(config: Config, program: TrainProgram) -> tuple[Lower, Advance]:
    batch = program.sharded.shard_batch(next(SyntheticIterator(config, process_rows(program.mesh))))
    params = program.init().params
    return partial(program.sharded.eval_step.lower, params, batch), lambda call, _: call(
        params, batch
    )


def _layer(config: Config, program: TrainProgram) -> tuple[Lower, Advance]:
    """Gradients of one feed-forward layer with respect to its input and parameters."""
    data, model = config.data, config.model
    shape = (data.batch_size, data.inputs_length, model.d_model)
    spec = RoutingSpec(
        token_BxL=jnp.arange(math.prod(shape[:2])).reshape(shape[:2]),
        mask_BxL=jnp.ones(shape[:2], bool),
        rows_per_group=config.moe.group_rows(*shape[:2]),
        capacity_factor=config.moe.capacity_factor,
    )

    def loss(layer: SwitchMlp | Mlp, x_BxLxD: jax.Array, g_BxLxD: jax.Array) -> jax.Array:
        if isinstance(layer, SwitchMlp):
            y_BxLxD, routed = layer(x_BxLxD, spec, None)
            return jnp.sum(y_BxLxD * g_BxLxD) + routed.sums.balance
        return jnp.sum(layer(x_BxLxD, None) * g_BxLxD)

    with jax.set_mesh(program.mesh):
        key = jax.random.key(0)
        layer = jax.jit(lambda k: SwitchMlp(config, k) if config.sparse else Mlp(config.model, k))(
            key
        )
        x, g = jax.random.normal(key, (2, *shape), model.dtype)
        x, g = jax.device_put((x, g), batch_sharding(program.mesh))

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(program.mesh):
            return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(layer, x, g)

    return lower, lambda call, _: call(layer, x, g)


PARTS = {"train_step": _train_step, "forward": _forward, "layer": _layer}


def _decoding(programs: Mapping[str, TrainProgram], repeats: int) -> dict[str, Any]:
    """Times both models at every case of `DECODING`."""
    params = {model: program.init().params for model, program in programs.items()}
    result = {}
    for case, (inputs, beams) in DECODING.items():
        rows = inputs * num_batch_shards(programs["dense"].mesh)
        calls = {m: _decode(p, params[m], rows, beams) for m, p in programs.items()}
        length = _decoded_length(programs["dense"].config)
        reports: dict[str, dict[str, Any]] = {}
        for model, seconds in alternate(calls, repeats).items():
            reports[model] = report = _summary(seconds)
            report["ms_per_token"] = 1e3 * report["seconds"] / length
            report["tokens_per_second"] = rows * length / report["seconds"]
        result[case] = _compare(reports)
    return result


def _decode(
    program: TrainProgram, params: Mapping[str, jax.Array], rows: int, beams: int
) -> Callable[[], Any]:
    """A compiled search behind encoded inputs, in which nothing ends early."""
    config, mesh, never = program.config, program.mesh, -1
    length, shape = _decoded_length(config), (rows, config.data.inputs_length)
    source_BxS = 2 + jnp.arange(math.prod(shape)).reshape(shape) % (config.model.vocab_size - 2)

    def run(params: Mapping[str, jax.Array], encoded_BxSxD: jax.Array, mask_BxS: jax.Array) -> Any:
        step, own = bind_decoder(
            program.sharded.model(params), encoded_BxSxD, mask_BxS, length, beams
        )
        if beams == 1:
            return decode_loop(step, own, greedy_choice, rows, length, never)
        return beam_search(
            step, own, 2, rows, beams, length, never, SamplingOptions().length_penalty
        )

    with jax.set_mesh(mesh):
        source_BxS = jax.device_put(source_BxS, batch_sharding(mesh))
        encode = jax.jit(
            lambda params, source: encode_inputs(program.sharded.model(params), source)
        )
        inputs = encode(params, source_BxS)
        return partial(jax.jit(run).lower(params, *inputs).compile(), params, *inputs)


def _decoded_length(config: Config) -> int:
    return min(config.data.targets_length, MAX_DECODED)


def _use_compilation_cache(folder: str) -> None:
    """An empty cache for this process, so that the first compilation is a real one."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def benchmark_table(result: dict[str, Any]) -> str:
    """The figures of `run` as a table for people."""
    lines = [
        f"{result['devices']} × {result['device_kind']}, median of {result['repeats']} runs"
        " (min – max), alternating with the FLOP-matched dense model",
        "",
        f"{'':12}{'sparse':>28}{'dense':>28}{'ratio':>8}",
    ]
    for part in PARTS:
        cells = []
        for model in MODELS:
            r = result[part][model]
            cells.append(
                f"{1e3 * r['seconds']:.1f} ms"
                f" ({1e3 * r['seconds_min']:.1f} – {1e3 * r['seconds_max']:.1f})"
            )
        lines.append(f"{part:12}{cells[0]:>28}{cells[1]:>28}{result[part]['ratio']:>8.2f}")
    lines.append("")
    for label, key, text in (
        ("in+out tok/s", "tokens_per_second", lambda v: f"{v:,.0f}"),
        ("MFU", "mfu", lambda v: "unknown peak" if v is None else f"{v:.1%}"),
        ("memory", "memory_bytes", lambda v: f"{v / 1e9:.2f} GB"),
        ("compile", "compile_seconds", lambda v: f"{v:.1f} s"),
        ("  cached", "compile_seconds_cached", lambda v: f"{v:.1f} s"),
    ):
        sparse, dense = (text(result["train_step"][model][key]) for model in MODELS)
        lines.append(f"{label:12}{sparse:>28}{dense:>28}")
    lines += ["", "decoding: ms for a token of every input, and tokens a second of all"]
    for part, compared in result["decode"].items():
        sparse, dense = (
            f"{compared[m]['ms_per_token']:.2f} ms, {compared[m]['tokens_per_second']:,.0f} tok/s"
            for m in MODELS
        )
        lines.append(f"{part:12}{sparse:>28}{dense:>28}{compared['ratio']:>8.2f}")
    return "\n".join(lines)
