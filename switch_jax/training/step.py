"""TrainProgram: initial state and train step of a config on a mesh, jitted.

Training, distillation, ahead-of-time compilation and benchmarks all use these functions, so that
compilation reports describe the program that trains.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from switch_jax.config import Config
from switch_jax.distributed import (
    constrain,
    host_memory_kind,
    mesh_platform,
    partition_spec,
    replicated,
)
from switch_jax.model import (
    Batch,
    MeshJit,
    RouterStatsByStack,
    ShardedModel,
    SwitchTransformer,
    collect_router_stats,
    first_choice_counts,
    loss_denominators,
    loss_terms,
    router_metrics,
    stack_and_sublayer,
    token_losses,
)
from switch_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    matrix_rms,
    opt_state_axes,
    select_update,
    trained_parameters,
)
from switch_jax.training.state import TrainState

Metrics = dict[str, jax.Array]

# Kinds of the matrices of layers, which compute in the activation dtype. So do embedding and head,
# but the gradients of their uses are added in float32.
_LAYER_KINDS = ("attention", "feed_forward", "expert")


class TrainProgram:
    """Jitted initial state and train step of a config on a mesh.

    Two functions are compiled: `init` and `train_step`. Both have fixed output shardings, and
    `train_step` donates its state. To compile them ahead of time, lower them for `abstract_state`,
    `abstract_batch` and `abstract_teacher`. The evaluation step is `sharded.eval_step`.

    Args:
      config: config of the run.
      mesh: as from `make_mesh`.
      teacher: as from `teacher_config`; required if `config` distils a teacher.

    Attributes:
      sharded: the model on the mesh, without an optimizer.
      teacher: the teacher's model on the same mesh; None without a teacher.
      abstract_state: shapes, dtypes and shardings of a `TrainState`.
      state_sharding: shardings of a `TrainState`.
      abstract_batch: shapes, dtypes and shardings of the features of a global batch, by name.
      abstract_teacher: shapes, dtypes and shardings of the teacher's parameters, by path; empty
        without a teacher.
      init: `() → TrainState`; depends on `train.seed` and not on the mesh.
      train_step: `(state, batch, teacher's parameters) → (state, metrics, load)`; `metrics` are
        scalars by name (`tokens`: uint32 [2]; `finite`: whether loss, gradients and new parameters
        are), `load` the number of assignments of every expert, [layers, E] by key of
        `RouterStatsByStack`.
    """

    def __init__(self, config: Config, mesh: Mesh, teacher: Config | None = None):
        self.config = config
        self.mesh = mesh
        self.sharded = ShardedModel(config, mesh)
        self.teacher = None if teacher is None else ShardedModel(teacher, mesh)
        self.abstract_teacher = {} if self.teacher is None else self.teacher.abstract_params
        self.abstract_batch = self.sharded.abstract_batch
        self._optimizer = make_optimizer(config, self.sharded.metadata)
        self._trained_names = trained_parameters(config, self.sharded.metadata)
        self._schedule = learning_rate_schedule(config.optimizer, config.train)
        self._stored_rms, self._stored_weights = self._names_stored_with_params()
        shapes = jax.eval_shape(self._init)
        shardings = self._shardings(shapes)
        self._opt_state_on_device = shardings.opt_state  # for updates, also if stored on the host
        if config.optimizer.memory == "host":
            host = host_memory_kind(mesh)
            on_host = jax.tree.map(lambda s: s.with_memory_kind(host), shardings.opt_state)
            shardings = dataclasses.replace(shardings, opt_state=on_host)
        self.state_sharding = shardings
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        self.init = MeshJit(mesh, self._init, out_shardings=self.state_sharding)
        stored = self.state_sharding.rms, self.state_sharding.weights
        self._complete = MeshJit(mesh, self._stored_with, out_shardings=stored)
        self.train_step = MeshJit(
            mesh,
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.state_sharding, replicated(mesh), replicated(mesh)),
        )

    def _shardings(self, shapes: TrainState) -> TrainState:
        """Returns the shardings of a state with these shapes, all of it in device memory."""
        optimizer_axes = opt_state_axes(self._optimizer, shapes.params, self.sharded.axes)
        axes = self.sharded.axes
        rms_axes = {
            name: axes[name][: self.sharded.metadata[name].num_batch_dims]
            for name in self._stored_rms
        }
        weight_axes = {name: axes[name] for name in self._stored_weights}
        state_axes = TrainState((), (None,), axes, optimizer_axes, rms_axes, weight_axes)
        fsdp = self.config.mesh.fsdp
        return jax.tree.map(
            lambda leaf, axes: NamedSharding(self.mesh, partition_spec(axes, fsdp=fsdp)),
            shapes,
            state_axes,
        )

    def _init(self) -> TrainState:
        """Returns a fresh state."""
        params = self.sharded.init_params()
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.uint32)
        opt_state = self._optimizer.init(params)
        return TrainState(step, tokens, params, opt_state, *self._stored_with(params))

    def _names_stored_with_params(self) -> tuple[frozenset[str], frozenset[str]]:
        """Returns the names of the parameters whose RMS, and whose weights, a state holds.

        With float32 activations the weights are the parameters, which every step reads anyway.
        Adapters are merged into a matrix before it is cast.
        """
        config, metadata = self.config, self.sharded.metadata
        if config.model.dtype == "float32" or config.lora.rank:
            return frozenset(), frozenset()
        weights = {name for name in metadata if metadata[name].kind in _LAYER_KINDS}
        rms = self._trained_names if config.optimizer.name == "adafactor" else frozenset()
        return frozenset(rms), frozenset(weights)

    def _stored_with(
        self, params: Mapping[str, jax.Array], weights: Mapping[str, jax.Array] | None = None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns `rms` and `weights` of a state with these parameters.

        The RMS is that of the weights where there are any: XLA then computes it in the fusion that
        writes them, and otherwise in one that reads the float32 parameters again.

        `weights`: of the state before, which frozen parameters keep.
        """
        dtype, metadata = self.config.model.dtype, self.sharded.metadata
        names = self._stored_weights & (self._trained_names if weights else self._stored_weights)
        # In the order of `params`: a set's order differs between processes, and all of them must
        # trace the same program.
        cast = {n: params[n].astype(dtype) for n in params if n in names}
        weights = {**(weights or {}), **cast}
        rms = {
            n: matrix_rms(weights.get(n, params[n]), metadata[n].num_batch_dims)
            for n in params
            if n in self._stored_rms
        }
        return rms, weights

    def complete_state(self, state: TrainState) -> TrainState:
        """Returns a state with `weights`, and with `rms` if it has none, of its parameters."""
        rms, weights = self._complete(state.params)
        return dataclasses.replace(state, rms=state.rms or rms, weights=weights)

    def train_step_text(self) -> str:
        """Returns the optimised HLO of `train_step`; it is compiled, or read from the cache."""
        lowered = self.train_step.lower(
            self.abstract_state, self.abstract_batch, self.abstract_teacher
        )
        return lowered.compile().as_text() or ""

    def _train_step(
        self, state: TrainState, batch: Batch, teacher_params: Mapping[str, jax.Array] | None = None
    ) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
        """Runs one optimizer step over a global batch, in `train.accumulate` microbatches.

        With `train.on_nonfinite=skip`, a step that is not finite keeps parameters and optimizer.

        `teacher_params` is an argument and not a constant, because a constant would be compiled
        into the program.
        """
        config = self.config
        assert config.distilled == (self.teacher is not None), "a TrainProgram without its teacher"
        denominators = loss_denominators(batch, config)
        soft_weight = jnp.where(
            state.step < config.distill.start_step, 0.0, config.distill.soft_weight
        )
        keys = self._row_keys(state.step, batch)

        weights = state.params | state.weights
        trained_weights = {n: w for n, w in weights.items() if n in self._trained_names}
        first_choices = self._first_choices(weights, batch, keys)

        def loss(trained_weights, microbatch, keys):
            model = self.sharded.model(weights | trained_weights)
            decoded, stats = self._route(model, microbatch, keys)
            sums = token_losses(
                *model.logit_factors(decoded),
                microbatch,
                self._teacher_factors(teacher_params or {}, microbatch),
                config.distill.temperature,
                config.train.label_smoothing,
            )
            terms = loss_terms(sums, stats, denominators, config, soft_weight, first_choices)
            return sum(terms.values()), (terms, sums, stats)

        gradients = functools.partial(jax.grad(loss, has_aux=True), trained_weights)
        if config.train.accumulate == 1:
            grads, (terms, sums, stats) = gradients(batch, keys)
        else:
            grads, (terms, sums, stats) = self._accumulate(gradients, (batch, keys))

        opt_state = state.opt_state
        if config.optimizer.memory == "host":
            opt_state = jax.device_put(opt_state, self._opt_state_on_device)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
            updates, new_opt_state = self._optimizer.update(
                grads, opt_state, state.params, rms=state.rms
            )
            trained_params = optax.apply_updates({n: state.params[n] for n in updates}, updates)
        params = self._update_balance_biases(state.params | trained_params, stats)
        rms, weights = self._stored_with(params, state.weights)
        total_loss, grad_norm = sum(terms.values()), _global_norm(grads)
        param_norm = _global_norm(params, rms)
        finite = jnp.isfinite(jnp.stack([total_loss, grad_norm, param_norm])).all()
        if config.train.on_nonfinite == "skip":
            params = {n: jnp.where(finite, p, state.params[n]) for n, p in params.items()}
            new_opt_state = select_update(finite, new_opt_state, opt_state)
            rms, weights = self._stored_with(params, state.weights)
            param_norm = _global_norm(params, rms)
        tokens = _add_to_uint64(state.tokens, jnp.sum(batch["decoder_loss_weights"] > 0))

        metrics = {
            "loss": total_loss,
            **terms,
            # Without label smoothing and the soft weight of distillation, so that runs can be
            # compared.
            "cross_entropy": sums.cross_entropy / jnp.maximum(denominators.targets, 1),
            "accuracy": sums.correct / jnp.maximum(denominators.targets, 1),
            "tokens": tokens,
            "learning_rate": self._schedule(state.step),
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "finite": finite,
            **router_metrics(stats, config),
        }
        load = {key: sums.load_E for key, sums in stats.items()}
        step = state.step + 1
        return TrainState(step, tokens, params, new_opt_state, rms, weights), metrics, load

    def _route(
        self, model: SwitchTransformer, microbatch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, RouterStatsByStack]:
        """Returns decoder states [B, T, D] and router statistics of a microbatch in training."""
        decoded, routes = model.route(
            microbatch,
            capacity_factor=self.config.moe.capacity_factor,
            keys=keys,
            batch_size=self.config.data.batch_size,
        )
        return decoded, collect_router_stats(routes)

    def _first_choices(
        self, params: Mapping[str, jax.Array], batch: Batch, keys: jax.Array | None
    ) -> dict[str, jax.Array] | None:
        """Returns the first choices of every expert in a global batch, or None if not needed.

        With `moe.balance_scope=batch`, the gradient of the first microbatch depends on the choices
        in all of them. A forward pass of its own counts them: counts of the step before would be
        free, but the loss would lag behind the routers, and the state would have to hold them.
        """
        moe = self.config.moe
        balanced_over_batch = moe.balance_scope == "batch" and moe.aux_loss_weight > 0
        if not (self.config.sparse and balanced_over_batch and self.config.train.accumulate > 1):
            return None
        model = self.sharded.model(params)

        def count(microbatch, keys):
            return {}, first_choice_counts(self._route(model, microbatch, keys)[1])

        return self._accumulate(count, (batch, keys))[1]

    def _teacher_factors(
        self, params: Mapping[str, jax.Array], microbatch: Batch
    ) -> tuple[jax.Array, jax.Array] | None:
        """Returns decoder states [B, T, D] and head [D, V]; their product is the teacher's logits.

        Returns None without a teacher. The teacher runs without noise, with the capacity factor
        `moe.capacity_factor` of its config; see `teacher_config`.
        """
        if self.teacher is None:
            return None
        model, config = self.teacher.model(params), self.teacher.config
        decoded, _ = model.route(
            microbatch,
            capacity_factor=config.moe.capacity_factor,
            batch_size=config.data.batch_size,
        )
        return model.logit_factors(decoded)

    def _update_balance_biases(
        self, params: Mapping[str, jax.Array], stats: RouterStatsByStack
    ) -> dict[str, jax.Array]:
        """Moves the routers' biases by `moe.balance_bias_rate` (Wang et al. 2024).

        The bias of an expert rises if the expert had less than its share of the batch, and falls
        if it had more.
        """
        rate, updated = self.config.moe.balance_bias_rate, dict(params)
        for name, metadata in self.sharded.metadata.items():
            if metadata.kind == "router_bias":
                load_xE = stats[stack_and_sublayer(name)].load_E
                updated[name] += rate * jnp.sign(load_xE.mean(-1, keepdims=True) - load_xE)
        return updated

    def _row_keys(self, step: jax.Array, batch: Batch) -> jax.Array | None:
        """Returns a random key for each global row, [B]; None where the config uses no noise."""
        config = self.config
        if not (config.model.dropout_rate or (config.sparse and config.moe.uses_random_numbers)):
            return None
        key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        rows = jnp.arange(batch["decoder_input_tokens"].shape[0])
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def _accumulate(self, function, inputs):
        """Returns Σ of `function(*microbatch)` over the microbatches of `inputs`, in float32.

        `function` returns gradients and other sums. A microbatch is a range of consecutive rows,
        so that routing groups stay whole, also where they span devices. Its rows lie on few
        devices and are sent to all; a row is a few kilobytes of ids.
        """
        num_microbatches = self.config.train.accumulate

        def split(x):
            x = constrain(x, None)  # gathered first: XLA can split a replicated array anywhere
            x = x.reshape(num_microbatches, -1, *x.shape[1:])
            return constrain(x, None, "batch")

        microbatches = jax.tree.map(split, inputs)
        shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

        def add(total, microbatch):
            total = jax.tree.map(jnp.add, total, function(*microbatch))
            grads, other_sums = total
            # Sharded like the parameters: a replicated accumulator would not fit.
            shardings = {name: self.state_sharding.params[name] for name in grads}
            grads = jax.lax.with_sharding_constraint(grads, shardings)
            return (grads, other_sums), None

        return jax.lax.scan(add, zeros, microbatches)[0]


def _global_norm(
    arrays: Mapping[str, jax.Array], rms: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """Norm of all arrays; of those whose RMS is known, without another sum over elements."""
    rms = rms or {}
    squares = [
        jnp.sum(jnp.square(rms[name])) * (array.size / rms[name].size)
        if name in rms
        else _sum_of_squares(array)
        for name, array in arrays.items()
    ]
    return jnp.sqrt(sum(squares))


def _sum_of_squares(array: jax.Array) -> jax.Array:
    """Σ x², read once: XLA's CPU compiler would write the squares to memory and read them again."""
    if mesh_platform() != "cpu":
        return jnp.sum(jnp.square(array))
    every_axis = tuple(range(array.ndim))
    return jax.lax.dot_general(array, array, ((every_axis, every_axis), ((), ())))


def _add_to_uint64(words: jax.Array, number: jax.Array) -> jax.Array:
    """Adds a number to a 64-bit integer, given as two uint32 words [2], low and high.

    JAX's 64-bit types are off, and the paper's runs see 10^11 target tokens.
    """
    low = words[0] + number.astype(jnp.uint32)
    return jnp.stack([low, words[1] + (low < words[0])])
