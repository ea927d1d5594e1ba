"""Hugging Face's config.json and our configuration, both ways.

T5 and mT5 of any version, and Switch Transformers, whose published configurations contradict the
weights in places: there the weights are believed, and a note says so.
"""

from collections.abc import Mapping
from typing import Any

from switch_jax.checkpoint.interop.expert_placement import infer_placement
from switch_jax.checkpoint.interop.hf_names import Structure
from switch_jax.config import STACKS, Config, config_from_dict
from switch_jax.errors import UserError

SWITCH = "switch_transformers"
MODEL_TYPES = ("t5", "mt5", SWITCH)

# Theirs → ours, in `model` and in `moe`.
_MODEL = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "dropout_rate": "dropout_rate",
    "relative_attention_num_buckets": "relative_buckets",
    "relative_attention_max_distance": "relative_max_distance",
}
_MOE = {
    "num_experts": "num_experts",
    "expert_capacity": "expert_capacity",
    "router_jitter_noise": "jitter",
    "router_aux_loss_coef": "aux_loss_weight",
    "router_z_loss_coef": "z_loss_weight",
    "router_dtype": "router_dtype",
}

# What their classes take where a file is silent, as older ones are.
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "expert_capacity": 64,
    "router_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
    "router_dtype": "float32",
    "router_bias": False,
}

# The first of equals is what is written; all GELUs there are the tanh form, as ours.
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-gelu_new": "geglu"}
_BATCH = 8  # sequences: a checkpoint does not tell, and this one evaluates anywhere


def from_hugging_face(raw: Mapping[str, Any], found: Structure) -> tuple[Config, tuple[str, ...]]:
    """Our configuration of a model, and what was repaired.

    Args:
      raw: content of its config.json, of one of `MODEL_TYPES`.
      found: what its tensors tell.

    Raises `UserError` for a model that we do not have.
    """
    known = {**_DEFAULTS, **raw}
    for key, only in (("layer_norm_epsilon", 1e-6), ("router_bias", False)):
        if known[key] != only:
            raise UserError(
                f"config.json has {key}={known[key]}, and models here have {only}; this one cannot"
                " be converted."
            )
    notes: list[str] = []
    layers = {stack: _num_layers(stack, known, found, notes) for stack in STACKS}
    model = {ours: _given(known, theirs) for theirs, ours in _MODEL.items()} | {
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "activation": _activation(known, found),
        "tied_embeddings": _tied(known, found, notes),
        "dtype": "bfloat16"
        if raw.get("dtype", raw.get("torch_dtype")) == "bfloat16"
        else "float32",
    }
    moe = {}
    if raw["model_type"] == SWITCH:
        moe = {ours: _given(known, theirs) for theirs, ours in _MOE.items()}
        # Each sequence is a group of its own, and padding a token as any other.
        moe |= {"group_size": 1, "padding": "routed"}
        moe |= _placement(known, found, notes)
    try:
        config = config_from_dict({"model": model, "moe": moe, "data": {"batch_size": _BATCH}})
    except UserError as error:
        raise UserError(f"config.json describes a model that is none here: {error}") from None
    return config, tuple(notes)


def to_hugging_face(config: Config, source: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of our model.

    Args:
      config: ours.
      source: the config.json that it came with, whose other keys are kept; {} for none.

    Raises `UserError` where theirs have no such model.
    """
    check_expressible(config)
    model, moe = config.model, config.moe
    ff_key = "dense_act_fn" if config.sparse else "feed_forward_proj"
    kind = "switch_transformers" if config.sparse else "t5"
    family = "SwitchTransformers" if config.sparse else "T5"
    assumed = {
        "model_type": kind,
        "architectures": [f"{family}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        ff_key: next(a for a, ours in _ACTIVATIONS.items() if ours == model.activation),
    }
    raw: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in _MODEL.items()}
    raw |= {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "tie_word_embeddings": model.tied_embeddings,
    }
    if config.sparse:
        raw |= {theirs: getattr(moe, ours) for theirs, ours in _MOE.items()}
        if moe.expert_capacity is None:
            raw["expert_capacity"] = widest(config)
        for stack in STACKS:
            raw[f"num_sparse_{stack}_layers"] = len(config.sparse_layers(stack))
            raw[f"{stack}_sparse_step"] = moe.every
    return assumed | dict(source) | raw


def widest(config: Config) -> int:
    """A capacity at which no token of a sequence of our lengths is dropped."""
    return max(config.length(stack) for stack in STACKS)


def check_expressible(config: Config) -> None:
    """Raises `UserError` for a model that Hugging Face's classes cannot be."""
    moe = config.moe
    if not config.sparse:
        return
    for key, value, only in (
        ("moe.router", moe.router, ("switch",)),
        ("moe.every", moe.every, (1, 2)),
        ("moe.first", moe.first, (None,)),
        ("moe.last", moe.last, (None,)),
        ("moe.stacks", moe.stacks, ("both",)),
        ("moe.sublayer", moe.sublayer, ("ff",)),
        ("moe.shared_d_ff", moe.shared_d_ff, (0,)),
        ("moe.balance_bias_rate", moe.balance_bias_rate, (0.0,)),
    ):
        if value not in only:
            raise UserError(
                f"Hugging Face's Switch Transformers have {key}={' or '.join(map(str, only))}, and"
                f" this model has {value}; it cannot be written as one."
            )


def _given(known: Mapping[str, Any], key: str) -> Any:
    if key not in known:
        raise UserError(f"config.json does not say what {key} is; take the one of the model.")
    return known[key]


def _num_layers(
    stack: str, known: Mapping[str, Any], found: Structure, notes: list[str]
) -> int | Any:
    said = known.get("num_decoder_layers") if stack == "decoder" else None
    said = _given(known, "num_layers") if said is None else said
    if isinstance(said, int) and found.layers[stack] > said:
        notes.append(
            f"config.json says that the {stack} has {said} layers, and the weights are of"
            f" {found.layers[stack]}: these are taken."
        )
        return found.layers[stack]
    return said


def _activation(known: Mapping[str, Any], found: Structure) -> str:
    given = known.get("feed_forward_proj") or known.get("dense_act_fn", "relu")
    name = f"gated-{given}" if found.gated and not str(given).startswith("gated-") else given
    if name not in _ACTIVATIONS:
        raise UserError(
            f"config.json has the activation {name!r}; what can be converted is"
            f" {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _tied(known: Mapping[str, Any], found: Structure, notes: list[str]) -> bool:
    """Whether the head is the embedding, and decoder states are scaled for it."""
    if known["model_type"] == "mt5":
        scaled = False  # whatever newer files say
    else:  # T5 says it in two ways, the newer of which is the true one
        scaled = known.get("scale_decoder_outputs", known.get("tie_word_embeddings") is not False)
    if scaled and found.own_head:
        notes.append(
            "config.json says that the head is the embedding, and the weights have another one:"
            " that is taken."
        )
        return False
    if not scaled and not found.own_head:
        notes.append("The head is the embedding, without scaling; here it becomes its own.")
    return bool(scaled)


def _placement(known: Mapping[str, Any], found: Structure, notes: list[str]) -> dict[str, Any]:
    """Where `moe` has its experts, from which layers have a router."""
    keys = infer_placement(found.layers, found.sparse)
    every = keys["every"]
    for stack in filter(found.sparse.get, STACKS):
        said = known.get(f"{stack}_sparse_step", every)
        if said != every:
            notes.append(
                f"config.json has {stack}_sparse_step={said}, and the weights have experts in"
                f" {'every layer' if every == 1 else f'one of {every} layers'}: that is taken."
            )
    return keys
