"""Adafactor and other optimizers, and learning-rate schedules, from optax.

Parameters are a flat dict path → array; their metadata (logical axes and kind) is by path, too.
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
_KINDS_WITHOUT_DECAY = ("norm", "relative_bias", "router_bias")

# Name of a group in `optimizer.trained` → regular expression found in the paths of its parameters.
_GROUPS = {
    "all": "",
    "experts": "/experts/",
    "non_experts": "^(?!.*/experts/)",
    "attention": "attention/",
}


def trained_parameters(config: Config, names: Iterable[str]) -> frozenset[str]:
    """Returns the paths of the trained parameters: those that match `optimizer.trained`.

    With LoRA these are the adapters. Raises `UserError` where no parameter matches.
    """
    given = config.optimizer.trained
    if config.lora.rank:
        if given != "all":
            raise UserError(
                f"lora.rank={config.lora.rank} trains its adapters alone; leave optimizer.trained"
                f" at all instead of {given}."
            )
        return frozenset(filter(is_adapter, names))
    pattern = re.compile(_GROUPS.get(given, given))
    trained = frozenset(name for name in names if pattern.search(name))
    if not trained:
        raise UserError(
            f"optimizer.trained={given!r} is found in no parameter's path; `switch-jax inspect`"
            " lists them, and all, experts, non_experts and attention are groups of them."
        )
    return trained


def make_optimizer(config: Config, metadata: Metadata) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a config for parameters with this metadata.

    It takes gradients and parameters by path, and optionally `rms`: that of every matrix, as
    `matrix_rms` computes it. Its state and its updates hold only the trained parameters.
    """
    trained = trained_parameters(config, metadata)
    inner = _optimizer(config, {name: metadata[name] for name in metadata if name in trained})

    def select_trained(tree):
        return {name: tree[name] for name in tree if name in trained}

    def init(params):
        return inner.init(select_trained(params))

    def update(updates, state, params, **extra):
        return inner.update(select_trained(updates), state, select_trained(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _optimizer(config: Config, metadata: Metadata) -> optax.GradientTransformationExtraArgs:
    """Returns the chain of clipping, update rule, learning rate and weight decay.

    Adafactor's weight decay comes last and is not scaled by the learning rate, as in T5X.
    """
    optimizer = config.optimizer
    rate = learning_rate_schedule(optimizer, config.train)
    # Adapters decay, whatever the kind of the matrix they adapt.
    decayed = {
        name: kind not in _KINDS_WITHOUT_DECAY or is_adapter(name)
        for name, (_, kind) in metadata.items()
    }
    if optimizer.name == "adafactor":
        batch_dims = {name: m.num_batch_dims for name, m in metadata.items()}
        core = [
            _adafactor(batch_dims),
            optax.scale_by_learning_rate(rate),
            optax.add_decayed_weights(-optimizer.weight_decay, decayed),
        ]
    else:
        core = [
            _UPDATE_RULES[optimizer.name](),
            optax.add_decayed_weights(optimizer.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        ]
    max_norm = optimizer.max_grad_norm
    # Identity and clipping have an empty state, so that a resumed run may switch between them.
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return optax.chain(clip, *core)


_UPDATE_RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.98),
    "lion": optax.scale_by_lion,
    "sgd": optax.identity,
}


def _adafactor(batch_dims: Mapping[str, int]) -> optax.GradientTransformationExtraArgs:
    """Returns T5X's Adafactor, without the learning rate; every matrix has its own statistics.

    Second-moment decay 1 - (t+1)^-0.8, factored where both dimensions are at least 128; the update
    is clipped at RMS 1 and scaled by the parameter's own RMS (at least 1e-3); no momentum.

    `optax.scale_by_param_block_rms` computes that RMS twice, so as to have a derivative at 0:
    parameters would be read from memory once more.
    """
    unscaled = per_slice(
        optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=128, factored=True
            ),
            optax.clip_by_block_rms(1.0),
            optax.identity(),  # checkpoints have the state of a third transformation, an empty one
        ),
        batch_dims,
    )

    def update(updates, state, params, *, rms=None, **_):
        updates, state = unscaled.update(updates, state, params)
        rms = rms or {name: matrix_rms(params[name], batch_dims[name]) for name in updates}

        def scaled(name: str) -> jax.Array:
            update = updates[name]
            factor = jnp.maximum(rms[name], 1e-3)
            return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

        return {name: scaled(name) for name in updates}, state

    return optax.GradientTransformationExtraArgs(unscaled.init, update)


def matrix_rms(parameter: jax.Array, num_batch_dims: int) -> jax.Array:
    """RMS of each matrix (or vector), float32, over all but the batch dimensions."""
    axes = tuple(range(num_batch_dims, parameter.ndim))
    return jnp.sqrt(jnp.mean(jnp.square(parameter.astype(jnp.float32)), axes))


def per_slice(
    inner: optax.GradientTransformation, batch_dims: Mapping[str, int]
) -> optax.GradientTransformation:
    """Applies `inner` to every parameter separately, vmapped over its leading batch dimensions.

    The state is a dict path → state of `inner`, whose arrays have the batch dimensions in front.

    Args:
      inner: optimizer of one matrix or vector.
      batch_dims: number of leading batch dimensions (`BATCH_DIMS`) of every parameter, by path.
    """

    def vmapped(function: Callable, name: str) -> Callable:
        for _ in range(batch_dims[name]):
            function = jax.vmap(function)
        return function

    def init(params):
        return {name: vmapped(inner.init, name)(p) for name, p in params.items()}

    def update(updates, state, params):
        pairs = {
            name: vmapped(inner.update, name)(updates[name], state[name], params[name])
            for name in updates
        }
        return {n: pair[0] for n, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()}

    return optax.GradientTransformation(init, update)


def opt_state_axes(
    optimizer: optax.GradientTransformation, params: Mapping[str, Any], axes: Axes
) -> Any:
    """Returns the logical axes of every array of the optimizer's state, in the state's structure.

    Every dict in the state has parameter paths as keys. An array of the parameter's shape has the
    parameter's axes. Adafactor's row and column statistics lack a dimension: they have the
    parameter's batch dimensions and are not split otherwise, which costs little memory.

    Args:
      optimizer: as from `make_optimizer`.
      params: shapes of the parameters, by path.
      axes: logical axes of the parameters, by path.
    """

    def array_axes(name: str, leaf: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        if leaf.shape == params[name].shape:
            return axes[name]
        batch = [axis for axis in axes[name] if axis in BATCH_DIMS][: leaf.ndim]
        return (*batch, *[None] * (leaf.ndim - len(batch)))

    def node_axes(node: Any) -> Any:
        if not isinstance(node, dict):
            return ()
        return {
            name: jax.tree.map(lambda leaf, name=name: array_axes(name, leaf), value)
            for name, value in node.items()
        }

    state = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(node_axes, state, is_leaf=lambda node: isinstance(node, dict))


def is_schedule_state(node: Any) -> bool:
    """Whether a node of the optimizer's state is the step count of the learning rate."""
    return isinstance(node, optax.ScaleByScheduleState)


def select_update(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the optimizer's state `new` if `finite`, else `old`; the learning rate goes on."""
    return jax.tree.map(
        lambda new, old: (
            new
            if is_schedule_state(new)
            else jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        ),
        new,
        old,
        is_leaf=is_schedule_state,
    )


def learning_rate_schedule(optimizer: OptimizerConfig, train: TrainConfig) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    `rsqrt` is T5's: learning_rate / sqrt(max(step, warmup_steps)), constant during warm-up. The
    other schedules rise linearly during warm-up, from learning_rate / warmup_steps to
    learning_rate. In the last `cooldown_steps` every schedule is multiplied by a factor that
    falls linearly to 0.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    length = max(train.steps - warmup, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / length, 0, 1)
        ramp = jnp.minimum((step + 1) / warmup, 1) if warmup else 1.0
        value = {
            "rsqrt": lambda: peak / jnp.sqrt(jnp.maximum(step, max(warmup, 1))),
            "constant": lambda: peak * ramp,
            "linear": lambda: peak * ramp * (1 - progress),
            "cosine": lambda: peak * ramp * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        }[optimizer.schedule]()
        if optimizer.cooldown_steps:
            value *= jnp.clip((train.steps - step) / optimizer.cooldown_steps, 0, 1)
        return value

    return rate


def schedule_warnings(config: Config) -> list[str]:
    """Returns a sentence if warm-up and cool-down do not fit into the run, as in a short trial."""
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup_steps + optimizer.cooldown_steps <= steps:
        return []
    rates = learning_rate_schedule(optimizer, config.train)(jnp.linspace(0, steps - 1, 1000))
    return [
        f"optimizer.warmup_steps={optimizer.warmup_steps} and"
        f" optimizer.cooldown_steps={optimizer.cooldown_steps} are together more than"
        f" train.steps={steps}: the learning rate is at most {float(rates.max()):.3g}"
    ]
