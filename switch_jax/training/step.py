"""Initialisation, train step and eval step, and their abstract forms.

Training, distillation, ahead-of-time compilation and benchmarks all lower what is here, so
that what is compiled is what runs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from switch_jax.config import Config
from switch_jax.data import feature_shapes
from switch_jax.distributed import (
    batch_sharding,
    constrain,
    host_memory_kind,
    partition_spec,
    replicated,
)
from switch_jax.model import (
    Batch,
    LossSums,
    MeshJit,
    RouterStatsByStack,
    SwitchTransformer,
    add_adapter_axes,
    collect_router_stats,
    init_adapters,
    logical_axes,
    loss_denominators,
    loss_terms,
    merge_adapters,
    router_metrics,
    token_losses,
    with_parameters,
)
from switch_jax.training.optimizer import learning_rate_schedule, make_optimizer, trained_parameters
from switch_jax.training.teacher import Teacher

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during training, and all that a checkpoint must hold.

    Its leaves are arrays, or in their place shapes, specs or shardings.
    """

    step: Any  # int32: train steps done
    tokens: Any  # uint32 [2]: target tokens seen, low and high word
    params: dict[str, Any]  # by path, float32
    opt_state: Any


class TrainProgram:
    """The computations of a config on a mesh, with the shapes and shardings they need.

    Args:
      teacher: config of the teacher, which `train_step` needs where the config has one.
    """

    def __init__(self, config: Config, mesh: Mesh, teacher: Config | None = None):
        self.config = config
        self.mesh = mesh
        self._teacher = None if teacher is None else Teacher(teacher, mesh)
        self.abstract_teacher = {} if self._teacher is None else self._teacher.abstract_params
        self._model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
        axes = add_adapter_axes(logical_axes(self._model), config)
        self._optimizer = make_optimizer(config, axes)
        self._trained = trained_parameters(config, axes)
        self._schedule = learning_rate_schedule(config.optimizer, config.train)
        shapes = jax.eval_shape(self._init)
        specs = {n: partition_spec(a, fsdp=config.mesh.fsdp) for n, a in axes.items()}
        self.state_sharding: TrainState = jax.tree.map(
            lambda s: NamedSharding(mesh, s),
            TrainState(P(), P(), specs, _optimizer_specs(shapes, specs, axes)),
            is_leaf=lambda node: isinstance(node, P),
        )
        self._near = self.state_sharding.opt_state
        if config.optimizer.memory == "host":
            host = host_memory_kind(mesh)
            far = jax.tree.map(lambda s: s.with_memory_kind(host), self._near)
            self.state_sharding = dataclasses.replace(self.state_sharding, opt_state=far)
        self.abstract_state: TrainState = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.state_sharding,
        )
        batch = batch_sharding(mesh)
        self.abstract_batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch)
            for name, (shape, dtype) in feature_shapes(config).items()
        }
        whole = replicated(mesh)
        self.init = MeshJit(mesh, self._init, out_shardings=self.state_sharding)
        self.train_step = MeshJit(
            mesh,
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.state_sharding, whole, whole),
        )
        self.eval_step = MeshJit(mesh, self._eval_step, out_shardings=whole)

    def model(self, params: Mapping[str, Any]) -> SwitchTransformer:
        """The model with these parameters, adapters merged."""
        return with_parameters(self._model, merge_adapters(params, self.config))

    def put(self, batch: Mapping[str, Any]) -> Batch:
        """This process's rows of a global batch, as global arrays on the mesh."""
        where = batch_sharding(self.mesh)
        return {
            # The shape is given, not inferred: processes that feed a row twice must fail.
            name: jax.make_array_from_process_local_data(
                where, rows, self.abstract_batch[name].shape
            )
            for name, rows in batch.items()
        }

    def _init(self) -> TrainState:
        """A fresh state; depends on `train.seed` and not on the mesh."""
        model = SwitchTransformer(self.config, jax.random.key(self.config.train.seed))
        axes = logical_axes(self._model)
        params = init_adapters(dict(zip(axes, jax.tree.leaves(model))), axes, self.config)
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.uint32)
        return TrainState(step, tokens, params, self._optimizer.init(params))

    def _train_step(
        self, state: TrainState, batch: Batch, teacher: Mapping[str, jax.Array] | None = None
    ) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
        """One optimizer step over a global batch, in `train.accumulate` microbatches.

        `teacher`: its parameters, as `abstract_teacher`; an argument, for a constant would be
        compiled into the program.

        Returns the state, metrics, and how many assignments each expert had: [layers, E] by
        `Stats` key.
        """
        config = self.config
        assert config.distilled == (self._teacher is not None), "a Program without its teacher"
        totals = loss_denominators(batch, config)
        soft_weight = jnp.where(
            state.step < config.distill.start_step, 0.0, config.distill.soft_weight
        )
        keys = self._row_keys(state.step, batch)

        trained = {n: p for n, p in state.params.items() if n in self._trained}

        def loss(trained, microbatch, keys):
            model = self.model(state.params | trained)
            decoded, routes = model.route(
                microbatch,
                factor=config.moe.capacity_factor,
                keys=keys,
                batch_size=config.data.batch_size,
            )
            answer = None
            if self._teacher is not None:
                answer = self._teacher(teacher or {}, microbatch)
            sums = token_losses(
                *model.factors(decoded), microbatch, answer, config.distill.temperature
            )
            stats = collect_router_stats(routes)
            terms = loss_terms(sums, stats, totals, config, soft_weight)
            return sum(terms.values()), (terms, sums, stats)

        gradients = jax.grad(loss, has_aux=True)
        if config.train.accumulate == 1:
            grads, (terms, sums, stats) = gradients(trained, batch, keys)
        else:
            grads, (terms, sums, stats) = self._accumulate(
                functools.partial(gradients, trained), (batch, keys)
            )
        opt_state = state.opt_state
        if config.optimizer.memory == "host":
            opt_state = jax.device_put(opt_state, self._near)
        updates, opt_state = self._optimizer.update(grads, opt_state, state.params)
        trained = optax.apply_updates(trained, updates)
        params = self._balanced(state.params | trained, stats)
        tokens = _add_words(state.tokens, jnp.sum(batch["decoder_loss_weights"] > 0))
        metrics = {
            "loss": sum(terms.values()),
            **terms,
            # Of distillation as of any other training, so that runs can be compared.
            "cross_entropy": sums.cross_entropy / jnp.maximum(totals.targets, 1),
            "accuracy": sums.correct / jnp.maximum(totals.targets, 1),
            "tokens": tokens,
            "learning_rate": self._schedule(state.step),
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            **router_metrics(stats, config),
        }
        load = {key: sums.load_E for key, sums in stats.items()}
        return TrainState(state.step + 1, tokens, params, opt_state), metrics, load

    def _balanced(
        self, params: Mapping[str, jax.Array], stats: RouterStatsByStack
    ) -> dict[str, jax.Array]:
        """`params` with routers' biases a step towards balance: up where an expert had less
        than its share of the batch, down where it had more (Wang et al. 2024).
        """
        rate, moved = self.config.moe.balance_bias_rate, dict(params)
        for name in params:
            if name.endswith("/router/bias"):
                stack, *_, sublayer, _, _ = name.split("/")
                load_xE = stats[f"{stack}/{sublayer}"].load_E
                moved[name] += rate * jnp.sign(load_xE.mean(-1, keepdims=True) - load_xE)
        return moved

    def _eval_step(
        self, params: Mapping[str, jax.Array], batch: Batch
    ) -> tuple[LossSums, jax.Array, RouterStatsByStack]:
        """Sums over a batch without dropout: `LossSums`, number of targets, router sums."""
        model = self.model(params)
        decoded, routes = model.route(batch, factor=self.config.moe.eval_capacity_factor)
        return (
            token_losses(*model.factors(decoded), batch),
            jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32),
            collect_router_stats(routes),
        )

    def _row_keys(self, step: jax.Array, batch: Batch) -> jax.Array | None:
        """A key per global row [B], or None where the config has no noise."""
        config = self.config
        if not (config.model.dropout_rate or (config.sparse and config.moe.noisy)):
            return None
        key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        rows = jnp.arange(batch["decoder_input_tokens"].shape[0])
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def _accumulate(self, function, inputs):
        """Σ of `function(*microbatch)` over the microbatches of `inputs`, in float32.

        A microbatch is consecutive rows, so that its groups are whole, also where they span
        devices. Its rows come from few devices and go to all; a row is a few kilobytes of ids.
        """
        parts = self.config.train.accumulate

        def cut(x):
            x = constrain(x, None)  # in two steps: XLA splits what is whole anywhere
            x = x.reshape(parts, -1, *x.shape[1:])
            return constrain(x, None, "batch")

        microbatches = jax.tree.map(cut, inputs)
        shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

        def add(total, microbatch):
            total = jax.tree.map(jnp.add, total, function(*microbatch))
            grads, rest = total
            # Sharded like the parameters: an unsharded accumulator would not fit.
            where = {name: self.state_sharding.params[name] for name in grads}
            grads = jax.lax.with_sharding_constraint(grads, where)
            return (grads, rest), None

        return jax.lax.scan(add, zeros, microbatches)[0]


def _add_words(words: jax.Array, number: jax.Array) -> jax.Array:
    """A 64-bit sum without 64-bit types: the paper's runs see 10^11 targets."""
    low = words[0] + number.astype(jnp.uint32)
    return jnp.stack([low, words[1] + (low < words[0])])


def _optimizer_specs(shapes: TrainState, specs: Mapping[str, P], axes: Mapping[str, tuple]) -> Any:
    """Specs of the optimizer state: an array that belongs to a parameter lies where it lies.

    Adafactor's row and column statistics lack a dimension; they are split by layer and
    expert like their parameter and are whole otherwise, which costs little.
    """

    def one(path, leaf):
        keys = [getattr(entry, "key", None) for entry in path]
        name = next((key for key in keys if key in specs), None)
        if name is None:
            return P()
        if leaf.shape == shapes.params[name].shape:
            return specs[name]
        stacked = [a for a in axes[name] if a in ("layers", "expert")][: leaf.ndim]
        return P(*specs[name][: len(stacked)])

    return jax.tree_util.tree_map_with_path(one, shapes.opt_state)
