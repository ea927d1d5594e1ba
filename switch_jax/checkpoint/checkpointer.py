"""Checkpointer: parameters, optimizer state and data position, written by Orbax in the background.

checkpoints/STEP/params      dict path → array, all that `load` needs
checkpoints/STEP/optimizer   the rest of the training state: steps, tokens, optimizer
checkpoints/STEP/data        position of the last batch consumed
checkpoints/STEP/metrics     the metrics by which the best checkpoint is kept
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.distributed import all_gather_int, raise_if_any_failed
from switch_jax.errors import UserError

_NONE = -1  # in place of a step


class DataPosition(Protocol):
    """An object that writes its position to a folder and reads it back."""

    def save(self, folder: Path) -> None:
        """Writes the position."""

    def restore(self, folder: Path) -> None:
        """Moves to the position in a folder."""


class _PositionHandler(ocp.CheckpointHandler):
    """Saves a position before `Checkpointer.save` returns, since the position moves on after it."""

    def save(self, directory, args):
        args.item.save(Path(directory))

    def restore(self, directory, args):
        args.item.restore(Path(directory))


@ocp.args.register_with_handler(_PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _PositionArgs(ocp.args.CheckpointArgs):
    item: DataPosition


class Checkpointer:
    """The checkpoints of a WORKDIR; the newest `keep` stay.

    Args:
      goodness: of metrics given to `save`; the checkpoint where it is highest stays too.
    """

    def __init__(
        self,
        workdir: Workdir,
        keep: int,
        goodness: Callable[[Mapping[str, float]], float] | None = None,
    ):
        self._folder = workdir.checkpoints.absolute()
        self._goodness = goodness
        kept: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if goodness is not None:
            best = preservation_policy.BestN(
                get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=goodness,  # without it, Orbax writes no metrics
            enable_async_checkpointing=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        # Each process reads by itself: one that cannot must not leave the others waiting in Orbax.
        me = jax.process_index()
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader-{me}"
            ),
        )

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        rest: Mapping[str, Any],
        position: DataPosition,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint in the background.

        Args:
          params: parameters by path.
          rest: the rest of the training state.
          position: of the data; its position at the time of the call is saved.
          metrics: of an evaluation of these parameters.
        """
        items = {
            "params": ocp.args.StandardSave(dict(params)),
            "optimizer": ocp.args.StandardSave(dict(rest)),
            "data": _PositionArgs(position),
        }
        given = dict(metrics or {}) if self._goodness else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=given)

    def best(self) -> tuple[int, dict[str, float]] | None:
        """Step and metrics of the best checkpoint; None where none is known to be."""
        goodness = self._goodness
        if goodness is None:
            return None
        self._manager.wait_until_finished()
        saved = ((step, self._manager.metrics(step)) for step in self._manager.all_steps())
        rated = [(goodness(metrics), step, metrics) for step, metrics in saved if metrics]
        good = [one for one in rated if one[0] > -math.inf]
        return max(good, key=lambda one: one[:2])[1:] if good else None

    def restore(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], position: DataPosition
    ) -> tuple[dict[str, jax.Array], dict[str, Any]] | None:
        """Returns parameters and the rest of the state from the newest good checkpoint.

        A checkpoint may come from another mesh and another number of processes. One that any
        process cannot read is renamed to `corrupt-STEP` and the one before it is used.

        Args:
          params: shapes and shardings of the parameters, by path.
          rest: shapes and shardings of the rest of the state.
          position: of the data; it is moved to the position in the checkpoint.

        Returns None where there is no checkpoint. Raises `UserError` where no checkpoint can be
        read.
        """
        unreadable: list[int] = []
        reason = "by another process"
        steps = sorted(self._manager.all_steps())
        # What process 0 sees counts; another may not see the folder at all.
        while (step := all_gather_int(steps.pop() if steps else _NONE)[0]) != _NONE:
            restored, refusal, failed = None, None, False
            try:
                restored = self._restore_step(step, params, rest, position)
            except UserError as error:
                refusal = error
            except Exception as error:  # whatever Orbax says of a damaged file
                reason = str(error).strip().split("\n")[0][:200]
                print(f"Checkpoint {step} cannot be read: {reason}", file=sys.stderr)
                failed = True
            raise_if_any_failed(refusal)
            if any(all_gather_int(failed)):
                unreadable.append(step)
                continue
            # Only now: where none can be read, the files may not be what is wrong.
            if unreadable and jax.process_index() == 0:
                for bad in unreadable:
                    (self._folder / str(bad)).rename(self._folder / f"corrupt-{bad}")
            all_gather_int(0)  # they are renamed before any process looks again
            self._manager.reload()
            return restored
        if unreadable:
            raise UserError(
                f"No checkpoint in {self._folder} can be read ({reason}); set the config back to"
                " what they were made with, or use another --workdir."
            )
        return None

    def _restore_step(
        self, step: int, params: Mapping[str, Any], rest: Mapping[str, Any], position: DataPosition
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        if not (self._folder / str(step) / "optimizer").exists():
            raise UserError(
                f"Checkpoint {self._folder / str(step)} has parameters alone, as `switch-jax"
                " convert` writes them; to train from it, name its folder as init_from and use"
                " another --workdir."
            )
        items = {
            "params": ocp.args.StandardRestore(dict(params)),
            "optimizer": ocp.args.StandardRestore(dict(rest)),
            "data": _PositionArgs(position),
        }
        restored = self._reader.restore(self._folder / str(step), args=ocp.args.Composite(**items))
        return restored["params"], restored["optimizer"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._reader.close()


def find_checkpoint(path: str | Path) -> tuple[Workdir, Path]:
    """WORKDIR and checkpoint folder of a path that is either; a WORKDIR means its newest.

    Raises `UserError` where there is no checkpoint.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a WORKDIR or one of its checkpoints.")
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return Workdir(path.parent.parent), path
    workdir = Workdir(path)
    workdir.config()
    folders = workdir.checkpoints.iterdir() if workdir.checkpoints.exists() else []
    steps = [int(folder.name) for folder in folders if folder.name.isdigit()]
    if not steps:
        raise UserError(f"{path} has no checkpoint yet; train it first.")
    return workdir, workdir.checkpoints / str(max(steps))


def find_checkpoint_together(path: str | Path) -> tuple[Workdir, Path]:
    """As `find`; of several processes, the choice of process 0 holds. All must call it."""
    workdir, folder = find_checkpoint(path)
    return workdir, folder.with_name(str(all_gather_int(int(folder.name))[0]))


def parameter_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's parameters, by path; raises `UserError`."""
    with _readable(checkpoint):
        stored = _stored(checkpoint / "params")
        return {name: tuple(array.shape) for name, array in stored.items()}


def _stored(folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of the arrays in a folder, as the tree that they are."""
    # Not from a Checkpointer: it warns of a file that its manager would have written.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(epath.Path(folder.absolute())).tree
    finally:
        handler.close()


def restore_params(
    checkpoint: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Those parameters that `abstract` names, with its shapes and shardings; raises `UserError`."""
    arguments = ocp.checkpoint_utils.construct_restore_args(dict(abstract))
    wanted = ocp.args.PyTreeRestore(dict(abstract), restore_args=arguments, partial_restore=True)
    with _readable(checkpoint), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(checkpoint.absolute() / "params", args=wanted)


def restore_opt_state(checkpoint: Path, abstract: Any) -> Any:
    """The optimizer's state, sharded as `abstract`; raises `UserError` where shapes differ."""
    folder, wanted = checkpoint.absolute() / "optimizer", {"opt_state": abstract}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
    with _readable(checkpoint), ocp.PyTreeCheckpointer() as reader:
        stored = ocp.tree.to_flat_dict(_stored(folder))
        shapes = {path: tuple(array.shape) for path, array in stored.items()}
        for path, array in ocp.tree.to_flat_dict(wanted).items():
            if shapes.get(path) != array.shape:  # Orbax would cut or pad it
                raise ValueError(f"{'/'.join(path)} is {shapes.get(path)}, not {array.shape}")
        return reader.restore(folder, args=restore)["opt_state"]


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"Checkpoint {checkpoint} cannot be read ({reason}); take another one."
        ) from error
