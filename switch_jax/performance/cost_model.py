"""Cost model: parameters, FLOPs, state bytes and expert slots of a config, by arithmetic.

Shapes come from `jax.eval_shape`: no accelerator and no data are needed. A FLOP is one
multiplication or addition, so that a weight costs two per token. There are three conventions, and
every figure names its own:

    paper     forward pass as the paper counts it: two per weight per token of the weight's own
              stack and for the logits; scores once, nothing for applying them to the values;
              cross-attention's keys and values as if there were as many as targets; no router,
              no padding. Reproduces the FLOPs column of the paper's Table 9.
    computed  forward pass as it runs: every matmul of the model, with full (not causal)
              scores, routers, and all slots of the experts whether a token is in them or not.
    model     training as utilisation is defined: three times the computed forward pass
              without the slots that are bound to stay empty; recomputation does not count.
"""

import dataclasses
import math
from typing import Any

import jax

from switch_jax.config import Config
from switch_jax.model import (
    CONVENTIONS,
    abstract_model,
    add_adapters,
    expert_layers,
    flops_by_part,
    flops_per_sequence,
    format_si,
    init_adapters,
    named_parameters,
    parameter_metadata,
    params_by_group,
)
from switch_jax.training import make_optimizer


def state_bytes(config: Config) -> dict[str, int]:
    """Returns the bytes of `parameters` (float32) and `optimizer` state, over all devices."""
    model = abstract_model(config)
    metadata = parameter_metadata(model)
    params = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named_parameters(model).items()
    }
    params = jax.eval_shape(lambda params: init_adapters(params, metadata, config), params)
    optimizer = make_optimizer(config, add_adapters(metadata, config))
    parts = {"parameters": params, "optimizer": jax.eval_shape(optimizer.init, params)}
    return {
        part: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for part, tree in parts.items()
    }


def cost_summary(config: Config, teacher: Config | None = None) -> dict[str, Any]:
    """Returns the figures of `switch-jax inspect`, as JSON values.

    `slots_per_token` is the mean over the expert layers of both stacks, None for a dense model.
    The entry `teacher` is None without a teacher. A teacher's bytes do not count as state: its
    parameters do not change and are in no checkpoint.
    """
    teacher_cost = None if teacher is None else _teacher_cost(teacher)
    teacher_flops = 0.0 if teacher_cost is None else teacher_cost["flops_per_sequence_computed"]
    params, parts = params_by_group(config), flops_by_part(config)
    layers, bytes_by_part = expert_layers(config), state_bytes(config)
    tokens = [config.length(layer.stack) for layer in layers]
    slots = sum(n * layer.slots_per_token for n, layer in zip(tokens, layers))
    return {
        "params": sum(params.values()),
        "params_by_group": params,
        "flops_per_sequence": flops_per_sequence(config),
        "flops_per_sequence_computed": sum(parts.values()),
        "flops_by_part": parts,
        "train_flops_per_step": (3 * sum(parts.values()) + teacher_flops) * config.data.batch_size,
        "flops_conventions": CONVENTIONS,
        "state_bytes": sum(bytes_by_part.values()),
        "state_bytes_by_part": bytes_by_part,
        "teacher": teacher_cost,
        "slots_per_token": slots / sum(tokens) if layers else None,
        "moe": [dataclasses.asdict(layer) for layer in layers],
    }


def _teacher_cost(config: Config) -> dict[str, Any]:
    return {
        "params": sum(params_by_group(config).values()),
        "bytes": state_bytes(config)["parameters"],
        "flops_per_sequence_computed": sum(flops_by_part(config).values()),
    }


def cost_table(summary: dict[str, Any]) -> str:
    """Returns a result of `cost_summary` as aligned lines."""
    lines: list[str] = []

    def add_line(name: str, value: str, note: str = "") -> None:
        lines.append(f"{name:29}{value:>18}  {note}".rstrip())

    add_line("parameters", f"{summary['params']:,}")
    for name, count in summary["params_by_group"].items():
        add_line(f"  {name}", f"{count:,}")
    add_line("state", format_si(summary["state_bytes"], "B"), "over all devices")
    for name, size in summary["state_bytes_by_part"].items():
        add_line(f"  {name}", format_si(size, "B"))
    if summary["teacher"] is not None:
        add_line("teacher", f"{summary['teacher']['params']:,}", "parameters")
        add_line("  memory", format_si(summary["teacher"]["bytes"], "B"), "over all devices")
    for name, convention in CONVENTIONS.items():
        add_line(name, format_si(summary[name], "FLOP"), convention)
    for name, flops in summary["flops_by_part"].items():
        add_line(f"  {name}", format_si(flops, "FLOP"), "of computed")
    for stack in ("encoder", "decoder"):
        layers = [each for each in summary["moe"] if each["stack"] == stack]
        if not layers:
            continue
        layer = layers[0]  # the expert layers of a stack are all alike
        configured = "dropless" if layer["capacity_factor"] is None else layer["capacity_factor"]
        change = f", changed by {layer['changed_by']}" if layer["changed_by"] else ""
        numbers = dict.fromkeys(str(each["layer"]) for each in layers)
        lines.append(f"{stack} expert layers {', '.join(numbers)}")
        add_line("  group", f"{layer['group_tokens']:,}", f"tokens, {layer['group_rows']} rows")
        add_line(
            "  capacity", f"{layer['capacity']:,}", f"at evaluation {layer['eval_capacity']:,}"
        )
        note = f"configured {configured}{change}"
        add_line("  slots per token", f"{layer['slots_per_token']:.3f}", note)
        add_line("  at evaluation", f"{layer['eval_slots_per_token']:.3f}")
        add_line("  dropped if uniform", f"{layer['dropped_if_uniform']:.2%}")
    if summary["moe"]:
        add_line("slots per token, both stacks", f"{summary['slots_per_token']:.3f}")
    return "\n".join(lines)
