"""Benchmark: times a sparse config against its FLOP-matched dense model in one run.

The dense model is the same config with `moe.num_experts=0`: it has the same FLOPs per token, up to
unused or exceeded expert capacity. Timed are the train step, the forward pass (the evaluation
step), one feed-forward layer (forward and backward, on the encoder's tokens), and decoding with
encoded inputs. Runs of the two models alternate, so that a drift of the machine's speed affects
both.
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

from switch_jax.config import Config, rows_per_group
from switch_jax.data import SyntheticIterator
from switch_jax.distributed import batch_sharding, make_mesh, num_batch_shards
from switch_jax.errors import UserError
from switch_jax.inference import (
    CACHE_SEQUENCE_AXIS,
    SamplingOptions,
    SpecialIds,
    beam_search,
    decode_loop,
    encode_inputs,
    greedy_choice,
    make_decode_step,
)
from switch_jax.model import Mlp, RoutingSpec, SwitchMlp, mfu, process_rows
from switch_jax.training import TrainProgram, check_memory, teacher_config, teacher_parameters

MODELS = ("sparse", "dense")

# Inputs per batch shard, and number of beams (1: greedy).
DECODING = {"greedy_1": (1, 1), "greedy_32": (32, 1), "beam4_1": (1, 4), "beam4_32": (32, 4)}
MAX_DECODED = 32  # tokens; fewer where targets are shorter

# Lowers the program to time.
Lower = Callable[[], jax.stages.Lowered]

# Calls the compiled program with the result of its previous call (None at first).
CallAgain = Callable[[Callable, Any], Any]


def run_benchmark(config: Config, repeats: int) -> dict[str, Any]:
    """Times both models; returns the values of `switch-jax bench --json`.

    These are seconds (median, min, max), ratio sparse / dense, tokens per second, MFU, bytes of
    memory and compile time. Raises `UserError` for a config without experts.
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
        for program in programs.values():
            check_memory(program)
        for part, prepare in TIMED_PARTS.items():
            timed = {m: _TimedProgram(*prepare(p.config, p)) for m, p in programs.items()}
            seconds = time_alternating({m: t.call for m, t in timed.items()}, repeats)
            result[part] = _with_ratio({m: t.summary(seconds[m]) for m, t in timed.items()})
        result["decode"] = _time_decoding(programs, repeats)
    for model, model_config in zip(MODELS, (config, dense)):
        step = result["train_step"][model]
        tokens = config.data.batch_size * (config.data.inputs_length + config.data.targets_length)
        step["tokens_per_second"] = tokens / step["seconds"]
        step["mfu"] = mfu(
            model_config, step["seconds"], result["device_kind"], result["devices"], teacher
        )
    return result


class _TimedProgram:
    """One part of one model: compiled, and called repeatedly."""

    def __init__(self, lower: Lower, call_again: CallAgain):
        start = time.perf_counter()
        lower().compile()
        self._compile_seconds = time.perf_counter() - start
        # The second start of the same config compiles from the compilation cache.
        jax.clear_caches()
        start = time.perf_counter()
        compiled = lower().compile()
        self._cached_compile_seconds = time.perf_counter() - start
        self._memory: Any = compiled.memory_analysis()
        self.call = repeated_call(compiled, call_again)

    def summary(self, seconds: list[float]) -> dict[str, Any]:
        """Returns the figures of one part of one model, from the seconds of its calls."""
        memory = self._memory
        return {
            **_summary(seconds),
            "compile_seconds": self._compile_seconds,
            "compile_seconds_cached": self._cached_compile_seconds,
            "memory_bytes": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        }


def repeated_call(compiled: Callable, call_again: CallAgain) -> Callable[[], Any]:
    """Returns a function that calls a program with the result of its previous call."""
    last_result = None

    def call() -> Any:
        nonlocal last_result
        last_result = call_again(compiled, last_result)
        return last_result

    return call


def time_alternating(
    calls: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Returns the seconds of `repeats` calls of each function.

    The functions take turns, so that a drift of the machine's speed affects all of them. The first
    call of each is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def _with_ratio(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the summaries of both models, and the ratio of their times."""
    sparse, dense = (summaries[model]["seconds"] for model in MODELS)
    return {**summaries, "ratio": sparse / dense}


def _train_step(config: Config, program: TrainProgram) -> tuple[Lower, CallAgain]:
    """Prepares the train step on a batch of random tokens."""
    batch = program.sharded.shard_batch(next(SyntheticIterator(config, process_rows(program.mesh))))
    teacher = teacher_parameters(program)

    def call_again(train_step, state):
        return train_step(program.init() if state is None else state, batch, teacher)[0]

    return partial(program.train_step.lower, program.abstract_state, batch, teacher), call_again


def _forward(config: Config, program: TrainProgram) -> tuple[Lower, CallAgain]:
    """Prepares the evaluation step."""
    batch = program.sharded.shard_batch(next(SyntheticIterator(config, process_rows(program.mesh))))
    params = program.init().params
    lower = partial(program.sharded.eval_step.lower, params, batch)
    return lower, lambda eval_step, _: eval_step(params, batch)


def _layer(config: Config, program: TrainProgram) -> tuple[Lower, CallAgain]:
    """Prepares the gradients of a feed-forward layer with respect to its input and parameters."""
    data, model = config.data, config.model
    shape = (data.batch_size, data.inputs_length, model.d_model)
    spec = RoutingSpec(
        token_BxL=jnp.arange(math.prod(shape[:2])).reshape(shape[:2]),
        mask_BxL=jnp.ones(shape[:2], bool),
        rows_per_group=rows_per_group(config.moe, *shape[:2]),
        capacity_factor=config.moe.capacity_factor,
    )

    def loss(layer: SwitchMlp | Mlp, x_BxLxD: jax.Array, g_BxLxD: jax.Array) -> jax.Array:
        if isinstance(layer, SwitchMlp):
            y_BxLxD, routed = layer(x_BxLxD, spec, None)
            return jnp.sum(y_BxLxD * g_BxLxD) + routed.stats.balance_loss
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

    return lower, lambda gradients, _: gradients(layer, x, g)


TIMED_PARTS = {"train_step": _train_step, "forward": _forward, "layer": _layer}


def _time_decoding(programs: Mapping[str, TrainProgram], repeats: int) -> dict[str, Any]:
    """Times both models in every case of `DECODING`."""
    params = {model: program.init().params for model, program in programs.items()}
    length = _decoded_length(programs["dense"].config)
    result = {}
    for case, (inputs, beams) in DECODING.items():
        rows = inputs * num_batch_shards(programs["dense"].mesh)
        calls = {m: _compile_decoding(p, params[m], rows, beams) for m, p in programs.items()}
        summaries: dict[str, dict[str, Any]] = {}
        for model, seconds in time_alternating(calls, repeats).items():
            summaries[model] = summary = _summary(seconds)
            summary["ms_per_token"] = 1e3 * summary["seconds"] / length
            summary["tokens_per_second"] = rows * length / summary["seconds"]
        result[case] = _with_ratio(summaries)
    return result


def _compile_decoding(
    program: TrainProgram, params: Mapping[str, jax.Array], rows: int, beams: int
) -> Callable[[], Any]:
    """Returns a compiled decoding loop with encoded inputs, in which no sequence ends early."""
    config, mesh = program.config, program.mesh
    never_ends = SpecialIds(config.model.start_id, -1, config.model.pad_id)
    length, shape = _decoded_length(config), (rows, config.data.inputs_length)
    source_BxS = 2 + jnp.arange(math.prod(shape)).reshape(shape) % (config.model.vocab_size - 2)

    def decode(
        params: Mapping[str, jax.Array], encoded_BxSxD: jax.Array, mask_BxS: jax.Array
    ) -> Any:
        step, cache = make_decode_step(
            program.sharded.model(params), encoded_BxSxD, mask_BxS, length, beams
        )
        if beams == 1:
            return decode_loop(step, cache, greedy_choice, rows, length, never_ends)
        alpha = SamplingOptions().length_penalty
        return beam_search(step, cache, CACHE_SEQUENCE_AXIS, rows, beams, length, never_ends, alpha)

    with jax.set_mesh(mesh):
        source_BxS = jax.device_put(source_BxS, batch_sharding(mesh))
        encode = jax.jit(
            lambda params, source_BxS: encode_inputs(program.sharded.model(params), source_BxS)
        )
        encoded = encode(params, source_BxS)
        return partial(jax.jit(decode).lower(params, *encoded).compile(), params, *encoded)


def _decoded_length(config: Config) -> int:
    return min(config.data.targets_length, MAX_DECODED)


def _use_compilation_cache(folder: str) -> None:
    """Sets an empty compilation cache, so that the first compilation is a real one."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def benchmark_table(result: dict[str, Any]) -> str:
    """Returns a result of `run_benchmark` as a text table."""
    lines = [
        f"{result['devices']} × {result['device_kind']}, median of {result['repeats']} runs"
        " (min – max), alternating with the FLOP-matched dense model",
        "",
        f"{'':12}{'sparse':>28}{'dense':>28}{'ratio':>8}",
    ]
    for part in TIMED_PARTS:
        cells = []
        for model in MODELS:
            summary = result[part][model]
            cells.append(
                f"{1e3 * summary['seconds']:.1f} ms"
                f" ({1e3 * summary['seconds_min']:.1f} – {1e3 * summary['seconds_max']:.1f})"
            )
        lines.append(f"{part:12}{cells[0]:>28}{cells[1]:>28}{result[part]['ratio']:>8.2f}")
    lines.append("")
    for label, key, format_value in (
        ("in+out tok/s", "tokens_per_second", "{:,.0f}".format),
        ("MFU", "mfu", lambda v: "unknown peak" if v is None else f"{v:.1%}"),
        ("memory", "memory_bytes", lambda v: f"{v / 1e9:.2f} GB"),
        ("compile", "compile_seconds", lambda v: f"{v:.1f} s"),
        ("  cached", "compile_seconds_cached", lambda v: f"{v:.1f} s"),
    ):
        sparse, dense = (format_value(result["train_step"][model][key]) for model in MODELS)
        lines.append(f"{label:12}{sparse:>28}{dense:>28}")
    lines += ["", "decoding: ms for a token of every input, and tokens a second of all"]
    for case, compared in result["decode"].items():
        sparse, dense = (
            f"{compared[m]['ms_per_token']:.2f} ms, {compared[m]['tokens_per_second']:,.0f} tok/s"
            for m in MODELS
        )
        lines.append(f"{case:12}{sparse:>28}{dense:>28}{compared['ratio']:>8.2f}")
    return "\n".join(lines)
