"""What training starts from: fresh parameters, or those that `transfer.py` takes from a model."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from switch_jax.checkpoint import (
    VOCABULARY_AXES,
    PretrainedModel,
    Shape,
    Shapes,
    find_pretrained,
    parameter_origins,
    transfer_report,
)
from switch_jax.config import Config
from switch_jax.data import NUM_SENTINELS, open_vocabulary, parse_vocabulary
from switch_jax.errors import UserError
from switch_jax.model import (
    LayerSlice,
    SwitchTransformer,
    init_adapters,
    named_parameters,
    parameter_metadata,
)
from switch_jax.training.state import TrainState
from switch_jax.training.step import TrainProgram


def make_initial_state(program: TrainProgram) -> TrainState:
    """A fresh state, with parameters of `init_from` where the config names it.

    Steps are counted from 0 and, with `init_optimizer` fresh, the optimizer begins anew too. All
    processes must call it. Raises `UserError` as `transfer.plan` does, and where the optimizer of
    the checkpoint is another.
    """
    state, config = program.init(), program.config
    if config.init_from is None:
        return state
    source = find_pretrained(config.init_from, together=True)
    source.say_notes()
    ids = _moved_ids(source, config)
    params = dict(state.params)
    origins = parameter_origins(_shapes(params), config, source.shapes, source.config)
    abstract = {}
    for name, slices in origins.items():
        for theirs in {part.name for part in slices.values()}:
            shape = source.shapes[theirs]
            where = _alike(params[name], shape)
            abstract[theirs] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    restored = source.restore(abstract)
    for name, slices in origins.items():
        params[name] = _filled(params[name], slices, restored, ids)
    state = dataclasses.replace(state, params=params)
    if config.init_optimizer == "loaded":
        opt_state = _optimizer_of(source, program, state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
    return state


def _optimizer_of(source: PretrainedModel, program: TrainProgram, fresh: Any) -> Any:
    """The optimizer's statistics in a checkpoint, with a schedule that begins anew."""
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

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda old, new: new if is_schedule(new) else old, loaded, fresh, is_leaf=is_schedule
    )


def initial_state_report(config: Config) -> str:
    """What training would begin with, without an accelerator or data; raises `UserError`."""
    source = find_pretrained(config.init_from or "")
    _moved_ids(source, config)
    model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    params = jax.eval_shape(
        lambda params: init_adapters(params, parameter_metadata(model), config),
        named_parameters(model),
    )
    table = transfer_report(_shapes(params), config, source.shapes, source.config)
    return "\n".join([*source.notes, table])


class MovedIds(NamedTuple):
    """Ids of a vocabulary that has grown: pieces stay in front, sentinels at the end."""

    pieces: int
    old_size: int
    new_size: int


def _moved_ids(source: PretrainedModel, config: Config) -> MovedIds | None:
    """How ids of the source became those of a config; None where they are the same.

    Raises `UserError` where an id means another piece.
    """
    if source.vocabulary is None or config.data.reader == "synthetic":
        return None
    old, new = parse_vocabulary("init_from", source.vocabulary), open_vocabulary(config)
    if old.fingerprint == new.fingerprint:
        return None
    pieces = old.size - NUM_SENTINELS
    grown = new.size >= old.size and all(old.piece(i) == new.piece(i) for i in range(pieces))
    if not grown:
        raise UserError(
            f"The vocabulary {new.name!r} is another than that of init_from={config.init_from}; set"
            " data.vocabulary to that one, or to one that only adds pieces behind its own."
        )
    return MovedIds(pieces, old.size, new.size)


def _shapes(parameters: Mapping[str, Any]) -> Shapes:
    return {name: tuple(array.shape) for name, array in parameters.items()}


def _alike(fresh: jax.Array, shape: Shape) -> NamedSharding:
    """How an array of the source lies on the mesh: as `fresh`, which is made from it."""
    assert isinstance(fresh.sharding, NamedSharding)
    sizes, axes = list(fresh.shape), list(fresh.sharding.spec)
    axes += [None] * (len(sizes) - len(axes))
    if len(shape) < len(sizes):  # dense weights of experts
        del sizes[1], axes[1]
    kept = (axis if size == old else None for axis, size, old in zip(axes, sizes, shape))
    return NamedSharding(fresh.sharding.mesh, PartitionSpec(*kept))


def _filled(
    fresh: jax.Array,
    slices: Mapping[int | None, LayerSlice],
    restored: Mapping[str, jax.Array],
    ids: MovedIds | None,
) -> jax.Array:
    """`fresh` with what its blocks are taken from, sharded as it was."""
    name = next(iter(slices.values())).name
    old = restored[name]
    if ids is not None and name in VOCABULARY_AXES:
        move = partial(_with_ids, axis=VOCABULARY_AXES[name], ids=ids)
        return jax.jit(move, out_shardings=fresh.sharding)(fresh, old)
    same = all(part == LayerSlice(name, block) for block, part in slices.items())
    whole = None in slices or len(slices) == len(fresh)
    if same and whole and (fresh.shape, fresh.sharding) == (old.shape, old.sharding):
        return old

    def fill(fresh, olds):
        for block, part in slices.items():
            old = olds[part.name] if part.block is None else olds[part.name][part.block]
            if block is None:
                fresh = _over(fresh, old)
            else:
                fresh = fresh.at[block].set(_over(fresh[block], old))
        return fresh

    olds = {part.name: restored[part.name] for part in slices.values()}
    return jax.jit(fill, donate_argnums=0, out_shardings=fresh.sharding)(fresh, olds)


def _with_ids(fresh: jax.Array, old: jax.Array, axis: int, ids: MovedIds) -> jax.Array:
    """`fresh` with `old` where its ids are now."""
    pieces, sentinels = (
        jax.lax.slice_in_dim(old, *ends, axis=axis)
        for ends in ((0, ids.pieces), (ids.pieces, ids.old_size))
    )
    fresh = jax.lax.dynamic_update_slice_in_dim(fresh, pieces, 0, axis)
    place = ids.new_size - NUM_SENTINELS
    return jax.lax.dynamic_update_slice_in_dim(fresh, sentinels, place, axis)


def _over(fresh: jax.Array, old: jax.Array) -> jax.Array:
    """`fresh` with `old` in its first places, or in the place of every expert."""
    if old.ndim < fresh.ndim:
        return jnp.broadcast_to(old, fresh.shape)
    return jax.lax.dynamic_update_slice(fresh, old, [0] * fresh.ndim)
