"""Expert capacity (slots per expert and group) and group size."""

import math

from switch_jax.config.schema import MoEConfig


def expert_capacity(moe: MoEConfig, tokens: int, capacity_factor: float | None) -> int:
    """Returns the slots per expert in a group (paper, eq. 3, without a factor k).

    Args:
      moe: of the model; `expert_capacity`, where it is set, replaces the factor.
      tokens: in the group.
      capacity_factor: None is dropless, one slot per token.

    Otherwise capacity_factor · tokens / num_experts, rounded and at least `min_capacity`; never
    more than `tokens`.
    """
    if capacity_factor is None:
        return tokens
    if moe.expert_capacity is not None:
        return min(moe.expert_capacity, tokens)
    rounded = {"ceil": math.ceil, "floor": math.floor}[moe.capacity_rounding]
    # Rounded to 9 digits first: 1.1 × 320 / 32 must be 11 slots, not 12 by a rounding error.
    share = rounded(round(capacity_factor * tokens / moe.num_experts, 9))
    return min(max(share, moe.min_capacity), tokens)


def rows_per_group(moe: MoEConfig, batch_size: int, length: int) -> int:
    """Returns the rows per group: the largest divisor of the batch that fits `group_size`.

    A group is a whole number of rows with at most max(group_size, length) tokens. The number
    depends on the config alone, so that the loss is the same on every mesh.

    Args:
      batch_size: rows of the global batch.
      length: tokens per row.
    """
    most = max(moe.group_size, length) // length
    return max(r for r in range(1, min(most, batch_size) + 1) if batch_size % r == 0)
