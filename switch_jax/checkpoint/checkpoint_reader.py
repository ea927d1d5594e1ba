"""Reading of checkpoints: finds them by a path, and restores parameters or optimizer state."""

import gc
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from switch_jax.checkpoint.checksums import arrays_crc32, check_arrays, read_record
from switch_jax.checkpoint.workdir import Workdir, is_step
from switch_jax.distributed import all_gather_int, fail_together
from switch_jax.errors import UserError
from switch_jax.files import (
    absolute_path,
    as_path,
    check_expansion,
    folder_bytes,
    folder_size,
    is_bucket,
    plain_path,
)


def own_reader(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
    """Returns a reader without Orbax's barriers.

    With them, where one process fails to read, the other processes would wait for it.
    """
    process = jax.process_index()
    return ocp.Checkpointer(
        handler,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"reader-{process}",
        ),
    )


def find_checkpoint(path: str | Path) -> tuple[Workdir, Path]:
    """Returns the WORKDIR and the checkpoint folder of a path.

    Args:
      path: a checkpoint folder, or a WORKDIR, whose newest checkpoint is returned.

    Raises `UserError` where there is no checkpoint.
    """
    path = absolute_path(as_path(path))
    if not path.exists():
        raise UserError(f"{path} does not exist; name a WORKDIR or one of its checkpoints.")
    is_run = (path / "config.json").exists()  # a WORKDIR may be called checkpoints/7
    if path.parent.name == "checkpoints" and is_step(path.name) and not is_run:
        workdir = Workdir(path.parent.parent)
        return workdir, workdir.open_checkpoint(int(path.name))
    workdir = Workdir(path)
    workdir.config()
    steps = workdir.steps()
    if not steps:
        raise UserError(f"{path} has no checkpoint yet; train it first.")
    return workdir, workdir.open_checkpoint(steps[-1])


def find_checkpoint_together(path: str | Path) -> tuple[Workdir, Path]:
    """Returns the same as `find_checkpoint`, with the step found by process 0.

    All processes must call it.
    """
    workdir, folder = find_checkpoint(path)
    return workdir, workdir.open_checkpoint(all_gather_int(int(folder.name))[0])


def checkpoint_identity(checkpoint: Path) -> dict[str, Any]:
    """Returns JSON values that differ between checkpoints: the path, and a sum of the checksums.

    Raises `UserError` where the checksums cannot be read.
    """
    with _reading(checkpoint):
        crc32 = arrays_crc32(read_record(checkpoint))
    path = checkpoint if is_bucket(checkpoint) else checkpoint.resolve()
    return {"checkpoint": os.fspath(path), "checkpoint_crc32": crc32}


def parameter_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's parameters, by path.

    Raises `UserError` where the checkpoint cannot be read.
    """
    with _reading(checkpoint) as stored_bytes:
        stored = array_metadata(checkpoint / "params")
        shapes = {name: tuple(array.shape) for name, array in stored.items()}
        check_expansion(
            f"The parameters in {checkpoint}",
            sum(
                math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in stored.values()
            ),
            stored_bytes,
        )
        return shapes


def array_metadata(folder: Path) -> dict[str, Any]:
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
        stored = ocp.tree.to_flat_dict(array_metadata(checkpoint / "optimizer"))
        shapes = {path: tuple(array.shape) for path, array in stored.items()}
        for path, array in ocp.tree.to_flat_dict(tree).items():
            if shapes.get(path) != array.shape:  # Orbax would truncate or pad it
                raise ValueError(f"{'/'.join(path)} is {shapes.get(path)}, not {array.shape}")
    return _partial_restore(checkpoint, "optimizer", tree)["opt_state"]


def _partial_restore(checkpoint: Path, item: str, abstract: dict[str, Any]) -> dict[str, Any]:
    """Returns those arrays of a checkpoint's item that are in `abstract`, with right checksums.

    All processes must call it where an array is divided among them.
    """
    divided = any(not array.sharding.is_fully_addressable for array in jax.tree.leaves(abstract))
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with fail_together() if divided else nullcontext(), _reading(checkpoint):
        record = read_record(checkpoint)
        with own_reader(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(plain_path(checkpoint) / item, args=args)
    with _reading(checkpoint):
        check_arrays({item: restored}, record)
    return restored


@contextmanager
def _reading(checkpoint: Path) -> Iterator[int]:
    """Yields the bytes of a checkpoint's files.

    Raises `UserError` for a link in it that leads out of it, and in place of the errors of a
    checkpoint that cannot be read.
    """
    try:
        with abandoning_reads():
            yield (folder_bytes if is_bucket(checkpoint) else folder_size)(checkpoint)
    except UserError:
        raise
    except Exception as error:  # Orbax raises many types for damaged files
        raise UserError(
            f"Checkpoint {checkpoint} cannot be read ({reason(error)}); take another one."
        ) from error


@contextmanager
def abandoning_reads() -> Iterator[None]:
    """Context manager that drops the errors of reads that Orbax abandons after a first error.

    Python would print a traceback of each when it collects them.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        hook = _ignoring_closed_loops(hook)
        raise
    finally:
        sys.unraisablehook = hook


def _ignoring_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Returns a hook without the errors of abandoned reads that end after Orbax's event loop."""
    return lambda error: str(error.exc_value) == "Event loop is closed" or hook(error)


def reason(error: BaseException) -> str:
    """Returns the first line of the error that led to an error of Orbax."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200]
