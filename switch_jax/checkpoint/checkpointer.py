"""Checkpointer: parameters, optimizer state and data position, written by Orbax in the background.

checkpoints/STEP/params      dict path → array; `load` reads nothing else
checkpoints/STEP/optimizer   the rest of the training state: steps, tokens, optimizer
checkpoints/STEP/data        position of the last batch consumed
checkpoints/STEP/metrics     evaluation metrics, by which the best checkpoint is kept
checkpoints/STEP/checksums   checksums of the arrays, and a copy of the metrics
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from switch_jax.checkpoint.checkpoint_reader import (
    abandoning_reads,
    array_metadata,
    own_reader,
    reason,
)
from switch_jax.checkpoint.checksums import (
    RECORD_ITEM,
    arrays_crc32,
    check_arrays,
    make_record,
    read_record,
)
from switch_jax.checkpoint.data_position import DataPosition, PositionArgs
from switch_jax.checkpoint.finite import check_parameters_finite
from switch_jax.checkpoint.saver_failures import watch_saver
from switch_jax.checkpoint.workdir import Workdir, step_numbers
from switch_jax.distributed import all_gather_int, barrier, raise_if_any_failed
from switch_jax.errors import UserError
from switch_jax.files import absolute_path, plain_path, write_atomically

_NO_STEP = -1


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
        self._folder = absolute_path(workdir.checkpoints)
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
            cleanup_tmp_directories=True,
        )
        watch_saver()
        if jax.process_index() == 0:
            _repair_metrics(self._folder)
        barrier()  # every process reads the metrics now
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(plain_path(self._folder), options=options)
        self._reader = own_reader(ocp.CompositeCheckpointHandler())

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
        saved_metrics = dict(metrics or {}) if self._sort_key else None
        record = make_record({"params": dict(params), "optimizer": dict(rest)}, saved_metrics)
        items = {
            "params": ocp.args.StandardSave(dict(params)),
            "optimizer": ocp.args.StandardSave(dict(rest)),
            "data": PositionArgs(position, arrays_crc32(record)),
            RECORD_ITEM: ocp.args.JsonSave(record),
        }
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
          rest: shapes and shardings of the rest of the state, by name; a name that a checkpoint of
            an older version does not have is left out of the result.
          position: data position; it is set to the position in the checkpoint.

        Returns None where there is no checkpoint. Raises `UserError` where no checkpoint can be
        read.
        """
        unreadable: list[int] = []
        cause = "by another process"
        steps = step_numbers(self._folder)
        # The list of process 0 is used: another process may not see the folder at all.
        while (step := all_gather_int(steps.pop() if steps else _NO_STEP)[0]) != _NO_STEP:
            user_error, failure = None, None
            try:
                with abandoning_reads():
                    record = read_record(self._folder / str(step))
                    restored = self._restore_step(step, params, rest, position, record)
            except UserError as error:
                user_error = error
            except Exception as error:  # Orbax raises many types for damaged files
                failure = error
            raise_if_any_failed(user_error)
            failed = any(all_gather_int(failure is not None))
            if not failed:  # all processes have their parts of the arrays, and sum them together
                try:
                    check_arrays(dict(zip(("params", "optimizer"), restored)), record)
                    if record is None:  # of an older version, which saved what was not finite, too
                        check_parameters_finite(restored[0], "it", together=True)
                except (ValueError, UserError) as error:
                    failed, failure = True, error
            if failure is not None:
                cause = reason(failure)
                print(f"Checkpoint {step} cannot be read: {cause}", file=sys.stderr)
            if failed:
                unreadable.append(step)
                continue
            # Renamed only after one could be read: where none can, the files may not be the cause.
            if unreadable and jax.process_index() == 0:
                for corrupt in unreadable:
                    _set_aside(self._folder / str(corrupt))
            all_gather_int(0)  # no process lists the folder again before the renaming is done
            self._manager.reload()
            return restored
        if unreadable:
            raise UserError(
                f"No checkpoint in {self._folder} can be read ({cause}); set the config back to"
                " what they were made with, or use another --workdir."
            )
        return None

    def _restore_step(
        self,
        step: int,
        params: Mapping[str, Any],
        rest: Mapping[str, Any],
        position: DataPosition,
        record: Mapping[str, Any] | None,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        folder = self._folder / str(step)
        items_saved = {path.name for path in folder.iterdir()}
        if "params" in items_saved and not items_saved & {"optimizer", "data"}:
            raise UserError(
                f"Checkpoint {folder} has parameters alone, as `switch-jax"
                " convert` writes them; to train from it, name its folder as init_from and use"
                " another --workdir."
            )
        stored = array_metadata(folder / "optimizer")
        items = {
            "params": ocp.args.StandardRestore(dict(params)),
            "optimizer": ocp.args.StandardRestore({n: rest[n] for n in rest if n in stored}),
            "data": PositionArgs(position, arrays_crc32(record)),
        }
        folder = plain_path(self._folder) / str(step)
        restored = self._reader.restore(folder, args=ocp.args.Composite(**items))
        return restored["params"], restored["optimizer"]

    def close(self) -> None:
        """Waits until all checkpoints are written, and closes the readers and writers."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._reader.close()


def _set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint to `corrupt-STEP`, or `corrupt-STEP-2` and so on."""
    names = itertools.chain(
        [f"corrupt-{checkpoint.name}"],
        (f"corrupt-{checkpoint.name}-{number}" for number in itertools.count(2)),
    )
    target = next(path for name in names if not (path := checkpoint.with_name(name)).exists())
    checkpoint.rename(target)


def _repair_metrics(checkpoints: Path) -> None:
    """Writes damaged metrics of checkpoints again from their records, or removes them.

    Orbax reads all metrics before any checkpoint.
    """
    for step in step_numbers(checkpoints):
        file = checkpoints / str(step) / "metrics" / "metrics"
        try:
            metrics = json.loads(file.read_bytes()) if file.is_file() else None
        except ValueError:
            metrics = None
        try:
            record = read_record(checkpoints / str(step))
        except (OSError, ValueError):
            record = None  # the checkpoint is set aside when it is read
        right = metrics if record is None else record["metrics"]
        if not isinstance(right, dict):
            file.unlink(missing_ok=True)
        elif right != metrics:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, json.dumps(right).encode())
