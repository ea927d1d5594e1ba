"""Token ids: refuses arrays of ids that a model does not have."""

from typing import Any

import jax
import numpy as np

from switch_jax.errors import UserError


def check_token_ids(name: str, tokens: Any, vocab_size: int) -> None:
    """Raises `UserError` if `tokens`, an array called `name`, has an id outside the vocabulary.

    Arrays whose values are not known are not checked: those of a traced function (`jax.jit`), and
    those that other processes hold a part of. JAX reads the nearest id of the vocabulary instead.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    if not ids.size:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} has the type {ids.dtype}; token ids are integers.")
    wrong = [int(number) for number in (ids.min(), ids.max()) if not 0 <= number < vocab_size]
    if wrong:
        raise UserError(
            f"{name} has the id {wrong[0]}, and the model's ids are 0 to {vocab_size - 1}; encode"
            " the text with the model's own vocabulary."
        )
