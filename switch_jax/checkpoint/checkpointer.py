"""Checkpointer: parameters, optimizer state and data position, written by Orbax in the background.

checkpoints/STEP/params      dict path → array; `load` reads nothing else
checkpoints/STEP/optimizer   the rest of the training state: steps, tokens, optimizer
checkpoints/STEP/data        position of the last batch consumed
checkpoints/STEP/metrics     evaluation metrics, by which the best checkpoint is kept
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.distributed import all_gather_int, raise_if_any_failed
from switch_jax.errors import UserError
from switch_jax.files import check_expansion, expand_user, folder_size, plain_path

_NO_STEP = -1


class DataPosition(Protocol):
    """An object, such as a batch iterator, with a position that can be saved and restored."""

    def save(self, folder: Path) -> None:
        """Writes the position to a folder."""

    def restore(self, folder: Path) -> None:
        """Sets the position to the one in a folder."""


class _PositionHandler(ocp.CheckpointHandler):
    """Orbax handler of a `DataPosition`.

    It is not asynchronous: the position is written before `Checkpointer.save` returns, because it
    changes afterwards.
    """

    def save(self, directory, args):
        args.item.save(Path(directory))

    def restore(self, directory, args):
        args.item.restore(Path(directory))


@ocp.args.register_with_handler(_PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _PositionArgs(ocp.args.CheckpointArgs):
    item: DataPosition


class Checkpointer:
    """Writes and reads the checkpoints of a WORKDIR.

    Args:
      workdir: the run's folder.
      keep: number of checkpoints to keep, the newest first; older ones are deleted.
      sort_key: function of the metrics given to `save`; the checkpoint with its highest value is
        kept too. None: only the newest are kept.
    """

    def __init__(
        self,
        workdir: Workdir,
        keep: int,
        sort_key: Callable[[Mapping[str, float]], float] | None = None,
    ):
        self._folder = workdir.checkpoints.absolute()
        self._sort_key = sort_key
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if sort_key is not None:
            best = checkpoint_managers.BestN(
                get_metric_fn=sort_key, n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=sort_key,  # without it, Orbax writes no metrics
            enable_async_checkpointing=True,
            create=True,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(plain_path(self._folder), options=options)
        # Each process reads without Orbax's barriers: where one process fails to read, the others
        # would wait in them.
        process = jax.process_index()
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=f"reader-{process}",
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
          step: number of the checkpoint.
          params: parameters by path.
          rest: the rest of the training state, a pytree of arrays by name.
          position: data position; its value at the time of the call is saved.
          metrics: metrics of an evaluation of these parameters; ignored without a `sort_key`.
        """
        items = {
            "params": ocp.args.StandardSave(dict(params)),
            "optimizer": ocp.args.StandardSave(dict(rest)),
            "data": _PositionArgs(position),
        }
        saved_metrics = dict(metrics or {}) if self._sort_key else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=saved_metrics)

    def best(self) -> tuple[int, dict[str, float]] | None:
        """Returns step and metrics of the best checkpoint; None where none has the metric."""
        sort_key = self._sort_key
        if sort_key is None:
            return None
        self._manager.wait_until_finished()
        saved = ((step, self._manager.metrics(step)) for step in self._manager.all_steps())
        ranked = [(sort_key(metrics), step, metrics) for step, metrics in saved if metrics]
        comparable = [entry for entry in ranked if entry[0] > -math.inf]
        return max(comparable, key=lambda entry: entry[:2])[1:] if comparable else None

    def restore(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], position: DataPosition
    ) -> tuple[dict[str, jax.Array], dict[str, Any]] | None:
        """Returns parameters and the rest of the state from the newest readable checkpoint.

        A checkpoint may come from another mesh and another number of processes. A checkpoint that
        any process fails to read is renamed to `corrupt-STEP`, and the one before it is used. All
        processes must call this.

        Args:
          params: shapes and shardings of the parameters, by path.
          rest: shapes and shardings of the rest of the state.
          position: data position; it is set to the position in the checkpoint.

        Returns None where there is no checkpoint. Raises `UserError` where no checkpoint can be
        read.
        """
        unreadable: list[int] = []
        reason = "by another process"
        steps = sorted(self._manager.all_steps())
        # The list of process 0 is used: another process may not see the folder at all.
        while (step := all_gather_int(steps.pop() if steps else _NO_STEP)[0]) != _NO_STEP:
            restored, user_error, failed = None, None, False
            try:
                restored = self._restore_step(step, params, rest, position)
            except UserError as error:
                user_error = error
            except Exception as error:  # Orbax raises many types for damaged files
                reason = _first_line(error)
                print(f"Checkpoint {step} cannot be read: {reason}", file=sys.stderr)
                failed = True
            raise_if_any_failed(user_error)
            if any(all_gather_int(failed)):
                unreadable.append(step)
                continue
            # Renamed only after one could be read: where none can, the files may not be the cause.
            if unreadable and jax.process_index() == 0:
                for corrupt in unreadable:
                    (self._folder / str(corrupt)).rename(self._folder / f"corrupt-{corrupt}")
            all_gather_int(0)  # no process lists the folder again before the renaming is done
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
        folder = plain_path(self._folder) / str(step)
        restored = self._reader.restore(folder, args=ocp.args.Composite(**items))
        return restored["params"], restored["optimizer"]

    def close(self) -> None:
        """Waits until all checkpoints are written, and closes the readers and writers."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._reader.close()


def find_checkpoint(path: str | Path) -> tuple[Workdir, Path]:
    """Returns the WORKDIR and the checkpoint folder of a path.

    Args:
      path: a checkpoint folder, or a WORKDIR, whose newest checkpoint is returned.

    Raises `UserError` where there is no checkpoint.
    """
    path = expand_user(path).absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a WORKDIR or one of its checkpoints.")
    is_run = (path / "config.json").exists()  # a WORKDIR may be called checkpoints/7
    if path.parent.name == "checkpoints" and path.name.isdecimal() and not is_run:
        return Workdir(path.parent.parent), path
    workdir = Workdir(path)
    workdir.config()
    folders = workdir.checkpoints.iterdir() if workdir.checkpoints.exists() else []
    steps = [int(folder.name) for folder in folders if folder.name.isdigit()]
    if not steps:
        raise UserError(f"{path} has no checkpoint yet; train it first.")
    return workdir, workdir.checkpoints / str(max(steps))


def find_checkpoint_together(path: str | Path) -> tuple[Workdir, Path]:
    """Returns the same as `find_checkpoint`, with the step found by process 0.

    All processes must call it.
    """
    workdir, folder = find_checkpoint(path)
    return workdir, folder.with_name(str(all_gather_int(int(folder.name))[0]))


def parameter_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's parameters, by path.

    Raises `UserError` where the checkpoint cannot be read.
    """
    with _reading(checkpoint) as stored_bytes:
        stored = _array_metadata(checkpoint / "params")
        shapes = {name: tuple(array.shape) for name, array in stored.items()}
        check_expansion(
            f"The parameters in {checkpoint}",
            sum(
                math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in stored.values()
            ),
            stored_bytes,
        )
        return shapes


def _array_metadata(folder: Path) -> dict[str, Any]:
    """Returns the pytree in a folder, with shape and dtype in place of each array."""
    # Not from an Orbax Checkpointer, which warns of a file that only its manager writes.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(epath.Path(plain_path(folder))).tree
    finally:
        handler.close()


def restore_params(
    checkpoint: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns the parameters of a checkpoint whose paths are in `abstract`.

    Args:
      checkpoint: folder of the checkpoint.
      abstract: shapes and shardings of the parameters to restore, by path.

    Raises `UserError` where the checkpoint cannot be read.
    """
    return _partial_restore(checkpoint, "params", dict(abstract))


def restore_opt_state(checkpoint: Path, abstract: Any) -> Any:
    """Returns the optimizer state of a checkpoint.

    Args:
      checkpoint: folder of the checkpoint.
      abstract: shapes and shardings of the optimizer state, a pytree.

    Raises `UserError` where shapes differ or the checkpoint cannot be read.
    """
    tree = {"opt_state": abstract}
    with _reading(checkpoint):
        stored = ocp.tree.to_flat_dict(_array_metadata(checkpoint / "optimizer"))
        shapes = {path: tuple(array.shape) for path, array in stored.items()}
        for path, array in ocp.tree.to_flat_dict(tree).items():
            if shapes.get(path) != array.shape:  # Orbax would truncate or pad it
                raise ValueError(f"{'/'.join(path)} is {shapes.get(path)}, not {array.shape}")
    return _partial_restore(checkpoint, "optimizer", tree)["opt_state"]


def _partial_restore(checkpoint: Path, item: str, abstract: dict[str, Any]) -> dict[str, Any]:
    """Returns those arrays of a checkpoint's item that are in `abstract`."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with _reading(checkpoint), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(plain_path(checkpoint) / item, args=args)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[int]:
    """Yields the bytes of a checkpoint's files.

    Raises `UserError` for a link in it that leads out of it, and in place of the errors of a
    checkpoint that cannot be read.
    """
    try:
        yield folder_size(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"Checkpoint {checkpoint} cannot be read ({_first_line(error)}); take another one."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
