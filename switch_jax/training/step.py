"""Initialisation, train step and eval step, and their abstract forms.

Training, distillation, ahead-of-time compilation and benchmarks all lower what is here, so
that what is compiled is what runs.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from switch_jax.config import Config
from switch_jax.distributed import constrain, host_memory_kind, partition_spec, replicated
from switch_jax.model import (
    Batch,
    MeshJit,
    RouterStatsByStack,
    ShardedModel,
    collect_router_stats,
    loss_denominators,
    loss_terms,
    router_metrics,
    stack_and_sublayer,
    token_losses,
)
from switch_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    opt_state_axes,
    trained_parameters,
)
from switch_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class TrainProgram:
    """Initialisation, train step and evaluation step of a config on a mesh.

    Args:
      config: of the run.
      mesh: as from `make_mesh`.
      teacher: config of the teacher; needed where `config` distils one.

    Attributes:
      sharded: the model on the mesh; evaluation needs no more than that.
      teacher: the teacher's model on the same mesh, or None.
      abstract_state: shapes, dtypes and shardings of a `TrainState`.
      state_sharding: the shardings alone.
      abstract_batch: those of the features of a global batch.
      abstract_teacher: those of the teacher's parameters; empty without a teacher.
      init: jitted `() → TrainState`.
      train_step: jitted `(state, batch, teacher's parameters) → (state, metrics, load)`.
    """

    def __init__(self, config: Config, mesh: Mesh, teacher: Config | None = None):
        self.config = config
        self.mesh = mesh
        self.sharded = ShardedModel(config, mesh)
        self.teacher = None if teacher is None else ShardedModel(teacher, mesh)
        self.abstract_teacher = {} if self.teacher is None else self.teacher.abstract_params
        self.abstract_batch = self.sharded.abstract_batch
        self._optimizer = make_optimizer(config, self.sharded.metadata)
        self._trained = trained_parameters(config, self.sharded.metadata)
        self._schedule = learning_rate_schedule(config.optimizer, config.train)
        self.abstract_state = self._abstract_state()
        self.state_sharding = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.init = MeshJit(mesh, self._init, out_shardings=self.state_sharding)
        self.train_step = MeshJit(
            mesh,
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.state_sharding, replicated(mesh), replicated(mesh)),
        )

    def _abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the state."""
        shapes, fsdp = jax.eval_shape(self._init), self.config.mesh.fsdp
        of_optimizer = opt_state_axes(self._optimizer, shapes.params, self.sharded.axes)
        axes = TrainState((), (None,), self.sharded.axes, of_optimizer)
        shardings = jax.tree.map(
            lambda leaf, names: NamedSharding(self.mesh, partition_spec(names, fsdp=fsdp)),
            shapes,
            axes,
        )
        # Where the optimizer's state is computed with, wherever it is kept.
        self._opt_state_on_device = shardings.opt_state
        if self.config.optimizer.memory == "host":
            host = host_memory_kind(self.mesh)
            kept = jax.tree.map(lambda s: s.with_memory_kind(host), shardings.opt_state)
            shardings = dataclasses.replace(shardings, opt_state=kept)
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        )

    def _init(self) -> TrainState:
        """Returns a fresh state; it depends on `train.seed` and not on the mesh."""
        params = self.sharded.init_params()
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
        assert config.distilled == (self.teacher is not None), "a TrainProgram without its teacher"
        totals = loss_denominators(batch, config)
        soft_weight = jnp.where(
            state.step < config.distill.start_step, 0.0, config.distill.soft_weight
        )
        keys = self._row_keys(state.step, batch)

        trained = {n: p for n, p in state.params.items() if n in self._trained}

        def loss(trained, microbatch, keys):
            model = self.sharded.model(state.params | trained)
            decoded, routes = model.route(
                microbatch,
                capacity_factor=config.moe.capacity_factor,
                keys=keys,
                batch_size=config.data.batch_size,
            )
            sums = token_losses(
                *model.logit_factors(decoded),
                microbatch,
                self._teacher_factors(teacher or {}, microbatch),
                config.distill.temperature,
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
            opt_state = jax.device_put(opt_state, self._opt_state_on_device)
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

    def _teacher_factors(
        self, params: Mapping[str, jax.Array], microbatch: Batch
    ) -> tuple[jax.Array, jax.Array] | None:
        """Returns states [B, T, D] and head [D, V] whose product the teacher's logits are.

        The teacher runs without noise, at its training capacity; None without a teacher.
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

    def _balanced(
        self, params: Mapping[str, jax.Array], stats: RouterStatsByStack
    ) -> dict[str, jax.Array]:
        """`params` with routers' biases a step towards balance: up where an expert had less
        than its share of the batch, down where it had more (Wang et al. 2024).
        """
        rate, moved = self.config.moe.balance_bias_rate, dict(params)
        for name, metadata in self.sharded.metadata.items():
            if metadata.kind == "router_bias":
                load_xE = stats[stack_and_sublayer(name)].load_E
                moved[name] += rate * jnp.sign(load_xE.mean(-1, keepdims=True) - load_xE)
        return moved

    def _row_keys(self, step: jax.Array, batch: Batch) -> jax.Array | None:
        """A key per global row [B], or None where the config has no noise."""
        config = self.config
        if not (config.model.dropout_rate or (config.sparse and config.moe.uses_random_numbers)):
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
