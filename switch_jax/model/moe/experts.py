"""Expert networks: parameters of all experts of a layer, stacked along axis E.

An expert module computes with the matmul and dropout that a dispatcher passes, so that the same
module works on slots and on blocks of rows. Axis letters: see `expert_selection.py`.
"""

from collections.abc import Callable

import jax
from flax import nnx

from switch_jax.config import Config
from switch_jax.model.feed_forward import activate
from switch_jax.model.layers import init_kernel, param

# (x [.., X], weight [E, X, Y], logical name of axis Y) → [.., Y], each row times the weight of its
# expert.
MatMul = Callable[[jax.Array, nnx.Param, str], jax.Array]

# Dropout of hidden activations [.., F].
Dropout = Callable[[jax.Array], jax.Array]


def init_stacked_kernel(
    key: jax.Array, num_experts: int, shape: tuple[int, int], scale: float
) -> jax.Array:
    """[E, *shape] float32: one draw per expert, so that fan-in is that of one expert."""
    return jax.vmap(lambda k: init_kernel(k, shape, scale))(jax.random.split(key, num_experts))


class FeedForwardExperts(nnx.Module):
    """E feed-forward networks, each as `feed_forward.Mlp`."""

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model, E = config.model, config.moe.num_experts
        D, F, scale = model.d_model, model.d_ff, model.init_scale
        wi_key, gate_key, wo_key = jax.random.split(key, 3)
        self.wi = param(
            init_stacked_kernel(wi_key, E, (D, F), scale), "expert", "embed", "mlp", kind="expert"
        )
        self.gate = (
            param(
                init_stacked_kernel(gate_key, E, (D, F), scale),
                "expert",
                "embed",
                "mlp",
                kind="expert",
            )
            if model.activation == "geglu"
            else None
        )
        self.wo = param(
            init_stacked_kernel(wo_key, E, (F, D), scale), "expert", "mlp", "embed", kind="expert"
        )

    def __call__(self, x: jax.Array, matmul: MatMul, dropout: Dropout) -> tuple[jax.Array, ...]:
        """[.., D] → ([.., D],); dropout of the hidden activations (paper §2.4)."""
        gate = None if self.gate is None else matmul(x, self.gate, "mlp")
        h = dropout(activate(self.config.model.activation, matmul(x, self.wi, "mlp"), gate))
        return (matmul(h, self.wo, "activation_split"),)


class ProjectionExperts(nnx.Module):
    """E linear maps to queries, and to keys equal to values (paper, Appendix A, Fig 10)."""

    def __init__(self, config: Config, key: jax.Array):
        model, E, scale = config.model, config.moe.num_experts, config.model.init_scale
        shape = model.d_model, model.num_heads * model.head_dim
        query_key, key_value_key = jax.random.split(key)
        query = init_stacked_kernel(query_key, E, shape, scale) / model.head_dim**0.5
        self.query = param(query, "expert", "embed", "heads", kind="expert")
        key_value = init_stacked_kernel(key_value_key, E, shape, scale)
        self.key_value = param(key_value, "expert", "embed", "heads", kind="expert")

    def __call__(self, x: jax.Array, matmul: MatMul, dropout: Dropout) -> tuple[jax.Array, ...]:
        """[.., D] → (queries [.., H·K], keys = values [.., H·K]), K: size of a head; no dropout."""
        del dropout
        return matmul(x, self.query, "heads"), matmul(x, self.key_value, "heads")


Experts = FeedForwardExperts | ProjectionExperts
