"""Differences between a model and the checkpoint that it starts from, besides shapes.

Shapes are compared in `transfer.py`. Keys such as `model.relative_max_distance` or `moe.router`
change what the same parameters compute, so a difference is told before training, or refused.
"""

from collections.abc import Iterator

from switch_jax.config import Config, config_differences, key_roles
from switch_jax.errors import UserError

_IDS = ("model.pad_id", "model.eos_id", "model.start_id")


def check_special_ids(source: Config, config: Config) -> None:
    """Raises `UserError` where a model has other special tokens than its checkpoint.

    Args:
      source: config of the checkpoint.
      config: config of the model, whose embedding is loaded.
    """
    differences = config_differences(source, config)
    for key in _IDS:
        if key in differences:
            raise UserError(
                f"{differences[key]}, and the embeddings of init_from were trained for the one"
                f" there; set {key}={getattr(source.model, key.removeprefix('model.'))}."
            )


def model_differences(source: Config, config: Config) -> Iterator[str]:
    """Yields sentences on the keys that change what the parameters of a checkpoint compute.

    Args:
      source: config of the checkpoint.
      config: config of the model that loads them.
    """
    differences = config_differences(source, config)
    roles = {f"model.{name}": role for name, role in key_roles("model").items()}
    if source.sparse and config.sparse:
        roles |= {f"moe.{name}": role for name, role in key_roles("moe").items()}
    elif source.sparse or config.sparse:
        roles["moe.num_experts"] = "function"
    if source.lora.rank and config.lora.rank:
        roles |= {"lora.alpha": "function", "lora.of": "function"}
    for wanted, text in (
        ("function", "The model differs from that of init_from"),
        ("evaluation", "The model routes otherwise than that of init_from"),
    ):
        found = [
            differences[key] for key, role in roles.items() if role == wanted and key in differences
        ]
        if found:
            yield f"{text}: {'; '.join(found)}."
