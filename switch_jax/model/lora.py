"""Low-rank adaptation: frozen matrices with a trained product of two thin ones added to each.

    W' = W + alpha / rank · A B        A [.., in, rank]    B [.., rank, out], 0 at first

after Hu et al. (2021). The model knows nothing of it: a step merges the matrices, runs the model
with the sums, and the gradient of W' gives those of A and B. Stacked layers and experts have a
pair each.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from switch_jax.config import Config
from switch_jax.errors import UserError
from switch_jax.model.parameters import BATCH_DIMS, ParameterMetadata

_A, _B = ".lora_a", ".lora_b"
Metadata = Mapping[str, ParameterMetadata]


def is_adapter(name: str) -> bool:
    """Whether a parameter is an A or a B."""
    return name.endswith((_A, _B))


def add_adapters(metadata: Metadata, config: Config) -> dict[str, ParameterMetadata]:
    """Returns the metadata of a model's parameters and, with `lora.rank`, of their adapters.

    An adapter has the kind of its matrix.

    Raises `UserError` where `lora.of` cannot be read, or is found in no matrix's path.
    """
    if not config.lora.rank:
        return dict(metadata)
    try:
        pattern = re.compile(config.lora.of)
    except re.error as error:
        raise UserError(
            f"lora.of={config.lora.of!r} is no regular expression ({error}); correct it."
        ) from error
    added = {}
    for name, (axes, kind) in metadata.items():
        batch = tuple(axis for axis in axes if axis in BATCH_DIMS)
        if len(axes) == len(batch) + 2 and pattern.search(name):
            added[name + _A] = ParameterMetadata((*batch, axes[-2], "lora"), kind)
            added[name + _B] = ParameterMetadata((*batch, "lora", axes[-1]), kind)
    if not added:
        raise UserError(f"lora.of={config.lora.of!r} is found in no matrix's path; change it.")
    return {**metadata, **added}


def init_adapters(
    params: Mapping[str, jax.Array], metadata: Metadata, config: Config
) -> dict[str, jax.Array]:
    """`params` of the model with fresh adapters: A normal with deviation 1 / rank, B zero."""
    key, rank = jax.random.key(config.train.seed), config.lora.rank
    complete = dict(params)
    for number, name in enumerate(add_adapters(metadata, config)):
        if name.endswith(_A):
            shape = (*params[name.removesuffix(_A)].shape[:-1], rank)
            complete[name] = jax.random.normal(jax.random.fold_in(key, number), shape) / rank
        elif name.endswith(_B):
            *batch, _, out = params[name.removesuffix(_B)].shape
            complete[name] = jnp.zeros((*batch, rank, out))
    return complete


def merge_adapters(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Parameters of the model alone, with what their adapters add."""
    whole = {name: value for name, value in params.items() if not is_adapter(name)}
    scale = config.lora.alpha / max(config.lora.rank, 1)
    for name in whole:
        if name + _A in params:
            whole[name] = whole[name] + scale * (params[name + _A] @ params[name + _B])
    return whole
