"""Keys of Hugging Face's config.json: every key is read, must have one value, or has no effect.

`HuggingFaceConfig` has the keys that are read, and `REQUIRED_VALUES` the keys of which models here
have one value. `DECODING` are defaults of transformers' `generate`, and `WITHOUT_EFFECT` the keys
that change no number. A key of none of these is reported to the user.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from switch_jax.config import build_dataclass
from switch_jax.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_MAX_SHOWN = 60  # characters of a value in a note


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, in config.json and in generation_config.json."""

    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class HuggingFaceConfig(SpecialIds):
    """Keys of config.json that are read, with the defaults of Hugging Face's classes.

    None stands for the default of a class, or for a key that the class does not have. Sizes without
    a default must be there.
    """

    _: dataclasses.KW_ONLY
    model_type: str
    vocab_size: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int | None = None
    dropout_rate: float = 0.1
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str | None = None
    dense_act_fn: str | None = None
    tie_word_embeddings: bool | None = None
    scale_decoder_outputs: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    # Switch Transformers only
    num_experts: int | None = None
    expert_capacity: int = 64
    encoder_sparse_step: int | None = None
    decoder_sparse_step: int | None = None
    router_jitter_noise: float = 0.01
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.001
    router_dtype: str = "float32"


# Other names of keys, as transformers accepts them.
ALIASES = {
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}

# Values that models here have, and None, which stands for the default.
REQUIRED_VALUES: Mapping[str, Any] = {
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "quantization_config": {},
    "router_bias": False,
    "router_type": "tokens_masked",
    "num_selected_experts": 1,
    "batch_prioritized_routing": False,
}

# Keys that change what transformers' `generate` returns, in both files, and the values that do not.
DECODING: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}

WITHOUT_EFFECT = frozenset({
    # Description of the model; the names of its tensors say what it is.
    *("_commit_hash", "_name_or_path", "name_or_path", "architectures", "auto_map"),
    *("transformers_version", "adapters", "finetuning_task", "task_specific_params", "prefix"),
    *("tokenizer_class", "transformers.js_config", "n_positions", "is_gated_act"),
    *("num_sparse_encoder_layers", "num_sparse_decoder_layers", "cross_attention_hidden_size"),
    # Initial values, and heads of classifiers.
    *("initializer_factor", "initializer_range", "classifier_dropout", "problem_type"),
    *("id2label", "label2id", "num_labels"),
    # Form of what a call of transformers' model or `generate` returns.
    *("add_router_probs", "output_attentions", "output_hidden_states", "output_past"),
    *("output_router_logits", "output_scores", "return_dict", "return_dict_in_generate"),
    *("num_return_sequences", "remove_invalid_values", "tie_last_hidden_states", "use_cache"),
    *("max_length", "max_new_tokens"),
    # The way transformers computes.
    *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("_experts_implementation_internal", "attn_implementation", "experts_implementation"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "tf_legacy_loss", "torchscript"),
    "use_bfloat16",
    # Tokens that the models do not use, and a flag of the router that transformers does not read.
    *("bos_token_id", "sep_token_id", "router_ignore_padding_tokens"),
})  # fmt: skip


def known_keys() -> frozenset[str]:
    """Returns the keys of config.json whose meaning is known."""
    read = {field.name for field in dataclasses.fields(HuggingFaceConfig)}
    return frozenset(read | ALIASES.keys() | REQUIRED_VALUES.keys() | DECODING.keys()) | (
        WITHOUT_EFFECT
    )


def parse_config(raw: Mapping[str, Any]) -> HuggingFaceConfig:
    """Returns the keys of a config.json that are read.

    Raises `UserError` for a missing key, for a value of another type, and for a model that is none
    here.
    """
    for alias, key in ALIASES.items():
        if alias in raw and raw[alias] != raw.get(key):
            raise UserError(
                f"{CONFIG} has {alias}={_shown(raw[alias])} and {key}={_shown(raw.get(key))}, two"
                " names of one number; correct the wrong one."
            )
    for key, required in REQUIRED_VALUES.items():
        value = raw.get(key)
        if value is not None and (value, type(value) is bool) != (required, type(required) is bool):
            raise UserError(
                f"{CONFIG} has {key}={_shown(value)}, and models here have {required}; this one"
                " cannot be converted."
            )
    # A key that is null has its default.
    given = {key: value for key, value in raw.items() if value is not None}
    return build_dataclass(HuggingFaceConfig, given, CONFIG, ignore_unknown=True)


def special_ids(config: SpecialIds, generation: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids of `model` that a Hugging Face folder has.

    Args:
      config: its config.json.
      generation: content of its generation_config.json; {} without one.

    Raises `UserError` where the files differ, or a model has several ends of a text.
    """
    there = build_dataclass(SpecialIds, generation, GENERATION_CONFIG, ignore_unknown=True)

    def find(key: str, default: int) -> int:
        values = [_single_id(key, getattr(ids, key), file) for ids, file in (
            (config, CONFIG), (there, GENERATION_CONFIG),
        )]  # fmt: skip
        found = set(values) - {None}
        if len(found) > 1:
            raise UserError(
                f"{CONFIG} has {key}={values[0]}, and {GENERATION_CONFIG} has {key}={values[1]};"
                " correct the wrong one."
            )
        return next(iter(found), default) or 0

    pad = find("pad_token_id", 0)
    return {
        "pad_id": pad,
        "eos_id": find("eos_token_id", 1),
        "start_id": find("decoder_start_token_id", pad),
    }


def _single_id(key: str, value: int | list[int] | None, file: str) -> int | None:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise UserError(
            f"{file} has {key}={_shown(value)}, and models here have one; leave the one there that"
            " ends a text."
        )
    return value[0]


def key_notes(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for the user about each group of keys that is not obeyed.

    Args:
      raw: content of config.json.
      generation: content of generation_config.json; {} without one.
    """
    unknown = sorted(raw.keys() - known_keys())
    if unknown:
        yield (
            f"{CONFIG} has keys that are unknown here and were left out:"
            f" {', '.join(f'{key}={_shown(raw[key])}' for key in unknown)}."
        )
    decoding = {
        key: content[key]
        for content in (raw, generation)
        for key, neutral in DECODING.items()
        if content.get(key) not in (None, neutral)
    }
    if decoding:
        yield (
            "`generate` decodes by its own arguments, and not by the folder's"
            f" {', '.join(f'{key}={_shown(value)}' for key, value in decoding.items())}."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
