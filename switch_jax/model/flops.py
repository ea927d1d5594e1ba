"""flops: to be written."""

import dataclasses
import math

import numpy as np

from switch_jax.config import STACKS, Config, MoEConfig
from switch_jax.distributed import peak_flops
from switch_jax.model.layers import ParameterKind
from switch_jax.model.parameters import abstract_model, named_parameters, parameter_metadata

CONVENTIONS = {
    "flops_per_sequence": "paper: forward, scores once, no router, no padding",
    "flops_per_sequence_computed": "computed: forward, every matmul, all expert slots",
    "train_flops_per_step": "3 x computed + a teacher's, global batch",
}


# Groups of `params_by_group`, in their order.
_GROUP_OF_KIND: dict[ParameterKind, str] = {
    "expert": "experts",
    "router": "routers",
    "router_bias": "routers",
    "feed_forward": "dense_ffn",
    "attention": "{stack}_attention",
    "relative_bias": "relative_bias",
    "norm": "norms",
    "embedding": "embedding",
    "head": "head",
}


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """How an expert layer routes the global batch; `eval_` is at the evaluation factor.

    `slots_per_token`, E·C / S, is the capacity factor that really holds. Where it is not
    `capacity_factor`, `changed_by` says why: "rounding", "min_capacity", "expert_capacity", or
    "group_tokens" (no expert needs more slots than its group has tokens). Dropless, there are as
    many slots as assignments (what fills up blocks of rows is not counted), and with
    `expert_capacity`, which only limits them, no more.
    `dropped_if_uniform`: see the function; what a router that is balanced on average drops
    nevertheless, before ntlb's second tries.
    """

    stack: str
    layer: int  # among all layers of the stack, from 0
    sublayer: str  # "ff" or "attention"
    group_rows: int
    group_tokens: int  # S
    capacity: int  # C
    capacity_factor: float | None
    slots_per_token: float
    changed_by: str | None
    assignments_per_token: float
    dropped_if_uniform: float
    eval_capacity: int
    eval_slots_per_token: float


def params_by_group(config: Config) -> dict[str, int]:
    """Returns the number of parameters by group; groups without parameters are left out."""
    model = abstract_model(config)
    metadata = parameter_metadata(model)
    counts = {g.format(stack=s): 0 for g in _GROUP_OF_KIND.values() for s in STACKS}
    for name, leaf in named_parameters(model).items():
        group = _GROUP_OF_KIND[metadata[name].kind].format(stack=name.split("/")[0])
        counts[group] += math.prod(leaf.shape)
    return {group: count for group, count in counts.items() if count}


def flops_per_sequence(config: Config) -> int:
    """FLOPs of the forward pass over one pair of sequences, by the paper's convention."""
    m, T = config.model, config.data.targets_length
    inner = m.num_heads * m.head_dim
    flops = 2.0 * T * m.d_model * m.vocab_size
    keys = 0  # positions that a query has a score with, in all attentions of a layer
    for stack in STACKS:
        layers, length = config.num_layers(stack), config.length(stack)
        keys += length
        weights = _dense_attention(config, stack) + _dense_ffn(config, stack)
        if stack == "decoder":
            weights += 4 * m.d_model * inner * layers
        flops += 2 * length * (weights + layers * inner * keys)
    for layer in expert_layers(config):
        assignments = layer.assignments_per_token * config.length(layer.stack)
        flops += 2 * assignments * _expert_weights(config, layer.sublayer)
    return round(flops)


def flops_by_part(config: Config) -> dict[str, float]:
    """FLOPs of one pair's share of the training forward pass, by the computed convention.

    `empty_slots` are the slots beyond one per assignment, which no router could fill;
    `experts` are the others. The sum is everything.
    """
    m, S, T = config.model, config.data.inputs_length, config.data.targets_length
    inner = m.num_heads * m.head_dim
    parts = {"logits": 2.0 * T * m.d_model * m.vocab_size}

    def add(part: str, flops: float) -> None:
        if flops:
            parts[part] = parts.get(part, 0.0) + flops

    for stack in STACKS:
        layers, length = config.num_layers(stack), config.length(stack)
        attention, ffn = _dense_attention(config, stack), _dense_ffn(config, stack)
        add("attention", 2 * length * attention)
        scores = length**2
        if stack == "decoder":  # cross-attention: queries and outputs, keys and values
            add("attention", 2 * (2 * T + 2 * S) * m.d_model * inner * layers)
            scores += T * S
        add("scores_and_values", 4 * scores * inner * layers)
        add("dense_ffn", 2 * length * ffn)
    for layer in expert_layers(config):
        length, weights = config.length(layer.stack), _expert_weights(config, layer.sublayer)
        filled = min(layer.slots_per_token, layer.assignments_per_token)
        if config.moe.router != "hash":
            add("routers", 2 * length * m.d_model * config.moe.num_experts)
        add("experts", 2 * length * filled * weights)
        add("empty_slots", 2 * length * (layer.slots_per_token - filled) * weights)
    return parts


def _dense_attention(config: Config, stack: str) -> int:
    """Weights that every token of a stack passes in its self-attentions."""
    moe, m = config.moe, config.model
    matrices, sparse = 4 * config.num_layers(stack), len(config.sparse_layers(stack))
    if moe.sublayer in ("attention", "both"):
        matrices -= 3 * sparse  # only the output projection stays
    return matrices * m.d_model * m.num_heads * m.head_dim


def _dense_ffn(config: Config, stack: str) -> int:
    """Weights that every token of a stack passes in its feed-forward layers."""
    moe, sparse = config.moe, len(config.sparse_layers(stack))
    if moe.sublayer == "attention":
        sparse = 0
    dense = config.num_layers(stack) - sparse
    return (
        _ffn_matrices(config)
        * config.model.d_model
        * (dense * config.model.d_ff + sparse * moe.shared_d_ff)
    )


def _expert_weights(config: Config, sublayer: str) -> int:
    """Weights of one expert."""
    m = config.model
    if sublayer == "attention":
        return 2 * m.d_model * m.num_heads * m.head_dim
    return _ffn_matrices(config) * m.d_model * m.d_ff


def _ffn_matrices(config: Config) -> int:
    return 3 if config.model.activation == "geglu" else 2


def expert_layers(config: Config) -> list[ExpertLayer]:
    """Every expert layer, encoder first."""
    sublayers = {"both": ("attention", "ff")}.get(config.moe.sublayer, (config.moe.sublayer,))
    return [
        _expert_layer(config, stack, layer, sublayer)
        for stack in STACKS
        for layer in config.sparse_layers(stack)
        for sublayer in sublayers
    ]


def _expert_layer(config: Config, stack: str, layer: int, sublayer: str) -> ExpertLayer:
    moe, E = config.moe, config.moe.num_experts
    rows = moe.group_rows(config.data.batch_size, config.length(stack))
    S = rows * config.length(stack)
    C = moe.capacity(S, moe.capacity_factor)
    eval_C = moe.capacity(S, moe.eval_capacity_factor)
    assignments = _assignments(S, C, moe)

    def slots(factor: float | None, capacity: int) -> float:
        if factor is None:
            return assignments
        return min(E * capacity / S, assignments if moe.expert_capacity else math.inf)

    return ExpertLayer(
        stack=stack,
        layer=layer,
        sublayer=sublayer,
        group_rows=rows,
        group_tokens=S,
        capacity=C,
        capacity_factor=moe.capacity_factor,
        slots_per_token=slots(moe.capacity_factor, C),
        changed_by=_changed_by(S, C, moe),
        assignments_per_token=assignments,
        dropped_if_uniform=dropped_if_uniform(S, C, moe),
        eval_capacity=eval_C,
        eval_slots_per_token=slots(moe.eval_capacity_factor, eval_C),
    )


def _assignments(tokens: int, capacity: int, moe: MoEConfig) -> float:
    """Experts a token asks for; with expert choice, those that take it on average. Where
    `second_policy` leaves some second experts out, this counts them nevertheless.
    """
    if moe.router == "expert_choice":
        return moe.num_experts * capacity / tokens
    several = moe.router in ("top_k", "batch_prioritized") and moe.second_policy != "none"
    return moe.num_selected if several else 1


def _changed_by(tokens: int, capacity: int, moe: MoEConfig) -> str | None:
    if moe.capacity_factor is None:
        return None
    if moe.expert_capacity is not None:
        return "expert_capacity"
    exact = round(moe.capacity_factor * tokens / moe.num_experts, 9)
    if capacity == exact:
        return None
    if capacity > math.ceil(exact):
        return "min_capacity"
    return "group_tokens" if exact > tokens else "rounding"


def dropped_if_uniform(tokens: int, capacity: int, moe: MoEConfig) -> float:
    """Expected fraction of first-stage assignments without a slot, if each token of a group
    chose its experts uniformly at random and independently of the others.

    E[max(X - C, 0)] / E[X] with the binomial load X of an expert. For expert choice, the
    fraction of tokens that no expert takes, if experts chose at random.
    """
    if moe.router == "expert_choice":
        return (1 - capacity / tokens) ** moe.num_experts
    chance = _assignments(tokens, capacity, moe) / moe.num_experts
    if chance == 1:
        return max(tokens - capacity, 0) / tokens
    load = np.arange(tokens)
    ratio = (tokens - load) / (load + 1) * chance / (1 - chance)
    log_pmf = tokens * math.log1p(-chance) + np.concatenate([[0.0], np.cumsum(np.log(ratio))])
    excess = np.maximum(np.arange(tokens + 1) - capacity, 0)
    return float(excess @ np.exp(log_pmf)) / (tokens * chance)


def train_flops(config: Config, teacher: Config | None = None) -> float:
    """Of a train step, by the paper's convention: three forward passes, and one of a teacher."""
    passes = 3.0 * flops_per_sequence(config)
    if teacher is not None:
        passes += flops_per_sequence(teacher)
    return passes * config.data.batch_size


def mfu(
    config: Config,
    step_seconds: float,
    device_kind: str,
    num_devices: int,
    teacher: Config | None = None,
) -> float | None:
    """Model FLOPs utilisation of a train step, of the bfloat16 peak whatever the dtype.

    By the model convention; a teacher's forward pass is work of the step. None where the device's
    peak is not known.
    """
    peak = peak_flops(device_kind)
    if peak is None:
        return None
    flops = 0.0
    for model, passes in ((config, 3), (teacher, 1)):
        if model is not None:
            parts = flops_by_part(model)
            flops += passes * (sum(parts.values()) - parts.get("empty_slots", 0))
    return flops * config.data.batch_size / (step_seconds * num_devices * peak)


def format_si(value: float, unit: str) -> str:
    """Four digits and a decimal prefix: `si(124.6e9, "FLOP")` is "124.6 GFLOP"."""
    power = int(math.log10(max(value, 1)) // 3)
    return f"{value / 1000**power:.4g} {('', *'kMGTPEZY')[power]}{unit}"
