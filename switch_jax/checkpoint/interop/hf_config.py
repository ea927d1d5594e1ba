"""Conversion of Hugging Face's config.json to a config, and back.

Models are T5 and mT5 of any version, and Switch Transformers. Published config.json files of Switch
Transformers contradict the weights in places; the weights are then used, with a note for the user.
"""

from collections.abc import Mapping
from typing import Any

from switch_jax.checkpoint.interop.expert_placement import infer_placement
from switch_jax.checkpoint.interop.hf_config_keys import (
    CONFIG,
    HuggingFaceConfig,
    key_notes,
    parse_config,
    special_ids,
)
from switch_jax.checkpoint.interop.hf_names import Structure
from switch_jax.config import STACKS, Config, config_from_dict
from switch_jax.errors import UserError

SWITCH = "switch_transformers"
MODEL_TYPES = ("t5", "mt5", SWITCH)

# Hugging Face's key → key of `model` or of `moe`.
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

# Hugging Face's name → `model.activation`; of equal values, the first name is written. All their
# GELUs have the tanh form, as here.
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-gelu_new": "geglu"}
_BATCH_SIZE = 8  # sequences; not in a checkpoint, and small enough to evaluate on any machine


def config_from_hugging_face(
    raw: Mapping[str, Any], structure: Structure, generation: Mapping[str, Any] | None = None
) -> tuple[Config, tuple[str, ...]]:
    """Returns the config of a Hugging Face model, and a note for each repair and unused key.

    Args:
      raw: content of its config.json, of one of `MODEL_TYPES`.
      structure: the structure that the names of its tensors have.
      generation: content of its generation_config.json; None without one.

    Raises `UserError` for a model that this program does not have.
    """
    read = parse_config(raw)
    notes: list[str] = []
    layers = {stack: _num_layers(stack, read, structure, notes) for stack in STACKS}
    model = {key: getattr(read, hf_key) for hf_key, key in _MODEL.items()} | {
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "activation": _activation(read, structure),
        "tied_embeddings": _tied(read, structure, notes),
        "dtype": "bfloat16" if (read.dtype or read.torch_dtype) == "bfloat16" else "float32",
        **special_ids(read, generation or {}),
    }
    moe = {}
    if read.model_type == SWITCH:
        if read.num_experts is None:
            raise UserError(f"{CONFIG} lacks the key 'num_experts'; add it.")
        moe = {key: getattr(read, hf_key) for hf_key, key in _MOE.items()}
        # There, each sequence is a routing group, and padding is routed as other tokens are.
        moe |= {"group_size": 1, "padding": "routed"}
        moe |= _placement(read, structure, notes)
    try:
        config = config_from_dict({"model": model, "moe": moe, "data": {"batch_size": _BATCH_SIZE}})
    except UserError as error:
        raise UserError(f"{CONFIG} describes a model that is none here: {error}") from None
    return config, (*notes, *key_notes(raw, generation or {}))


def config_to_hugging_face(config: Config, source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json for a model.

    Args:
      config: the model's config.
      source: the config.json that the model was imported with, whose other keys are kept; {} for
        none.

    Raises `UserError` for a model that Hugging Face's classes do not have.
    """
    check_expressible(config)
    model, moe = config.model, config.moe
    ff_key = "dense_act_fn" if config.sparse else "feed_forward_proj"
    family = "SwitchTransformers" if config.sparse else "T5"
    defaults = {
        "model_type": SWITCH if config.sparse else "t5",
        "architectures": [f"{family}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        ff_key: next(n for n, activation in _ACTIVATIONS.items() if activation == model.activation),
    }
    raw: dict[str, Any] = {hf_key: getattr(model, key) for hf_key, key in _MODEL.items()}
    raw |= {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "tie_word_embeddings": model.tied_embeddings,
        **special_ids_to_hugging_face(config),
    }
    if config.sparse:
        raw |= {hf_key: getattr(moe, key) for hf_key, key in _MOE.items()}
        if moe.expert_capacity is None:
            raw["expert_capacity"] = dropless_capacity(config)
        for stack in STACKS:
            raw[f"num_sparse_{stack}_layers"] = len(config.sparse_layers(stack))
            raw[f"{stack}_sparse_step"] = moe.every
    return defaults | dict(source) | raw


def special_ids_to_hugging_face(config: Config) -> dict[str, int]:
    """Returns the ids of a model by their keys in config.json and generation_config.json."""
    model = config.model
    return {
        "pad_token_id": model.pad_id,
        "eos_token_id": model.eos_id,
        "decoder_start_token_id": model.start_id,
    }


def dropless_capacity(config: Config) -> int:
    """Returns an expert capacity with which no token of a sequence is dropped: its length."""
    return max(config.length(stack) for stack in STACKS)


def check_expressible(config: Config) -> None:
    """Raises `UserError` for a model that Hugging Face's classes do not have."""
    moe = config.moe
    if not config.sparse:
        return
    for key, value, supported in (
        ("moe.router", moe.router, ("switch",)),
        ("moe.every", moe.every, (1, 2)),
        ("moe.first", moe.first, (None,)),
        ("moe.last", moe.last, (None,)),
        ("moe.stacks", moe.stacks, ("both",)),
        ("moe.sublayer", moe.sublayer, ("ff",)),
        ("moe.shared_d_ff", moe.shared_d_ff, (0,)),
        ("moe.balance_bias_rate", moe.balance_bias_rate, (0.0,)),
    ):
        if value not in supported:
            raise UserError(
                f"Hugging Face's Switch Transformers have {key}={' or '.join(map(str, supported))},"
                f" and this model has {value}; it cannot be written as one."
            )


def _num_layers(stack: str, read: HuggingFaceConfig, structure: Structure, notes: list[str]) -> int:
    configured = read.num_layers
    if stack == "decoder" and read.num_decoder_layers is not None:
        configured = read.num_decoder_layers
    if structure.layers[stack] > configured:
        notes.append(
            f"{CONFIG} has {configured} layers for the {stack}, and the weights have"
            f" {structure.layers[stack]} layers: the number in the weights is used."
        )
        return structure.layers[stack]
    return configured


def _activation(read: HuggingFaceConfig, structure: Structure) -> str:
    """Returns `model.activation`; T5's classes have its name in two keys, Switch's in one."""
    default = "gated-gelu" if read.model_type == "mt5" else "relu"
    name = read.dense_act_fn or "relu"
    if read.model_type != SWITCH:
        name = read.feed_forward_proj or default
        own = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
        if read.dense_act_fn not in (None, own):
            raise UserError(
                f"{CONFIG} has feed_forward_proj={name!r}, and dense_act_fn={read.dense_act_fn!r}"
                f" and not {own!r}; correct the wrong one."
            )
    if structure.gated and not name.startswith("gated-"):
        name = f"gated-{name}"
    if name not in _ACTIVATIONS:
        raise UserError(
            f"{CONFIG} has the activation {name!r}; activations that can be converted are"
            f" {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _tied(read: HuggingFaceConfig, structure: Structure, notes: list[str]) -> bool:
    """Whether the head is the embedding, applied to scaled decoder states."""
    if read.model_type == "mt5":
        scaled = False  # also where newer files have tie_word_embeddings=true
    elif read.scale_decoder_outputs is not None:  # two keys of T5 have it; the newer one is right
        scaled = read.scale_decoder_outputs
    else:
        scaled = read.tie_word_embeddings is not False
    if scaled and structure.own_head:
        notes.append(
            f"{CONFIG} ties the head to the embedding, and the weights have another one: the"
            " head in the weights is used."
        )
        return False
    if not scaled and not structure.own_head:
        notes.append(
            "The head is the embedding, without scaling; it becomes a parameter of its own."
        )
    return scaled


def _placement(read: HuggingFaceConfig, structure: Structure, notes: list[str]) -> dict[str, Any]:
    """Returns the keys of `moe` that place the experts in the layers with a router."""
    keys = infer_placement(structure.layers, structure.sparse)
    every = keys["every"]
    for stack in filter(structure.sparse.get, STACKS):
        step = getattr(read, f"{stack}_sparse_step")
        if step not in (None, every):
            notes.append(
                f"{CONFIG} has {stack}_sparse_step={step}, and the weights have experts in"
                f" {'every layer' if every == 1 else f'one of {every} layers'}: the placement in"
                " the weights is used."
            )
    return keys
