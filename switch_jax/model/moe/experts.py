"""experts: to be written."""

from collections.abc import Callable

import jax
from flax import nnx

from switch_jax.config import Config
from switch_jax.model.feed_forward import activate
from switch_jax.model.layers import init_kernel, param

# x @ an expert's own weights, [.., X] → [.., Y], and the logical name of Y.
MatMul = Callable[[jax.Array, nnx.Param, str], jax.Array]

# Dropout of hidden activations.
Dropout = Callable[[jax.Array], jax.Array]


def init_stacked_kernel(
    key: jax.Array, num_experts: int, shape: tuple[int, int], scale: float
) -> jax.Array:
    """[E, *shape]: one draw an expert, so that fan-in is the expert's own."""
    return jax.vmap(lambda k: init_kernel(k, shape, scale))(jax.random.split(key, num_experts))


class FeedForwardExperts(nnx.Module):
    """Feed-forward networks, as `layers.Mlp` E times."""

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model, E = config.model, config.moe.num_experts
        D, F, s = model.d_model, model.d_ff, model.init_scale
        i, g, o = jax.random.split(key, 3)
        self.wi = param(
            init_stacked_kernel(i, E, (D, F), s), "expert", "embed", "mlp", kind="expert"
        )
        self.gate = (
            param(init_stacked_kernel(g, E, (D, F), s), "expert", "embed", "mlp", kind="expert")
            if model.activation == "geglu"
            else None
        )
        self.wo = param(
            init_stacked_kernel(o, E, (F, D), s), "expert", "mlp", "embed", kind="expert"
        )

    def __call__(self, x: jax.Array, matmul: MatMul, drop: Dropout) -> tuple[jax.Array, ...]:
        """[.., D] → ([.., D],); dropout on the hidden activations (paper §2.4)."""
        gate = None if self.gate is None else matmul(x, self.gate, "mlp")
        h = drop(activate(self.config.model.activation, matmul(x, self.wi, "mlp"), gate))
        return (matmul(h, self.wo, "activation_split"),)


class ProjectionExperts(nnx.Module):
    """Linear maps to queries, and to shared keys and values (paper, Appendix A, Fig 10)."""

    def __init__(self, config: Config, key: jax.Array):
        model, E = config.model, config.moe.num_experts
        D, inner, s = model.d_model, model.num_heads * model.head_dim, model.init_scale
        q, kv = jax.random.split(key)
        query = init_stacked_kernel(q, E, (D, inner), s) / model.head_dim**0.5
        self.query = param(query, "expert", "embed", "heads", kind="expert")
        self.key_value = param(
            init_stacked_kernel(kv, E, (D, inner), s), "expert", "embed", "heads", kind="expert"
        )

    def __call__(self, x: jax.Array, matmul: MatMul, drop: Dropout) -> tuple[jax.Array, ...]:
        """[.., D] → ([.., H·K], [.., H·K]); nothing is hidden, so nothing is dropped out."""
        del drop
        return matmul(x, self.query, "heads"), matmul(x, self.key_value, "heads")


Experts = FeedForwardExperts | ProjectionExperts
