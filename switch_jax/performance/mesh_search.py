"""Which meshes suit a config on a number of chips: memory and step time by arithmetic.

Rougher than compiling (`aot.py`), which takes minutes where this takes milliseconds: activations
are counted by the size of what a layer keeps for the backward pass, and every resource works at
its published rate. Good enough to rank meshes; compile the one you choose.

Axis letters: see `routing.py`.
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


@dataclasses.dataclass(frozen=True)
class MeshSuggestion:
    """A mesh, and what a train step is predicted to take of each device."""

    mesh: dict[str, int]
    fsdp: bool
    memory_bytes: dict[str, float]  # parameters, optimizer, gradients, activations, teacher
    seconds: dict[str, float]  # compute, memory, links, and with several slices slices
    fits: bool

    @property
    def memory(self) -> float:
        """Bytes of a device in use."""
        return sum(self.memory_bytes.values())

    @property
    def step_seconds(self) -> float:
        """Matmuls and memory overlap, communication with neither."""
        return estimate_step_seconds(self.seconds)


def estimate_step_seconds(seconds: dict[str, float]) -> float:
    """A step's time from that of each resource, where only matmuls and memory overlap."""
    network = sum(seconds.get(name, 0.0) for name in ("links", "slices"))
    return max(seconds["compute"], seconds["memory"]) + network


def suggest_meshes(
    config: Config, chip: Chip, devices: int, slices: int = 1, teacher: Config | None = None
) -> list[MeshSuggestion]:
    """The legal meshes of so many devices, those that fit first, the fastest of them first.

    `mesh.fsdp` is set where it makes a mesh fit, or faster. Raises `UserError` where no mesh is
    legal.
    """
    work = _Work(config, chip, teacher)
    found = []
    for model in _divisors(devices // slices):
        for expert in _divisors(devices // (slices * model)):
            data = devices // (slices * model * expert)
            sizes = dict(zip(MESH_AXES, (slices, data, expert, model)))
            choices = (False, True) if data > 1 else (False,)
            legal = [
                work.suggestion(sizes, fsdp)
                for fsdp in choices
                if _legal(config, teacher, sizes, fsdp)
            ]
            found += sorted(legal, key=_order)[:1]
    if not found:
        check_mesh(config, dict(zip(MESH_AXES, (slices, devices // slices, 1, 1))), teacher)
        raise UserError(f"No mesh of {devices} devices divides the model and its batch.")
    return sorted(found, key=_order)


def _order(suggestion: MeshSuggestion) -> tuple[bool, float]:
    return not suggestion.fits, suggestion.step_seconds


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _legal(config: Config, teacher: Config | None, sizes: dict[str, int], fsdp: bool) -> bool:
    """Whether a mesh divides the models and their batch, and no device would be idle."""
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


class _Work:
    """What a train step of a config does, and what of it falls to a device of a mesh."""

    def __init__(self, config: Config, chip: Chip, teacher: Config | None = None):
        state = state_bytes(config)
        self._config, self._chip = config, chip
        self._parameters = _parameters(config)
        self._teacher = [] if teacher is None else _parameters(teacher)
        self._optimizer = state["optimizer"] / state["parameters"]
        self._flops = sum(flops_by_part(config).values())
        self._teacher_flops = sum(flops_by_part(teacher).values()) if teacher else 0.0
        self._expert_layers = expert_layers(config)

    def suggestion(self, sizes: dict[str, int], fsdp: bool) -> MeshSuggestion:
        """What a mesh would take."""
        memory = self._memory(sizes, fsdp)
        fits = self._chip.memory is None or sum(memory.values()) <= self._chip.memory
        return MeshSuggestion(sizes, fsdp, memory, self._seconds(sizes, fsdp, memory), fits)

    def _count(self, sizes: dict[str, int], fsdp: bool, *, experts: bool) -> float:
        """Parameters of expert layers' experts, or of all else, on a device."""
        mine = [(axes, n) for axes, n in self._parameters if ("expert" in axes) == experts]
        return _share(mine, sizes, fsdp)

    def _rows(self, sizes: dict[str, int]) -> float:
        """Rows of a microbatch on a device."""
        shards = math.prod(sizes[axis] for axis in BATCH_AXES)
        return self._config.data.batch_size / self._config.train.accumulate / shards

    def _memory(self, sizes: dict[str, int], fsdp: bool) -> dict[str, float]:
        kept = 4 * sum(self._count(sizes, fsdp, experts=experts) for experts in (False, True))
        return {
            "parameters": kept,
            "optimizer": kept * self._optimizer,
            "gradients": kept * (2 if self._config.train.accumulate > 1 else 1),
            "activations": self._activations(sizes),
            "teacher": 4 * _share(self._teacher, sizes, fsdp),
        }

    def _activations(self, sizes: dict[str, int]) -> float:
        """What the forward pass keeps for the backward pass, logits included."""
        config, m, split = self._config, self._config.model, sizes["model"]
        item, rows = jnp.dtype(m.dtype).itemsize, self._rows(sizes)
        inner, gates = m.num_heads * m.head_dim, 2 if m.activation == "geglu" else 1
        total, largest = 0.0, 0.0
        for stack in STACKS:
            length, layers = config.length(stack), config.num_layers(stack)
            keys = length + (config.length("encoder") if stack == "decoder" else 0)
            attentions = 2 if stack == "decoder" else 1
            # Of each sub-layer: its input, that in float32, and normed.
            stream = rows * length * 4 * (attentions + 1) * m.d_model
            heads = rows * length * 4 * attentions * inner / split
            scores = rows * m.num_heads / split * length * keys * 3  # in float32 and rounded
            hidden = rows * length * (gates + 1) * m.d_ff / split
            sparse = len(config.sparse_layers(stack)) / layers
            slots = max((e.slots_per_token for e in self._layers_of(stack)), default=1.0)
            hidden *= 1 + sparse * (slots - 1)
            whole = item * (stream + heads + scores + hidden)
            kept = {
                "none": whole,
                "dots": item * (rows * length * 2 * m.d_model + heads + hidden * (1 - sparse)),
                "full": item * rows * length * m.d_model,
            }[m.remat]
            total += layers * kept
            largest = max(largest, whole * (config.moe.every if config.sparse else 1))
        logits = rows * config.data.targets_length * m.vocab_size * 4 / split
        # Weights as they were used: rounded, and gathered where FSDP splits them.
        weights = sum(self._count(sizes, False, experts=experts) for experts in (False, True))
        once = item * weights if m.remat == "none" else largest
        return total + once + 3 * min(logits, LOGITS_BYTES)

    def _layers_of(self, stack: str) -> list[ExpertLayer]:
        return [layer for layer in self._expert_layers if layer.stack == stack]

    def _seconds(
        self, sizes: dict[str, int], fsdp: bool, memory: dict[str, float]
    ) -> dict[str, float]:
        config, chip = self._config, self._chip
        passes = {"none": 3, "dots": 3.3, "full": 4}[config.model.remat]
        flops = passes * self._flops + self._teacher_flops
        flops *= config.data.batch_size / math.prod(sizes.values())
        # How often weights, with gradients and optimizer, and activations are read or written:
        # about what the compiler made of the paper's models.
        accumulate = config.train.accumulate
        traffic = (14 + 2 * accumulate) * memory["parameters"]
        traffic += 8 * accumulate * memory["activations"]
        traffic += accumulate * memory["teacher"]
        seconds = {
            "compute": flops / chip.flops,
            "memory": traffic / (chip.memory_rate or math.inf),
            "links": self._link_seconds(sizes, fsdp),
        }
        if sizes["slice"] > 1:
            dense, experts = (self._count(sizes, True, experts=e) for e in (False, True))
            size = jnp.dtype(config.model.dtype).itemsize * (dense / sizes["expert"] + experts)
            share = (sizes["slice"] - 1) / sizes["slice"]
            seconds["slices"] = 2 * share * size / (chip.slice_rate or math.inf)
        return seconds

    def _link_seconds(self, sizes: dict[str, int], fsdp: bool) -> float:
        """Gradients over the batch axes, tokens over `expert`, activations over `model`."""
        config, m, rate = self._config, self._config.model, self._chip.link_rate or math.inf
        item, accumulate = jnp.dtype(m.dtype).itemsize, config.train.accumulate
        data, expert, split = sizes["data"], sizes["expert"], sizes["model"]
        dense, experts = (self._count(sizes, False, experts=e) for e in (False, True))

        def ring(size: float, devices: int) -> float:
            return size * (devices - 1) / devices / rate

        total = 2 * ring(item * dense, data * expert) + 2 * ring(item * experts, data)
        if fsdp:
            total += accumulate * ring(item * (dense + experts), data)
        for stack in STACKS:
            tokens = self._rows(sizes) * config.length(stack)
            # Sums of activations, forward and backward, after each sub-layer.
            sums = 2 * (3 if stack == "decoder" else 2) * config.num_layers(stack)
            total += accumulate * sums * 2 * ring(item * tokens * m.d_model, split)
            for layer in self._layers_of(stack):
                for size, places in self._parcels(layer, expert, tokens):
                    sent = item * places * m.d_model / split * (size - 1) / size
                    total += accumulate * 4 * all_to_all_seconds(self._chip, sent, size)
        return total

    def _parcels(self, layer: ExpertLayer, expert: int, tokens: float) -> list[tuple[int, float]]:
        """Devices of each hop to the experts, and places for tokens that a device sends in it."""
        if expert == 1:
            return []
        if layer.group_tokens <= tokens:
            return [(expert, tokens * layer.slots_per_token)]
        most = tokens * max(layer.capacity_factor or 1.0, self._config.moe.max_experts_per_token)
        return [(size, size * padded_size(most / size)) for size in split_hops(expert, most)]


def _parameters(config: Config) -> list[tuple[tuple[str, ...], int]]:
    """Logical axes and size of each parameter of a model."""
    model = abstract_model(config)
    axes = logical_axes(model)
    return [(axes[name], math.prod(leaf.shape)) for name, leaf in named_parameters(model).items()]


def _share(
    parameters: list[tuple[tuple[str, ...], int]], sizes: dict[str, int], fsdp: bool
) -> float:
    """How many of these parameters a device of a mesh holds."""
    return sum(
        count / math.prod(sizes[axis] for axis in partition_spec(axes, fsdp=fsdp) if axis)
        for axes, count in parameters
    )


def suggestion_to_json(suggestion: MeshSuggestion) -> dict[str, Any]:
    """JSON values."""
    return dataclasses.asdict(suggestion) | {
        "memory": suggestion.memory,
        "step_seconds": suggestion.step_seconds,
    }


def suggestions_table(suggestions: list[MeshSuggestion], most: int = 10) -> str:
    """The first suggestions as a table for people."""
    lines = [f"{'data':>6}{'expert':>8}{'model':>7}  {'fsdp':5}{'step':>10}{'memory':>12}"]
    for one in suggestions[:most]:
        mesh = one.mesh
        lines.append(
            f"{mesh['data']:>6}{mesh['expert']:>8}{mesh['model']:>7}  {'yes' if one.fsdp else '':5}"
            f"{1e3 * one.step_seconds:>7,.0f} ms{one.memory / 2**30:>8,.1f} GiB"
            f"{'' if one.fits else '  does not fit'}"
        )
    return "\n".join(lines)
