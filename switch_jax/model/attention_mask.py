"""Attention mask of a batch of rows that hold segments: which keys a query attends to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Score of a key that a query does not attend to. Finite, so that a query without any key has a
# softmax: it attends to all keys equally.
MASKED_SCORE = -1e9


class SegmentMask(NamedTuple):
    """A query attends to the keys of its segment, and if `causal` to none behind its position.

    Attributes:
      query_segment_BxT: int32 segment of each query.
      key_segment_BxS: int32 segment of each key, 0 for padding.
      causal: whether positions ahead are masked; queries and keys have the same positions.
    """

    query_segment_BxT: jax.Array
    key_segment_BxS: jax.Array
    causal: bool

    def dense(self) -> jax.Array:
        """[B, T, S] bool, true where a query attends to a key."""
        query_BxTx1, key_Bx1xS = self.query_segment_BxT[:, :, None], self.key_segment_BxS[:, None]
        mask_BxTxS = (query_BxTx1 == key_Bx1xS) & (key_Bx1xS > 0)
        return jnp.tril(mask_BxTxS) if self.causal else mask_BxTxS
