"""Parameter counts, expert capacity, FLOPs and MFU of a config: arithmetic on shapes.

Nothing is computed on a device, and no data is needed. A FLOP is one multiplication or addition, so
a weight costs two per token. Conventions:

    paper     forward pass as the paper counts it: two per weight per token of the weight's own
              stack and for the logits; attention scores once, nothing for applying them to the
              values; cross-attention's keys and values as if there were as many as targets; no
              router, no padding. Reproduces the FLOPs column of the paper's Table 9.
    computed  forward pass as it runs: every matmul of the model, with full (not causal) scores,
              routers, and all expert slots, empty or not.
    model     for MFU: three times the computed forward pass without the slots that no router can
              fill, plus a teacher's forward pass; recomputation does not count.

S is the tokens of a group, C the slots of an expert in a group, E the experts.
"""

import dataclasses
import math

import numpy as np

from switch_jax.config import STACKS, Config, MoEConfig, expert_capacity, rows_per_group
from switch_jax.distributed import peak_flops
from switch_jax.model.layers import ParameterKind
from switch_jax.model.parameters import abstract_model, named_parameters, parameter_metadata

CONVENTIONS = {
    "flops_per_sequence": "paper: forward, scores once, no router, no padding",
    "flops_per_sequence_computed": "computed: forward, every matmul, all expert slots",
    "train_flops_per_step": "3 x computed + a teacher's, global batch",
}
"""Convention of each number of FLOPs, as users see it."""

# Groups of `params_by_group` in the order of display; {stack} is "encoder" or "decoder".
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


def params_by_group(config: Config) -> dict[str, int]:
    """Returns the number of parameters by group; groups without parameters are left out."""
    model = abstract_model(config)
    metadata = parameter_metadata(model)
    counts = {g.format(stack=s): 0 for g in _GROUP_OF_KIND.values() for s in STACKS}
    for name, leaf in named_parameters(model).items():
        group = _GROUP_OF_KIND[metadata[name].kind].format(stack=name.split("/")[0])
        counts[group] += math.prod(leaf.shape)
    return {group: count for group, count in counts.items() if count}


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """Groups, capacity and expected drops of an expert layer, for the global batch.

    `slots_per_token` is the effective capacity factor E·C / S. Where it differs from
    `capacity_factor`, `changed_by` is the reason: "rounding", "min_capacity", "expert_capacity", or
    "group_tokens" (no expert needs more slots than its group has tokens). A dropless layer has as
    many slots as assignments (padding of blocks of rows is not counted). With `expert_capacity`,
    which is only an upper limit, there are not more slots than assignments either.

    `dropped_if_uniform` is the result of the function of that name: the drops of a router that is
    balanced on average, before the second assignment of No-Token-Left-Behind. Fields that begin
    with `eval_` are at the evaluation capacity factor.
    """

    stack: str
    layer: int  # number among all layers of the stack, from 0
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


def expert_layers(config: Config) -> list[ExpertLayer]:
    """Returns all expert layers, encoder first."""
    sublayers = {"both": ("attention", "ff")}.get(config.moe.sublayer, (config.moe.sublayer,))
    return [
        _expert_layer(config, stack, layer, sublayer)
        for stack in STACKS
        for layer in config.sparse_layers(stack)
        for sublayer in sublayers
    ]


def _expert_layer(config: Config, stack: str, layer: int, sublayer: str) -> ExpertLayer:
    """Computes the groups and the capacity of one expert layer."""
    moe, E = config.moe, config.moe.num_experts
    rows = rows_per_group(moe, config.data.batch_size, config.length(stack))
    S = rows * config.length(stack)
    C = expert_capacity(moe, S, moe.capacity_factor)
    eval_C = expert_capacity(moe, S, moe.eval_capacity_factor)
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
    """Returns the number of experts that a token is assigned to before dropping.

    For expert choice it is the mean over tokens. Second experts that `second_policy` may leave out
    are counted.
    """
    if moe.router == "expert_choice":
        return moe.num_experts * capacity / tokens
    several = moe.router in ("top_k", "batch_prioritized") and moe.second_policy != "none"
    return moe.num_selected if several else 1


def _changed_by(tokens: int, capacity: int, moe: MoEConfig) -> str | None:
    """Returns why the effective capacity factor is not `moe.capacity_factor`, None if it is."""
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
    """Returns the expected fraction of first-stage assignments without a slot, in [0, 1].

    The model: each token of a group chooses its experts uniformly at random, independently of other
    tokens. The fraction is E[max(X - C, 0)] / E[X], X the binomial load of an expert. For expert
    choice it is the fraction of tokens that no expert takes, if experts choose at random.

    Args:
      tokens: of a group (S).
      capacity: slots of an expert in the group (C).
      moe: router and number of experts.
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


def flops_per_sequence(config: Config) -> int:
    """Returns the FLOPs of a forward pass over one pair of sequences, by the paper's convention."""
    m, T = config.model, config.data.targets_length
    inner = m.num_heads * m.head_dim
    flops = 2.0 * T * m.d_model * m.vocab_size
    keys = 0  # keys per query, over all attentions of a layer
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
    """Returns the FLOPs of a training forward pass per pair of sequences, by part of the model.

    The parts add up to the computed convention. `empty_slots` are the slots beyond one per
    assignment, which no router can fill; `experts` are all other slots.
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
        if stack == "decoder":  # cross-attention: queries and output of T, keys and values of S
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
    """Returns the number of self-attention weights of a stack that are used for every token."""
    moe, m = config.moe, config.model
    matrices, sparse = 4 * config.num_layers(stack), len(config.sparse_layers(stack))
    if moe.sublayer in ("attention", "both"):
        matrices -= 3 * sparse  # only the output projection is dense
    return matrices * m.d_model * m.num_heads * m.head_dim


def _dense_ffn(config: Config, stack: str) -> int:
    """Returns the number of feed-forward weights of a stack that are used for every token."""
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
    """Returns the number of weights of one expert."""
    m = config.model
    if sublayer == "attention":
        return 2 * m.d_model * m.num_heads * m.head_dim
    return _ffn_matrices(config) * m.d_model * m.d_ff


def _ffn_matrices(config: Config) -> int:
    """Returns the number of matrices of a feed-forward network."""
    return 3 if config.model.activation == "geglu" else 2


def train_flops(config: Config, teacher: Config | None = None) -> float:
    """Returns the FLOPs of a train step, by the paper's convention.

    They are three forward passes of the model, and one of the teacher.
    """
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
    """Returns the model FLOPs utilisation of a train step, by the model convention.

    It is the fraction of the devices' bfloat16 peak, whatever the dtype is; None where the peak of
    the device is not known.

    Args:
      config: of the run.
      step_seconds: time of a train step.
      device_kind: `device_kind` of the JAX devices.
      num_devices: number of devices.
      teacher: config of the teacher, whose forward pass counts.
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
    """Formats with four digits and a decimal prefix: (124.6e9, "FLOP") → "124.6 GFLOP"."""
    power = int(math.log10(max(value, 1)) // 3)
    return f"{value / 1000**power:.4g} {('', *'kMGTPEZY')[power]}{unit}"
