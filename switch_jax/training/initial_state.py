"""Initial state of training: fresh, or with parameters transferred from another model."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from switch_jax.checkpoint import (
    VOCABULARY_AXES,
    PretrainedModel,
    Shape,
    Shapes,
    Transfer,
    check_parameters_finite,
    check_special_ids,
    find_pretrained,
    model_differences,
    parameter_origins,
    plan_transfer,
    render_transfer,
)
from switch_jax.config import Config
from switch_jax.data import open_vocabulary, parse_vocabulary
from switch_jax.errors import UserError
from switch_jax.model import (
    LayerSlice,
    abstract_model,
    init_adapters,
    layer_shapes,
    named_parameters,
    parameter_metadata,
)
from switch_jax.training.optimizer import is_schedule_state
from switch_jax.training.state import TrainState
from switch_jax.training.step import TrainProgram


class VocabularyGrowth(NamedTuple):
    """Ids of a vocabulary that has grown: pieces keep their ids, sentinels may have others.

    The pieces and sentinels of the old vocabulary, in the same order in both tuples.
    """

    old_ids: tuple[int, ...]
    new_ids: tuple[int, ...]


def make_initial_state(program: TrainProgram) -> TrainState:
    """Returns a fresh state, with parameters of the model `init_from` if the config names one.

    Steps are counted from 0. With `init_optimizer=loaded` the optimizer's statistics come from the
    checkpoint, too. All processes must call it.

    Raises `UserError` where there is no such model, or its parameters, vocabulary or optimizer do
    not fit.
    """
    state, config = program.init(), program.config
    if config.init_from is None:
        return state
    source = find_pretrained(config.init_from, together=True)
    growth = _vocabulary_growth(source, config)
    params = dict(state.params)
    origins = parameter_origins(_shapes(params), config, source.shapes, source.config)
    abstract = {}
    for name, slices in origins.items():
        for source_name in {origin.name for origin in slices.values()}:
            shape = source.shapes[source_name]
            sharding = _source_sharding(params[name], shape)
            abstract[source_name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    restored = source.restore(abstract)
    for name, slices in origins.items():
        params[name] = _fill(params[name], slices, restored, growth)
    state = dataclasses.replace(state, params=params)
    if config.init_optimizer == "loaded":
        opt_state = _restore_optimizer(source, program, state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
    return program.complete_state(dataclasses.replace(state, rms={}))


def initial_state_report(config: Config) -> str:
    """Returns a table of the parameters that `init_from` gives, below notes for the user.

    Needs no accelerator and no data. Raises `UserError` where the model or its vocabulary does not
    fit.
    """
    source = find_pretrained(config.init_from or "")
    transfer, shapes = _checked_transfer(source, config)
    table = render_transfer(transfer, *shapes)
    return "\n".join([*source.notes, *model_differences(source.config, config), table])


def initial_state_notes(config: Config) -> str:
    """Returns what the user must know of `init_from` before training, a line for each fact.

    Differences of the models, parameters that are initialised, and parameters that are left out.
    Raises `UserError` as `initial_state_report` does.
    """
    source = find_pretrained(config.init_from or "")
    transfer, shapes = _checked_transfer(source, config)
    table = render_transfer(transfer._replace(loaded={}), *shapes).splitlines()[:-1]
    return "\n".join([*source.notes, *model_differences(source.config, config), *table])


def _checked_transfer(
    source: PretrainedModel, config: Config
) -> tuple[Transfer, tuple[Shapes, Shapes]]:
    """Returns what a model loads from another; and the shapes of both by layer.

    Raises `UserError` where the model, its special tokens or its vocabulary do not fit.
    """
    model = abstract_model(config)
    params = jax.eval_shape(
        lambda params: init_adapters(params, parameter_metadata(model), config),
        named_parameters(model),
    )
    shapes = layer_shapes(_shapes(params), config), layer_shapes(source.shapes, source.config)
    transfer = plan_transfer(*shapes, config.init_rules)
    if "embedding" in transfer.loaded:
        check_special_ids(source.config, config)
    _vocabulary_growth(source, config)
    return transfer, shapes


def _vocabulary_growth(source: PretrainedModel, config: Config) -> VocabularyGrowth | None:
    """Compares the vocabularies of the source and of a config; returns None where they are equal.

    Raises `UserError` where a piece has another id in the config's vocabulary.
    """
    if source.vocabulary is None or config.data.reader == "synthetic":
        return None
    size = source.config.model.vocab_size
    old = parse_vocabulary("init_from", source.vocabulary, max_size=size)
    new = open_vocabulary(config)
    if old.fingerprint == new.fingerprint:
        return None
    sentinels = set(old.sentinels)
    pieces = tuple(token for token in range(old.size) if token not in sentinels)
    if (
        new.size < old.size
        or len(new.sentinels) < len(old.sentinels)
        or any(old.piece(token) != new.piece(token) for token in pieces)
    ):
        raise UserError(
            f"The vocabulary {new.name!r} is another than that of init_from={config.init_from}; set"
            " data.vocabulary to that one, or to one that only adds pieces behind its own."
        )
    return VocabularyGrowth(pieces + old.sentinels, pieces + new.sentinels[: len(old.sentinels)])


def _restore_optimizer(source: PretrainedModel, program: TrainProgram, fresh: Any) -> Any:
    """Returns the optimizer's state in a checkpoint, with the schedule's step count of `fresh`.

    Raises `UserError` where the checkpoint has no optimizer, or another one.
    """
    path = program.config.init_from
    if source.restore_optimizer is None:
        raise UserError(f"{path} has no optimizer of ours; set init_optimizer=fresh.")
    try:
        loaded = source.restore_optimizer(program.abstract_state.opt_state)
    except UserError as error:
        raise UserError(
            f"The optimizer of {path} does not fit: other parameters are trained here, or by"
            " another optimizer; set init_optimizer=fresh."
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    named = {f"optimizer state {jax.tree_util.keystr(at)}": leaf for at, leaf in leaves}
    check_parameters_finite(named, path, together=True)

    return jax.tree.map(
        lambda old, new: new if is_schedule_state(new) else old,
        loaded,
        fresh,
        is_leaf=is_schedule_state,
    )


def _shapes(parameters: Mapping[str, Any]) -> Shapes:
    return {name: tuple(array.shape) for name, array in parameters.items()}


def _source_sharding(fresh: jax.Array, shape: Shape) -> NamedSharding:
    """Returns the sharding for a source array of `shape`: that of `fresh`, which it fills.

    Dimensions of another size than in `fresh` are not split.
    """
    assert isinstance(fresh.sharding, NamedSharding)
    sizes, axes = list(fresh.shape), list(fresh.sharding.spec)
    axes += [None] * (len(sizes) - len(axes))
    if len(shape) < len(sizes):  # dense weights for experts: no expert dimension
        del sizes[1], axes[1]
    spec = (axis if size == old else None for axis, size, old in zip(axes, sizes, shape))
    return NamedSharding(fresh.sharding.mesh, PartitionSpec(*spec))


def _fill(
    fresh: jax.Array,
    slices: Mapping[int | None, LayerSlice],
    restored: Mapping[str, jax.Array],
    growth: VocabularyGrowth | None,
) -> jax.Array:
    """Returns `fresh` with source parameters in its blocks, with the sharding of `fresh`.

    Args:
      fresh: a parameter of a fresh state.
      slices: origin of each block of the parameter; key None: of the whole parameter.
      restored: parameters of the source, by path.
      growth: of the vocabulary; None where it is the same.
    """
    name = next(iter(slices.values())).name
    old = restored[name]
    if growth is not None and name in VOCABULARY_AXES:
        move = partial(_move_ids, axis=VOCABULARY_AXES[name], growth=growth)
        return jax.jit(move, out_shardings=fresh.sharding)(fresh, old)
    in_order = all(origin == LayerSlice(name, block) for block, origin in slices.items())
    complete = None in slices or len(slices) == len(fresh)
    if in_order and complete and (fresh.shape, fresh.sharding) == (old.shape, old.sharding):
        return old

    def fill(fresh, restored):
        for block, origin in slices.items():
            old = restored[origin.name]
            if origin.block is not None:
                old = old[origin.block]
            if block is None:
                fresh = _overwrite(fresh, old)
            else:
                fresh = fresh.at[block].set(_overwrite(fresh[block], old))
        return fresh

    needed = {origin.name: restored[origin.name] for origin in slices.values()}
    return jax.jit(fill, donate_argnums=0, out_shardings=fresh.sharding)(fresh, needed)


def _move_ids(fresh: jax.Array, old: jax.Array, axis: int, growth: VocabularyGrowth) -> jax.Array:
    """Returns `fresh` with the rows of `old` at the new ids of its pieces and sentinels.

    `axis` is the vocabulary's dimension in both arrays.
    """
    rows = jnp.take(old, np.array(growth.old_ids), axis=axis)
    index = (slice(None),) * axis + (np.array(growth.new_ids),)
    return fresh.at[index].set(rows)


def _overwrite(fresh: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `fresh` with `old` at its first indices, or for every expert if `old` has none."""
    if old.ndim < fresh.ndim:
        return jnp.broadcast_to(old, fresh.shape)
    return jax.lax.dynamic_update_slice(fresh, old, [0] * fresh.ndim)
