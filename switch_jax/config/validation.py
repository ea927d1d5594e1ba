"""Validation of a config: ranges of values and contradictions between them."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from switch_jax.config.expert_capacity import expert_capacity, rows_per_group
from switch_jax.config.parameter_patterns import compile_pattern, parse_init_rules
from switch_jax.config.schema import MAX_FUSED_LENGTH, STACKS, Config
from switch_jax.errors import UserError


def validate(config: Config) -> None:
    """Raises `UserError` for values out of range or in contradiction; types are checked before."""
    _check_sizes(config)
    _check_ranges(config)
    compile_pattern("lora.of", config.lora.of)
    compile_pattern("optimizer.trained", config.optimizer.trained)
    parse_init_rules(config.init_rules)
    if config.sparse:
        _check_placement(config)
        _check_router(config)
        _check_capacity(config)
    model, data, train = config.model, config.data, config.train
    _require(
        data.rate_exponent <= 2,
        f"data.rate_exponent must be from 0 to 2, not {data.rate_exponent}.",
    )
    _require(
        model.relative_buckets >= 4 and model.relative_buckets % 4 == 0,
        f"model.relative_buckets must be a multiple of 4, not {model.relative_buckets}.",
    )
    _require(
        model.relative_max_distance > model.relative_buckets // 2,
        f"model.relative_max_distance must be above half of model.relative_buckets, not"
        f" {model.relative_max_distance}.",
    )
    for key in ("pad_id", "eos_id", "start_id"):
        _require(
            getattr(model, key) < max(model.vocab_size, 2),
            f"model.{key}={getattr(model, key)} is not below model.vocab_size={model.vocab_size};"
            " change one of them.",
        )
    _require(
        model.pad_id != model.eos_id,
        f"model.pad_id and model.eos_id are both {model.pad_id}, so the end of a text would be"
        " taken for padding; change one of them.",
    )
    _require(
        data.batch_size % train.accumulate == 0,
        f"data.batch_size={data.batch_size} is not a multiple of"
        f" train.accumulate={train.accumulate}; change one of them.",
    )
    _require(
        train.keep_best is None or train.checkpoint_every % train.eval_every == 0,
        f"train.keep_best={train.keep_best} needs every checkpoint evaluated, and"
        f" train.checkpoint_every={train.checkpoint_every} is not a multiple of"
        f" train.eval_every={train.eval_every}; change one of them.",
    )
    _require(
        config.init_optimizer == "fresh" or config.init_from is not None,
        "init_optimizer=loaded needs init_from, the checkpoint to load it from; set both.",
    )
    _require(
        not config.init_rules or config.init_from is not None,
        "init_rules needs init_from, the checkpoint whose parameters it names; set both.",
    )
    _require(
        0 <= config.distill.soft_weight <= 1,
        f"distill.soft_weight must be from 0 to 1, not {config.distill.soft_weight}.",
    )
    _require(
        config.distill.temperature > 0,
        f"distill.temperature must be above 0, not {config.distill.temperature}.",
    )
    longest = max(config.length(stack) for stack in STACKS)
    _require(
        config.model.attention != "fused" or longest <= MAX_FUSED_LENGTH,
        f"model.attention=fused has kernels for rows of up to {MAX_FUSED_LENGTH} tokens, not"
        f" {longest}; set model.attention=einsum or auto.",
    )
    profiled = config.train.profile_steps
    if profiled is not None:
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", profiled, re.ASCII)
        _require(
            match is not None and 1 <= int(match[1]) <= int(match[2]) <= config.train.steps,
            f"train.profile_steps={profiled!r} must be FIRST:LAST, such as 10:15, with 1 ≤ FIRST ≤"
            f" LAST ≤ train.steps={config.train.steps}.",
        )
    sizes = [
        getattr(config.mesh, f.name) for f in dataclasses.fields(config.mesh) if f.name != "fsdp"
    ]
    _require(
        sizes.count(-1) <= 1 and all(s >= 1 or s == -1 for s in sizes),
        "mesh.slice, mesh.data, mesh.expert and mesh.model must be at least 1,"
        " and only one of them may be -1 (whatever is left).",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


_MINIMUMS = {
    "model": {
        0: "pad_id eos_id start_id",
        1: "vocab_size d_model d_ff num_heads head_dim num_encoder_layers num_decoder_layers"
        " relative_max_distance",
    },
    "moe": {
        0: "num_experts shared_d_ff second_threshold sampling_temperature min_capacity"
        " aux_loss_weight z_loss_weight balance_bias_rate router_init_std",
        1: "every first last top_k group_size expert_capacity",
    },
    "data": {0: "rate_exponent", 1: "inputs_length targets_length batch_size"},
    "lora": {0: "rank"},
    "distill": {0: "start_step"},
    "eval": {1: "beam_size"},
    "optimizer": {0: "warmup_steps cooldown_steps learning_rate weight_decay max_grad_norm"},
    "train": {
        0: "z_loss_weight",
        1: "steps accumulate log_every eval_every eval_batches checkpoint_every keep_checkpoints"
        " idle_expert_steps",
    },
}


_MAX_WHOLE = 2**31 - 1  # of XLA's sizes, and of the step counter
_MAX_SEED = 2**32 - 1  # JAX drops higher bits, so that different seeds would be the same
_MAX_FLOAT32 = 3.4e38


def _check_sizes(config: Config) -> None:
    """Raises `UserError` for numbers that computations would round or wrap, and for empty texts."""
    for key, value in _values(config):
        if key.endswith(".seed"):
            _require(
                -_MAX_WHOLE <= value <= _MAX_SEED,
                f"{key} must be from {-_MAX_WHOLE} to {_MAX_SEED}, not {value}.",
            )
        elif type(value) is int:
            _require(value <= _MAX_WHOLE, f"{key} must be at most {_MAX_WHOLE}, not {value}.")
        elif type(value) is float:
            _require(
                abs(value) <= _MAX_FLOAT32,
                f"{key} must be a number of 32 bits, at most {_MAX_FLOAT32}, not {value}.",
            )
        _require(value != "" or key == "init_rules", f"{key} is empty; set it, or leave it out.")


def _values(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of all keys."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _check_ranges(config: Config) -> None:
    for group, by_minimum in _MINIMUMS.items():
        for minimum, names in by_minimum.items():
            for name in names.split():
                value = getattr(getattr(config, group), name)
                _require(
                    value is None or value >= minimum,
                    f"{group}.{name} must be at least {minimum}, not {value}.",
                )
    moe = config.moe
    for key, rate in (
        ("model.dropout_rate", config.model.dropout_rate),
        ("moe.expert_dropout_rate", moe.expert_dropout_rate),
        ("moe.input_dropout_rate", moe.input_dropout_rate),
        ("train.label_smoothing", config.train.label_smoothing),
        ("moe.jitter", moe.jitter),
    ):
        _require(0 <= rate < 1, f"{key} must be at least 0 and below 1, not {rate}.")
    for key, factor in (
        ("moe.capacity_factor", moe.capacity_factor),
        ("moe.eval_capacity_factor", moe.eval_capacity_factor),
    ):
        _require(factor is None or factor > 0, f"{key} must be above 0 or None, not {factor}.")
    _require(config.lora.alpha > 0, f"lora.alpha must be above 0, not {config.lora.alpha}.")
    scale = config.model.init_scale
    _require(scale > 0, f"model.init_scale must be above 0, not {scale}.")


def _check_placement(config: Config) -> None:
    moe = config.moe
    _require(
        moe.first is None or moe.last is None,
        f"moe.first={moe.first} and moe.last={moe.last} exclude each other; set one to None.",
    )
    limits = {key: getattr(moe, key) for key in ("first", "last") if getattr(moe, key) is not None}
    for stack in STACKS:
        if moe.stacks not in ("both", stack):
            continue
        layers = {f"model.num_{stack}_layers": config.num_layers(stack)}
        for key, count in limits.items():
            _require(
                count <= config.num_layers(stack),
                f"moe.{key}={count} is more than model.num_{stack}_layers="
                f"{config.num_layers(stack)}; make it smaller.",
            )
            layers = {f"moe.{key}": count}
        for key, count in layers.items():
            _require(
                count % moe.every == 0,
                f"{key}={count} is not a multiple of moe.every={moe.every}; change one of them.",
            )
    _require(
        moe.shared_d_ff == 0 or moe.sublayer != "attention",
        f"moe.shared_d_ff={moe.shared_d_ff} is a feed-forward expert and moe.sublayer=attention"
        " has none; set moe.sublayer=both or moe.shared_d_ff=0.",
    )
    _require(
        moe.expert_dropout_rate == 0 or moe.sublayer != "attention",
        f"moe.expert_dropout_rate={moe.expert_dropout_rate} is for hidden activations, and experts"
        " of moe.sublayer=attention have none; set it to 0.",
    )


def _check_router(config: Config) -> None:
    moe = config.moe
    _require(
        moe.num_selected <= moe.num_experts,
        f"moe.top_k={moe.top_k} is more than moe.num_experts={moe.num_experts}; make it at most"
        " that.",
    )
    one_expert = {
        "switch": "for moe.top_k={} set moe.router=top_k",
        "hash": "leave moe.top_k at None",
        "expert_choice": "there experts choose their tokens, so leave moe.top_k at None",
    }
    if moe.router in one_expert:
        _require(
            moe.num_selected == 1,
            f"moe.router={moe.router} cannot have moe.top_k={moe.top_k};"
            f" {one_expert[moe.router].format(moe.top_k)}.",
        )
    if moe.router == "expert_choice":
        _require(
            moe.stacks == "encoder",
            "moe.router=expert_choice would let a decoder's experts choose a token by looking at"
            " later ones, which are not there when text is generated; set moe.stacks=encoder.",
        )
        _require(
            None not in (moe.capacity_factor, moe.eval_capacity_factor),
            "moe.router=expert_choice needs a capacity, which is how many tokens an expert"
            " chooses; set moe.capacity_factor and moe.eval_capacity_factor.",
        )
        _require(
            moe.capacity_factor == moe.eval_capacity_factor,
            "With moe.router=expert_choice, how many tokens an expert takes is part of what is"
            f" learned; set moe.eval_capacity_factor={moe.capacity_factor} as in training.",
        )
    several = moe.router in ("top_k", "batch_prioritized")
    _require(
        several or not moe.renormalize,
        f"moe.renormalize=True divides the gates of several experts, and moe.router={moe.router}"
        " has one; set moe.router=top_k or moe.renormalize=False.",
    )
    _require(
        moe.second_policy == "all" or (several and moe.num_selected > 1),
        f"moe.second_policy={moe.second_policy} is about second experts, and there are none; set"
        " moe.router=top_k and moe.top_k=2, or moe.second_policy=all.",
    )
    noise = [n for n in ("jitter", "input_dropout_rate", "sampling_temperature") if getattr(moe, n)]
    _require(
        len(noise) < 2,
        f"moe.{' and moe.'.join(noise)} are alternative ways to explore; set all but one to 0.",
    )
    _require(
        not noise or moe.router != "hash",
        f"moe.router=hash looks at the token alone; set moe.{''.join(noise)}=0.",
    )
    _require(
        not moe.sampling_temperature or moe.router != "expert_choice",
        "moe.router=expert_choice has no expert to draw; set moe.sampling_temperature=0.",
    )
    _require(
        moe.balance_scope == "group" or moe.router not in ("hash", "expert_choice"),
        f"moe.router={moe.router} has no balance loss; set moe.balance_scope=group.",
    )
    if moe.balance_bias_rate:
        _require(
            moe.router not in ("hash", "expert_choice"),
            f"moe.router={moe.router} has no ranking that a bias could change; set"
            " moe.balance_bias_rate=0.",
        )
        _require(
            not moe.sampling_temperature,
            "moe.balance_bias_rate changes which expert ranks first and moe.sampling_temperature"
            " draws one; set one of them to 0.",
        )


def _check_capacity(config: Config) -> None:
    moe = config.moe
    if moe.expert_capacity is not None:
        _require(
            None not in (moe.capacity_factor, moe.eval_capacity_factor),
            f"moe.expert_capacity={moe.expert_capacity} drops tokens, and moe.capacity_factor or"
            " moe.eval_capacity_factor is None, which drops none; set moe.expert_capacity=None, or"
            " both factors to a number.",
        )
        _require(
            moe.router != "expert_choice",
            "moe.router=expert_choice takes as many tokens as moe.capacity_factor says; set"
            " moe.expert_capacity=None.",
        )
    for stack in STACKS:
        if not config.sparse_layers(stack):
            continue
        length = config.length(stack)
        tokens = length * rows_per_group(moe, config.data.batch_size, length)
        for key in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(moe, key)
            _require(
                expert_capacity(moe, tokens, factor) > 0,
                f"moe.{key}={factor} leaves an expert no slot in a group of the {stack}: {factor} ×"
                f" {tokens} tokens / {moe.num_experts} experts, rounded down, is 0; set"
                " moe.min_capacity=1, moe.capacity_rounding=ceil or a larger factor.",
            )
