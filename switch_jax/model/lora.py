"""LoRA: trained low-rank adapters of frozen matrices (Hu et al. 2021).

    W' = W + alpha / rank · A B        A [.., in, rank]    B [.., rank, out], 0 at first

The modules of the model have no adapters. A train step merges them into the matrices and runs the
model with W'; the gradients of A and B follow from the gradient of W'. Every stacked layer and
every expert has its own A and B. Their paths are `<path of W>.lora_a` and `<path of W>.lora_b`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from switch_jax.config import Config
from switch_jax.errors import UserError
from switch_jax.model.parameters import ParameterMetadata

_A, _B = ".lora_a", ".lora_b"
Metadata = Mapping[str, ParameterMetadata]


def is_adapter(name: str) -> bool:
    """Whether the parameter of this path is an adapter (A or B)."""
    return name.endswith((_A, _B))


def add_adapters(metadata: Metadata, config: Config) -> dict[str, ParameterMetadata]:
    """Returns the metadata of a model's parameters and, with `lora.rank`, of their adapters.

    An adapter has the kind and the batch dimensions of its matrix.

    Raises `UserError` where `lora.of` matches no matrix's path.
    """
    if not config.lora.rank:
        return dict(metadata)
    pattern = re.compile(config.lora.of)
    added = {}
    for name, matrix in metadata.items():
        if len(matrix.axes) == matrix.num_batch_dims + 2 and pattern.search(name):
            *batch, rows, columns = matrix.axes
            added[name + _A] = ParameterMetadata((*batch, rows, "lora"), matrix.kind)
            added[name + _B] = ParameterMetadata((*batch, "lora", columns), matrix.kind)
    if not added:
        raise UserError(f"lora.of={config.lora.of!r} is found in no matrix's path; change it.")
    return {**metadata, **added}


def init_adapters(
    params: Mapping[str, jax.Array], metadata: Metadata, config: Config
) -> dict[str, jax.Array]:
    """Returns `params` with new adapters: A normal with standard deviation 1 / rank, B zero."""
    key, rank = jax.random.key(config.train.seed), config.lora.rank
    with_adapters = dict(params)
    for number, name in enumerate(add_adapters(metadata, config)):
        if name.endswith(_A):
            shape = (*params[name.removesuffix(_A)].shape[:-1], rank)
            with_adapters[name] = jax.random.normal(jax.random.fold_in(key, number), shape) / rank
        elif name.endswith(_B):
            *batch, _, out = params[name.removesuffix(_B)].shape
            with_adapters[name] = jnp.zeros((*batch, rank, out))
    return with_adapters


def merge_adapters(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns the parameters of the model, W + alpha / rank · A B where W has adapters."""
    merged = {name: value for name, value in params.items() if not is_adapter(name)}
    scale = config.lora.alpha / max(config.lora.rank, 1)
    for name in merged:
        if name + _A in params:
            merged[name] = merged[name] + scale * (params[name + _A] @ params[name + _B])
    return merged
