"""Optimizers and schedules, all from optax; Adafactor as T5X uses it.

Parameters come as a flat dict name → array, with the logical names of their dimensions.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from switch_jax.config import Config, OptimizerConfig, TrainConfig
from switch_jax.errors import UserError
from switch_jax.model import BATCH_DIMS, ParameterMetadata, is_adapter

Axes = Mapping[str, tuple[str, ...]]
Metadata = Mapping[str, ParameterMetadata]
_NOT_DECAYED = ("norm", "relative_bias", "router_bias")
_GROUPS = {
    "all": "",
    "experts": "/experts/",
    "non_experts": "^(?!.*/experts/)",
    "attention": "attention/",
}


def trained_parameters(config: Config, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters that `optimizer.trained` lets change; with LoRA, its adapters.

    Raises `UserError` where there are none.
    """
    given = config.optimizer.trained
    if config.lora.rank:
        if given != "all":
            raise UserError(
                f"lora.rank={config.lora.rank} trains its adapters alone; leave optimizer.trained"
                f" at all instead of {given}."
            )
        return frozenset(filter(is_adapter, names))
    try:
        pattern = re.compile(_GROUPS.get(given, given))
    except re.error as error:
        raise UserError(
            f"optimizer.trained={given!r} is no regular expression ({error}); use one, or one of"
            f" {', '.join(_GROUPS)}."
        ) from error
    trained = frozenset(name for name in names if pattern.search(name))
    if not trained:
        raise UserError(
            f"optimizer.trained={given!r} is found in no parameter's path; `switch-jax inspect`"
            " lists them, and all, experts, non_experts and attention are groups of them."
        )
    return trained


def make_optimizer(config: Config, metadata: Metadata) -> optax.GradientTransformation:
    """The optimizer of a config for parameters with these axes and kinds.

    Its state and its updates are of the trained parameters alone.
    """
    trained = trained_parameters(config, metadata)
    inner = _optimizer(config, {name: metadata[name] for name in metadata if name in trained})

    def of_trained(tree):
        return {name: tree[name] for name in tree if name in trained}

    def init(params):
        return inner.init(of_trained(params))

    def update(updates, state, params):
        return inner.update(of_trained(updates), state, of_trained(params))

    return optax.GradientTransformation(init, update)


def _optimizer(config: Config, metadata: Metadata) -> optax.GradientTransformation:
    optimizer = config.optimizer
    rate = learning_rate_schedule(optimizer, config.train)
    # Adapters decay, whatever the kind of their matrix.
    decayed = {
        name: kind not in _NOT_DECAYED or is_adapter(name) for name, (_, kind) in metadata.items()
    }
    if optimizer.name == "adafactor":
        batch_dims = {
            name: sum(axis in BATCH_DIMS for axis in axes) for name, (axes, _) in metadata.items()
        }
        core = [
            per_slice(_adafactor(), batch_dims),
            optax.scale_by_learning_rate(rate),
            optax.add_decayed_weights(-optimizer.weight_decay, decayed),
        ]
    else:
        core = [
            _DIRECTIONS[optimizer.name](),
            optax.add_decayed_weights(optimizer.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        ]
    limit = optimizer.max_grad_norm
    # The state has the same shape either way, so that a run may change its mind.
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    return optax.chain(clip, *core)


_DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.98),
    "lion": optax.scale_by_lion,
    "sgd": optax.identity,
}


def _adafactor() -> optax.GradientTransformation:
    """T5X's Adafactor for one matrix: decay 1 - (t+1)^-0.8, factored from 128, update clipped
    at RMS 1, scaled by the parameter's own RMS (at least 1e-3), no momentum.
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=128, factored=True
        ),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(min_scale=1e-3),
    )


def per_slice(
    inner: optax.GradientTransformation, batch_dims: Mapping[str, int]
) -> optax.GradientTransformation:
    """Applies `inner` to every parameter alone, once per index of its leading batch dims.

    The state is a dict name → state of `inner`, whose arrays have those dims in front.
    """

    def mapped(function: Callable, name: str) -> Callable:
        for _ in range(batch_dims[name]):
            function = jax.vmap(function)
        return function

    def init(params):
        return {name: mapped(inner.init, name)(p) for name, p in params.items()}

    def update(updates, state, params):
        pairs = {
            name: mapped(inner.update, name)(updates[name], state[name], params[name])
            for name in updates
        }
        return {n: pair[0] for n, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()}

    return optax.GradientTransformation(init, update)


def opt_state_axes(
    optimizer: optax.GradientTransformation, params: Mapping[str, Any], axes: Axes
) -> Any:
    """Logical axes of every array of the optimizer's state, as a tree of its structure.

    Every dict in the state is keyed by parameter. An array of the parameter's shape has its
    axes. Adafactor's row and column statistics lack a dimension: they keep the batch dimensions
    and are whole otherwise, which costs little.

    Args:
      optimizer: as from `make_optimizer`.
      params: shapes of the parameters, by path.
      axes: their logical axes.
    """

    def of_parameter(name: str, leaf: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        if leaf.shape == params[name].shape:
            return axes[name]
        batch = [axis for axis in axes[name] if axis in BATCH_DIMS][: leaf.ndim]
        return (*batch, *[None] * (leaf.ndim - len(batch)))

    def of_node(node: Any) -> Any:
        if not isinstance(node, dict):
            return ()
        return {
            name: jax.tree.map(lambda leaf, name=name: of_parameter(name, leaf), value)
            for name, value in node.items()
        }

    state = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(of_node, state, is_leaf=lambda node: isinstance(node, dict))


def learning_rate_schedule(optimizer: OptimizerConfig, train: TrainConfig) -> optax.Schedule:
    """Learning rate by step, counted from 0.

    rsqrt is T5's: learning_rate / sqrt(max(step, warmup_steps)), flat during warm-up. The
    others rise linearly during warm-up, from learning_rate / warmup_steps to learning_rate.
    `cooldown_steps` before the end every schedule begins to fall linearly to 0.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    length = max(train.steps - warmup, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / length, 0, 1)
        rise = jnp.minimum((step + 1) / warmup, 1) if warmup else 1.0
        value = {
            "rsqrt": lambda: peak / jnp.sqrt(jnp.maximum(step, max(warmup, 1))),
            "constant": lambda: peak * rise,
            "linear": lambda: peak * rise * (1 - done),
            "cosine": lambda: peak * rise * 0.5 * (1 + jnp.cos(jnp.pi * done)),
        }[optimizer.schedule]()
        if optimizer.cooldown_steps:
            value *= jnp.clip((train.steps - step) / optimizer.cooldown_steps, 0, 1)
        return value

    return rate
