"""Dense feed-forward layer, and the activation that dense layers and experts share."""

from collections.abc import Callable

import jax
from flax import nnx

from switch_jax.config import ModelConfig
from switch_jax.distributed import constrain
from switch_jax.model.layers import RowKeys, dropout, init_kernel, linear, param


def activate(name: str, x_wi: jax.Array, x_gate: jax.Array | None) -> jax.Array:
    """Returns ReLU(x W_i), or GELU(x W_gate) · (x W_i) with the tanh form of GELU, as in T5.

    Args:
      name: "relu" or "geglu".
      x_wi: x W_i.
      x_gate: x W_gate, for "geglu".
    """
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        "relu": jax.nn.relu,
        "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    }
    return functions[name](x_wi) if x_gate is None else functions[name](x_gate) * x_wi


class Mlp(nnx.Module):
    """Dense feed-forward layer, ReLU or GEGLU, with dropout of the hidden activations."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        D, F, s = config.d_model, config.d_ff, config.init_scale
        i, g, o = jax.random.split(key, 3)
        self.wi = param(init_kernel(i, (D, F), s), "embed", "mlp", kind="feed_forward")
        self.gate = (
            param(init_kernel(g, (D, F), s), "embed", "mlp", kind="feed_forward")
            if config.activation == "geglu"
            else None
        )
        self.wo = param(init_kernel(o, (F, D), s), "mlp", "embed", kind="feed_forward")

    @jax.named_scope("feed_forward")
    def __call__(self, x_BxLxD: jax.Array, keys: RowKeys) -> jax.Array:
        """[B, L, D] → [B, L, D]."""
        gate = None if self.gate is None else linear(x_BxLxD, self.gate)
        h_BxLxF = activate(self.config.activation, linear(x_BxLxD, self.wi), gate)
        h_BxLxF = constrain(h_BxLxF, "batch", None, "mlp")
        h_BxLxF = dropout(h_BxLxF, self.config.dropout_rate, keys)
        return constrain(linear(h_BxLxF, self.wo), "batch", None, "activation")
