"""Mesh search: ranks the legal meshes of a config by predicted memory and step time.

The prediction is arithmetic and takes milliseconds per mesh; compiling (`compile.py`) takes
minutes. Activations are counted by the arrays that a layer keeps for the backward pass, and every
resource works at its published rate. The prediction is good enough to rank meshes: compile the
chosen mesh for exact figures.

The constants below were chosen against the compile results in docs/scale.md. Over these, the ratio
of prediction to compiled program is 0.92 to 1.32 for memory, 0.63 to 1.63 for HBM traffic and 0.79
to 1.25 for step time.
`tests/performance/test_mesh_search.py` checks these bounds.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from switch_jax.config import STACKS, Config, MeshConfig
from switch_jax.distributed import (
    BATCH_AXES,
    MESH_AXES,
    Chip,
    all_to_all_seconds,
    axes_span,
    check_mesh,
    partition_spec,
)
from switch_jax.errors import UserError
from switch_jax.model import (
    LOGITS_BYTES,
    ExpertLayer,
    abstract_model,
    expert_layers,
    flops_by_part,
    logical_axes,
    named_parameters,
    padded_size,
    split_hops,
)
from switch_jax.performance.cost_model import state_bytes

FLOAT32_BYTES = 4

# Forward passes that cost as many FLOPs as a train step: forward, two for backward, and what
# `model.remat` computes again. `matmul_flops` of the traced train steps of the presets in
# docs/scale.md gives 3.0 (none), 3.0 to 3.6 (dots) and 3.7 to 4.0 (full); the models with experts
# are at the upper end.
PASSES_PER_STEP = {"none": 3, "dots": 3.3, "full": 4}

# HBM traffic of a train step, in multiples of the bytes of float32 parameters (for parameters,
# gradients and optimizer) and of the activations kept for the backward pass. GPUs have no memory on
# the chip that holds activations between kernels, and no fused attention.
PARAMETER_TRAFFIC_PER_STEP = 6
PARAMETER_TRAFFIC_PER_MICROBATCH = 1.5
ACTIVATION_TRAFFIC_PER_MICROBATCH = {"tpu": 8.5, "gpu": 24}
# Weights that FSDP gathers, in the activation dtype: they are written and read in both passes, and
# their gradients are written and read before they are scattered.
FSDP_TRAFFIC_PER_MICROBATCH = 6

# Arrays kept for the backward pass, in multiples of an array in the activation dtype: results of
# matmuls, kernels, gathers and exchanges.
STREAM_COPIES = 1.5  # of a sub-layer's input or output
HEAD_ARRAYS = 4  # queries, keys, values and the attention's output
SCORE_COPIES = 1.2  # of attention's probabilities, where it is not fused; float32 in one layer
SLOT_ARRAYS = 2  # inputs and outputs of expert slots
DOTS_STREAM_COPIES = 2  # with remat=dots
# Largest part of the gradients, in the activation dtype, that exists at one time.
GRADIENT_SHARE = 0.6
LOGITS_COPIES = 3  # of the logits that are computed at once (LOGITS_BYTES), in float32

ALL_REDUCE_PASSES = 2  # a ring all-reduce sends its array twice: reduce-scatter, then all-gather
FSDP_GATHERS_PER_MICROBATCH = 2  # of weights: for the forward and for the backward pass
# Dispatch and combine, forward and backward.
ALL_TO_ALLS_PER_EXPERT_LAYER = 4
# All-reduces over `model`, one per sub-layer, forward and backward.
ALL_REDUCES_PER_SUBLAYER = 2
SUBLAYERS = {"encoder": 2, "decoder": 3}


@dataclasses.dataclass(frozen=True)
class MeshSuggestion:
    """A mesh, and the predicted memory and time of a train step on each of its devices."""

    mesh: dict[str, int]
    fsdp: bool
    # Bytes of a device: parameters, weights (parameters in the activation dtype), optimizer,
    # gradients, activations, teacher.
    memory_bytes: dict[str, float]
    # Seconds per step: compute, memory, links; with several slices also slices.
    seconds: dict[str, float]
    fits: bool

    @property
    def memory(self) -> float:
        """Bytes of a device in use."""
        return sum(self.memory_bytes.values())

    @property
    def step_seconds(self) -> float:
        """Seconds of a step (see `estimate_step_seconds`)."""
        return estimate_step_seconds(self.seconds)


def estimate_step_seconds(seconds: dict[str, float]) -> float:
    """Returns the seconds of a step from the seconds of each resource.

    Compute and memory traffic overlap; communication overlaps with neither.
    """
    network = sum(seconds.get(name, 0.0) for name in ("links", "slices"))
    return max(seconds["compute"], seconds["memory"]) + network


def suggest_meshes(
    config: Config, chip: Chip, devices: int, slices: int = 1, teacher: Config | None = None
) -> list[MeshSuggestion]:
    """Returns the legal meshes of `devices` devices: those that fit first, then by step time.

    `fsdp` of a suggestion is set where the config sets it, where it makes the mesh fit, or where it
    makes its step faster. Raises `UserError` where no mesh is legal.
    """
    cost_model = _StepCostModel(config, chip, teacher)
    suggestions: list[MeshSuggestion] = []
    for model in _divisors(devices // slices):
        for expert in _divisors(devices // (slices * model)):
            data = devices // (slices * model * expert)
            sizes = dict(zip(MESH_AXES, (slices, data, expert, model)))
            is_choice = data > 1 and not config.mesh.fsdp
            fsdp_choices = (False, True) if is_choice else (config.mesh.fsdp,)
            legal = [
                cost_model.suggestion(sizes, fsdp)
                for fsdp in fsdp_choices
                if _is_legal(config, teacher, sizes, fsdp)
            ]
            suggestions += sorted(legal, key=_rank_key)[:1]
    if not suggestions:
        check_mesh(config, dict(zip(MESH_AXES, (slices, devices // slices, 1, 1))), teacher)
        raise UserError(f"No mesh of {devices} devices divides the model and its batch.")
    return sorted(suggestions, key=_rank_key)


def predict_mesh(
    config: Config, chip: Chip, sizes: dict[str, int], *, fsdp: bool
) -> MeshSuggestion:
    """Returns one mesh with its predicted memory and time; `sizes` has all of `MESH_AXES`."""
    return _StepCostModel(config, chip).suggestion(sizes, fsdp)


def _rank_key(suggestion: MeshSuggestion) -> tuple[bool, float]:
    return not suggestion.fits, suggestion.step_seconds


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _is_legal(config: Config, teacher: Config | None, sizes: dict[str, int], fsdp: bool) -> bool:
    """Whether a mesh divides the models and their batch, and leaves no device idle."""
    models = [
        dataclasses.replace(model, mesh=MeshConfig(fsdp=fsdp))
        for model in (config, teacher)
        if model is not None
    ]
    if sizes["expert"] > max(1, *(model.moe.num_experts for model in models)):
        return False
    try:
        check_mesh(models[0], sizes, *models[1:])
    except UserError:
        return False
    return True


class _StepCostModel:
    """Memory and time of a train step of a config, per device of a mesh."""

    def __init__(self, config: Config, chip: Chip, teacher: Config | None = None):
        state = state_bytes(config)
        self._config, self._chip = config, chip
        self._parameters = _parameter_axes_and_sizes(config)
        self._teacher = [] if teacher is None else _parameter_axes_and_sizes(teacher)
        self._optimizer_ratio = state["optimizer"] / state["parameters"]
        self._flops = sum(flops_by_part(config).values())
        self._teacher_flops = sum(flops_by_part(teacher).values()) if teacher else 0.0
        self._expert_layers = expert_layers(config)
        self._is_tpu = chip.torus > 0
        attention = config.model.attention
        self._fused = attention == "fused" or (attention == "auto" and self._is_tpu)

    def suggestion(self, sizes: dict[str, int], fsdp: bool) -> MeshSuggestion:
        """Returns the mesh with its predicted memory and time."""
        memory = self._memory_bytes(sizes, fsdp)
        fits = self._chip.memory is None or sum(memory.values()) <= self._chip.memory
        return MeshSuggestion(sizes, fsdp, memory, self._seconds(sizes, fsdp, memory), fits)

    def _num_parameters(self, sizes: dict[str, int], fsdp: bool, *, experts: bool) -> float:
        """Returns the number of parameters on a device: of experts, or of all other layers."""
        selected = [(axes, n) for axes, n in self._parameters if ("expert" in axes) == experts]
        return _parameters_per_device(selected, sizes, fsdp)

    def _dense_and_expert_parameters(
        self, sizes: dict[str, int], fsdp: bool
    ) -> tuple[float, float]:
        dense, experts = (self._num_parameters(sizes, fsdp, experts=e) for e in (False, True))
        return dense, experts

    def _rows(self, sizes: dict[str, int]) -> float:
        """Returns the rows of a microbatch on a device."""
        shards = math.prod(sizes[axis] for axis in BATCH_AXES)
        return self._config.data.batch_size / self._config.train.accumulate / shards

    def _memory_bytes(self, sizes: dict[str, int], fsdp: bool) -> dict[str, float]:
        parameters = FLOAT32_BYTES * sum(self._dense_and_expert_parameters(sizes, fsdp))
        item = jnp.dtype(self._config.model.dtype).itemsize
        weights = parameters * item / FLOAT32_BYTES
        # Gradients of a microbatch, and with several microbatches their float32 sum.
        sums = parameters if self._config.train.accumulate > 1 else 0.0
        return {
            "parameters": parameters,
            # With float32 activations the weights are the parameters.
            "weights": weights if item < FLOAT32_BYTES else 0.0,
            "optimizer": parameters * self._optimizer_ratio,
            "gradients": GRADIENT_SHARE * weights + sums,
            "activations": self._activation_bytes(sizes),
            "teacher": FLOAT32_BYTES * _parameters_per_device(self._teacher, sizes, fsdp),
        }

    def _activation_bytes(self, sizes: dict[str, int]) -> float:
        """Returns the bytes that the forward pass keeps for the backward pass, logits included."""
        config, m, split = self._config, self._config.model, sizes["model"]
        item, rows = jnp.dtype(m.dtype).itemsize, self._rows(sizes)
        heads_dim, gates = m.num_heads * m.head_dim, 2 if m.activation == "geglu" else 1
        total, largest_layer = 0.0, 0.0
        for stack in STACKS:
            length, layers = config.length(stack), config.num_layers(stack)
            keys = length + (config.length("encoder") if stack == "decoder" else 0)
            attentions = SUBLAYERS[stack] - 1
            # Elements, in the activation dtype, of a layer's arrays.
            stream = rows * length * STREAM_COPIES * SUBLAYERS[stack] * m.d_model
            heads = rows * length * HEAD_ARRAYS * attentions * heads_dim / split
            scores = 0.0 if self._fused else rows * m.num_heads / split * length * keys
            hidden = rows * length * gates * m.d_ff / split
            sparse = len(config.sparse_layers(stack)) / layers
            slots = max((e.slots_per_token for e in self._expert_layers_of(stack)), default=1.0)
            hidden *= 1 + sparse * (slots - 1)
            slot_arrays = sparse * rows * length * slots * SLOT_ARRAYS * m.d_model
            layer = item * (stream + heads + SCORE_COPIES * scores + hidden + slot_arrays)
            dots_stream = rows * length * DOTS_STREAM_COPIES * m.d_model
            kept = {
                "none": layer,
                "dots": item * (dots_stream + heads + hidden * (1 - sparse)),
                "full": item * rows * length * m.d_model,
            }[m.remat]
            total += layers * kept
            largest_layer = max(largest_layer, layer * (config.moe.every if config.sparse else 1))
        logits = rows * config.data.targets_length * m.vocab_size * FLOAT32_BYTES / split
        # What is computed again exists for one block at a time.
        once = largest_layer if m.remat != "none" else 0.0
        return total + once + LOGITS_COPIES * min(logits, LOGITS_BYTES)

    def _expert_layers_of(self, stack: str) -> list[ExpertLayer]:
        return [layer for layer in self._expert_layers if layer.stack == stack]

    def _seconds(
        self, sizes: dict[str, int], fsdp: bool, memory: dict[str, float]
    ) -> dict[str, float]:
        """Returns the seconds that each resource of a device is busy."""
        config, chip = self._config, self._chip
        item = jnp.dtype(config.model.dtype).itemsize
        flops = PASSES_PER_STEP[config.model.remat] * self._flops + self._teacher_flops
        flops *= config.data.batch_size / math.prod(sizes.values())
        microbatches = config.train.accumulate
        parameter_traffic = (
            PARAMETER_TRAFFIC_PER_STEP + PARAMETER_TRAFFIC_PER_MICROBATCH * microbatches
        )
        traffic = parameter_traffic * memory["parameters"]
        activation_traffic = ACTIVATION_TRAFFIC_PER_MICROBATCH["tpu" if self._is_tpu else "gpu"]
        traffic += activation_traffic * microbatches * memory["activations"]
        if fsdp:
            gathered = item * sum(self._dense_and_expert_parameters(sizes, False))
            traffic += FSDP_TRAFFIC_PER_MICROBATCH * microbatches * gathered
        traffic += microbatches * memory["teacher"]
        seconds = {
            "compute": flops / chip.flops,
            "memory": traffic / (chip.memory_rate or math.inf),
            "links": self._link_seconds(sizes, fsdp),
        }
        if sizes["slice"] > 1:
            dense, experts = self._dense_and_expert_parameters(sizes, True)
            size = item * (dense / sizes["expert"] + experts)
            share = (sizes["slice"] - 1) / sizes["slice"]
            reduced = microbatches * ALL_REDUCE_PASSES * share * size
            seconds["slices"] = reduced / (chip.slice_rate or math.inf)
        return seconds

    def _link_seconds(self, sizes: dict[str, int], fsdp: bool) -> float:
        """Returns the seconds that the links inside a slice are busy.

        Gradients are reduced over the batch axes, tokens exchanged over `expert`, activations
        reduced over `model`.
        """
        config, m = self._config, self._config.model
        item, microbatches = jnp.dtype(m.dtype).itemsize, config.train.accumulate
        expert, split = sizes["expert"], sizes["model"]
        dense, experts = self._dense_and_expert_parameters(sizes, False)

        def ring(size: float, *axes: str) -> float:
            """Returns the seconds of a ring all-gather or reduce-scatter of `size` bytes."""
            devices = math.prod(sizes[axis] for axis in axes)
            rate = self._chip.rate_within(axes_span(sizes, axes)) or math.inf
            return size * (devices - 1) / devices / rate

        # Gradients are reduced in every microbatch: a device adds up only its own part.
        total = microbatches * ALL_REDUCE_PASSES * ring(item * dense, "data", "expert")
        total += microbatches * ALL_REDUCE_PASSES * ring(item * experts, "data")
        if fsdp:
            gathers = FSDP_GATHERS_PER_MICROBATCH * microbatches
            total += gathers * ring(item * (dense + experts), "data")
        for stack in STACKS:
            tokens = self._rows(sizes) * config.length(stack)
            reduces = ALL_REDUCES_PER_SUBLAYER * SUBLAYERS[stack] * config.num_layers(stack)
            all_reduce = ALL_REDUCE_PASSES * ring(item * tokens * m.d_model, "model")
            total += microbatches * reduces * all_reduce
            for layer in self._expert_layers_of(stack):
                for devices, places in self._hops(layer, expert, tokens):
                    sent = item * places * m.d_model / split * (devices - 1) / devices
                    hop = all_to_all_seconds(
                        self._chip, sent, devices, axes_span(sizes, ("expert",))
                    )
                    total += microbatches * ALL_TO_ALLS_PER_EXPERT_LAYER * hop
        return total

    def _hops(self, layer: ExpertLayer, expert: int, tokens: float) -> list[tuple[int, float]]:
        """Returns the hops of an all-to-all over `expert`: (devices, tokens sent by a device).

        A hop is one exchange within groups of devices. A group of tokens on one device needs one
        hop with its expert slots; a group over several devices needs the padded hops of
        `split_hops`.
        """
        if expert == 1:
            return []
        if layer.group_tokens <= tokens:
            return [(expert, tokens * layer.slots_per_token)]
        most = tokens * max(layer.capacity_factor or 1.0, self._config.moe.max_experts_per_token)
        return [(size, size * padded_size(most / size)) for size in split_hops(expert, most)]


def _parameter_axes_and_sizes(config: Config) -> list[tuple[tuple[str, ...], int]]:
    """Returns logical axes and number of elements of each parameter of a model."""
    model = abstract_model(config)
    axes = logical_axes(model)
    return [(axes[name], math.prod(leaf.shape)) for name, leaf in named_parameters(model).items()]


def _parameters_per_device(
    parameters: list[tuple[tuple[str, ...], int]], sizes: dict[str, int], fsdp: bool
) -> float:
    """Returns how many of `parameters` (axes and sizes) a device of a mesh holds."""
    return sum(
        count / math.prod(sizes[axis] for axis in partition_spec(axes, fsdp=fsdp) if axis)
        for axes, count in parameters
    )


def suggestion_to_json(suggestion: MeshSuggestion) -> dict[str, Any]:
    """Returns the suggestion as JSON values."""
    return dataclasses.asdict(suggestion) | {
        "memory": suggestion.memory,
        "step_seconds": suggestion.step_seconds,
    }


def suggestions_table(suggestions: list[MeshSuggestion], max_rows: int = 10) -> str:
    """Returns the first `max_rows` suggestions as a text table."""
    lines = [f"{'data':>6}{'expert':>8}{'model':>7}  {'fsdp':5}{'step':>10}{'memory':>12}"]
    for suggestion in suggestions[:max_rows]:
        mesh = suggestion.mesh
        lines.append(
            f"{mesh['data']:>6}{mesh['expert']:>8}{mesh['model']:>7}"
            f"  {'yes' if suggestion.fsdp else '':5}"
            f"{1e3 * suggestion.step_seconds:>7,.0f} ms"
            f"{suggestion.memory / 2**30:>8,.1f} GiB"
            f"{'' if suggestion.fits else '  does not fit'}"
        )
    return "\n".join(lines)
