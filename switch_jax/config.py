"""Configuration: frozen dataclasses, made once from a `ConfigDict` and its overrides.

`configs/*.py` start from `defaults()`, a `ConfigDict` with every key there is, and change
what they need. `load()` runs such a file, applies the command line's overrides and
converts the result, strictly, to a frozen `Config`. Nothing behind it sees a `ConfigDict`.
"""

import ast
import dataclasses
import difflib
import math
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from switch_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The T5 encoder-decoder backbone; the defaults are T5-Base as the paper counts it."""

    vocab_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    head_dim: int = 64
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    activation: Literal["relu", "geglu"] = "relu"
    tied_embeddings: bool = True
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; parameters are float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    relative_buckets: int = 32
    relative_max_distance: int = 128
    init_scale: float = 0.1  # s of the paper's §2.4; 1.0 is the usual Transformer


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The expert layers: how many experts, where, and how tokens find them."""

    num_experts: int = 0  # 0: a dense T5
    every: int = 2  # the last of every so many layers is sparse
    router: Literal["switch", "top_k", "ntlb"] = "switch"
    top_k: int = 1  # experts a token goes to; for ntlb, how many it may try
    renormalize: bool = False  # top_k only: divide the gates by their sum (Mesh TensorFlow)
    capacity_factor: float | None = 1.25  # None: dropless, with slots for every token everywhere
    eval_capacity_factor: float | None = 2.0
    capacity_rounding: Literal["ceil", "floor"] = "ceil"  # floor: Mesh TensorFlow
    min_capacity: int = 4
    group_size: int = 8192  # tokens that compete for the same slots, at the most
    aux_loss_weight: float = 0.01
    aux_loss_reduction: Literal["sum", "mean"] = "sum"  # over layers; mean: T5X
    z_loss_weight: float = 0.0  # of the router's logits
    jitter: float = 0.0  # the router's input is multiplied by uniform(1 - jitter, 1 + jitter)
    expert_dropout_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    mixture: str = "python_docs"
    reader: Literal["store", "seqio", "synthetic"] = "store"
    data_dir: str | None = None
    vocabulary: str | None = None  # a SentencePiece model; None: the mixture's own
    inputs_length: int = 512
    targets_length: int = 114
    batch_size: int = 2048  # sequences, over all devices
    pack: bool = False  # keep documents apart, as segments of one row
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule."""

    name: Literal["adafactor", "adamw", "lion", "sgd"] = "adafactor"
    learning_rate: float = 1.0
    schedule: Literal["rsqrt", "constant", "linear", "cosine"] = "rsqrt"
    warmup_steps: int = 10_000
    cooldown_steps: int = 0  # linear descent to zero at the end of training
    weight_decay: float = 0.0  # not of norms and relative biases
    max_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, and what happens how often (in steps)."""

    steps: int = 550_000
    seed: int = 0
    accumulate: int = 1  # microbatches a step
    z_loss_weight: float = 1e-4  # of the output logits
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 20
    checkpoint_every: int = 5000
    keep_checkpoints: int = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh: sizes of its axes; -1 stands for whatever devices are left."""

    slice: int = 1
    data: int = -1
    expert: int = 1
    model: int = 1
    fsdp: bool = False  # parameters and optimizer state are split over `data` too


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str | None = None  # checkpoint whose parameters training starts from

    @property
    def sparse(self) -> bool:
        """Whether the model has expert layers at all."""
        return self.moe.num_experts > 0


def defaults() -> ConfigDict:
    """A `ConfigDict` that holds every key with its default; what `configs/*.py` start from."""
    # Neither locked nor type-safe: `from_dict` checks keys and types, and says it better.
    return ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def parse_arg(arg: str, **known: Any) -> types.SimpleNamespace:
    """Reads `name=value,…`, the part of `--config file.py:…` behind the colon.

    `known` gives the names that exist with their defaults, whose type a value must have.
    Raises `UserError` for any other name or type.
    """
    values = dict(known)
    for item in filter(None, arg.split(",")):
        name, equals, text = item.partition("=")
        if name not in known or not equals:
            names = ", ".join(f"{k}=…" for k in known) or "none"
            raise UserError(f"The config has no argument {item!r}; there is {names}.")
        values[name] = _check(name, _literal(text), type(known[name]))
    return types.SimpleNamespace(**values)


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs a config file and applies overrides.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:name=value,…`.
      overrides: dotted key → text of its value, as on the command line.

    Raises `UserError` for a missing file, an unknown key, or a value that cannot be.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"Config file {path!r} does not exist; name one such as configs/switch_mini.py."
        )
    module = runpy.run_path(path)
    if "get_config" not in module:
        raise UserError(f"Config file {path!r} must define get_config(arg='').")
    config = module["get_config"](arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config in {path!r} must return what it made of defaults().")
    return from_dict(_overridden(config.to_dict(), overrides or {}))


def override(config: Config, overrides: Mapping[str, str]) -> Config:
    """`config` with dotted keys changed to the values of their texts; raises `UserError`."""
    return from_dict(_overridden(to_dict(config), overrides))


def from_dict(raw: dict[str, Any]) -> Config:
    """Converts nested plain values to a validated `Config`; raises `UserError`."""
    config = _convert(Config, raw, "")
    _validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _overridden(raw: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    for key, text in overrides.items():
        *parents, last = key.split(".")
        node: Any = raw
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise _unknown(key, _dotted(raw))
        node[last] = _literal(text)
    return raw


def _dotted(raw: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in raw.items():
        keys += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def _unknown(key: str, known: list[str]) -> UserError:
    by_last_part = {k.split(".")[-1]: k for k in known}
    close = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[k] for k in difflib.get_close_matches(key.split(".")[-1], by_last_part, n=1)
    ]
    hint = f"did you mean {close[0]!r}?" if close else f"keys are {', '.join(sorted(known))}."
    return UserError(f"Config has no key {key!r}; {hint}")


def _convert(cls: type, raw: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            raise _unknown(prefix + name, [prefix + k for k in hints])
    values = {}
    for name, value in raw.items():
        key, kind = prefix + name, hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{key} is a group of keys and cannot be {value!r}.")
            values[name] = _convert(typing.cast(type, kind), value, key + ".")
        else:
            values[name] = _check(key, value, kind)
    return cls(**values)


def _check(key: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind` (a plain type, a `Literal`, or either `| None`)."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key} must be {_NAMES[kind]}, not {value!r}.")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _validate(config: Config) -> None:
    model, moe, data, train = config.model, config.moe, config.data, config.train

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    def at_least(minimum: int, group: str, *names: str) -> None:
        for name in names:
            value = getattr(getattr(config, group), name)
            require(
                value is None or value >= minimum,
                f"{group}.{name} must be at least {minimum}, not {value}.",
            )

    at_least(1, "model", "vocab_size", "d_model", "d_ff", "num_heads", "head_dim")
    at_least(1, "model", "num_encoder_layers", "num_decoder_layers", "relative_max_distance")
    at_least(0, "moe", "num_experts", "aux_loss_weight", "z_loss_weight")
    at_least(1, "moe", "every", "top_k", "min_capacity", "group_size")
    at_least(1, "data", "inputs_length", "targets_length", "batch_size")
    at_least(0, "optimizer", "warmup_steps", "cooldown_steps", "learning_rate", "weight_decay")
    at_least(0, "optimizer", "max_grad_norm")
    at_least(0, "train", "z_loss_weight")
    at_least(1, "train", "steps", "accumulate", "log_every", "eval_every", "eval_batches")
    at_least(1, "train", "checkpoint_every", "keep_checkpoints")
    require(
        model.relative_buckets >= 4 and model.relative_buckets % 4 == 0,
        f"model.relative_buckets must be a multiple of 4, not {model.relative_buckets}.",
    )
    require(
        model.relative_max_distance > model.relative_buckets // 2,
        f"model.relative_max_distance must be above half of model.relative_buckets, not"
        f" {model.relative_max_distance}.",
    )
    for key, rate in (
        ("model.dropout_rate", model.dropout_rate),
        ("moe.expert_dropout_rate", moe.expert_dropout_rate),
        ("moe.jitter", moe.jitter),
    ):
        require(0 <= rate < 1, f"{key} must be at least 0 and below 1, not {rate}.")
    for key, factor in (
        ("moe.capacity_factor", moe.capacity_factor),
        ("moe.eval_capacity_factor", moe.eval_capacity_factor),
    ):
        require(factor is None or factor > 0, f"{key} must be above 0 or None, not {factor}.")
    if config.sparse:
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(model, name)
            require(
                layers % moe.every == 0,
                f"model.{name}={layers} is not a multiple of moe.every={moe.every};"
                " change one of them.",
            )
        require(
            moe.top_k <= moe.num_experts,
            f"moe.top_k={moe.top_k} is more than moe.num_experts={moe.num_experts}.",
        )
        require(
            moe.router != "switch" or moe.top_k == 1,
            f"moe.router=switch sends a token to one expert; for moe.top_k={moe.top_k}"
            " set moe.router=top_k.",
        )
    require(
        data.batch_size % train.accumulate == 0,
        f"data.batch_size={data.batch_size} is not a multiple of"
        f" train.accumulate={train.accumulate}; change one of them.",
    )
    sizes = [
        getattr(config.mesh, f.name) for f in dataclasses.fields(config.mesh) if f.name != "fsdp"
    ]
    require(
        sizes.count(-1) <= 1 and all(s >= 1 or s == -1 for s in sizes),
        "mesh.slice, mesh.data, mesh.expert and mesh.model must be at least 1,"
        " and only one of them may be -1 (whatever is left).",
    )
