"""Start of a run: all that can refuse it comes before anything is written."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import jax

from switch_jax.checkpoint import Checkpointer, Workdir, sort_key
from switch_jax.config import Config, MeshConfig
from switch_jax.data import Batch, BatchIterator, open_batches, open_vocabulary
from switch_jax.distributed import all_gather_int, fail_together, make_mesh
from switch_jax.errors import UserError
from switch_jax.evaluation import (
    TaskScorer,
    ValidationBatches,
    check_metric,
    validation_batches,
)
from switch_jax.model import process_rows
from switch_jax.training.distill import check_distillation, teacher_config, teacher_parameters
from switch_jax.training.initial_state import initial_state_notes, make_initial_state
from switch_jax.training.memory import check_memory
from switch_jax.training.state import TrainState, restore_state
from switch_jax.training.step import TrainProgram
from switch_jax.training.trackers import find_trackers


class StartedRun(NamedTuple):
    """A run whose next step can be computed.

    state: initial state, or that of the newest readable checkpoint.
    first_batch: batch of the next step; None where the run is finished.
    batches: training data behind `first_batch`.
    teacher_params: parameters of the teacher by path; {} without a teacher.
    """

    program: TrainProgram
    state: TrainState
    first_batch: Batch | None
    batches: BatchIterator
    teacher_params: dict[str, jax.Array]
    validation: ValidationBatches
    scorer: TaskScorer
    checkpoints: Checkpointer


@contextmanager
def start_run(config: Config, workdir: Workdir, mesh_sizes: MeshConfig) -> Iterator[StartedRun]:
    """Yields the run in `workdir`, on a mesh of these sizes; all processes must call it.

    The lock of `workdir` is held meanwhile.

    A start that is refused writes nothing: the folder of a new run is made, and config.json is
    written, after everything that can refuse. Raises `UserError` where the config does not fit the
    devices, the data, the models that it names or `workdir`.
    """
    settings = config.train
    first_process = jax.process_index() == 0
    with ExitStack() as held:
        with fail_together():
            workdir.check(config)
            check_distillation(config)
            find_trackers(config)
            if not workdir.has_checkpoints():
                _check_model_is_known(config)
                if config.init_from is not None:
                    notes = initial_state_notes(config)  # before text is packed
                    if first_process and notes:
                        print(notes, file=sys.stderr, flush=True)

            # Mesh, model, data and evaluation
            on_mesh = dataclasses.replace(config, mesh=mesh_sizes)
            teacher = teacher_config(on_mesh)
            mesh = make_mesh(on_mesh, teacher=teacher)
            program, rows = TrainProgram(on_mesh, mesh, teacher), process_rows(mesh)
            check_memory(program)
            batches = open_batches(config, "train", rows)
            validation = validation_batches(config, rows)
            scorer = TaskScorer(program.sharded)
            best_key = None
            if settings.keep_best is not None:
                check_metric(settings.keep_best, validation, scorer.metric_names)
                best_key = functools.partial(sort_key, settings.keep_best)
            vocabulary = None
            if config.data.reader != "synthetic":
                vocabulary = open_vocabulary(config).content
                workdir.check_vocabulary(vocabulary)
        scorer.check_examples_agree()

        # State, position in the data, and first batch
        begun = bool(all_gather_int(workdir.has_checkpoints())[0])
        checkpoints = state = first_batch = None
        if begun:
            with fail_together():
                _lock(workdir, config, held, new=False)
            checkpoints = Checkpointer(workdir, settings.keep_checkpoints, best_key)
            state = restore_state(checkpoints, program.abstract_state, batches)
        state = make_initial_state(program) if state is None else program.complete_state(state)
        finished = checkpoints is not None and int(state.step) >= settings.steps
        teacher_params = {} if finished else teacher_parameters(program)
        with fail_together():
            if first_process:
                _note_changes(workdir, config, finished)
            if not finished:
                first_batch = next(batches)
                if not begun:
                    _lock(workdir, config, held, new=True)
                if first_process:
                    devices = f"{mesh.devices.size} × {mesh.devices.flat[0].device_kind}"
                    workdir.prepare(config, vocabulary, devices)
        if checkpoints is None:
            checkpoints = Checkpointer(workdir, settings.keep_checkpoints, best_key)
        yield StartedRun(
            program,
            state,
            first_batch,
            batches,
            teacher_params,
            validation,
            scorer,
            checkpoints,
        )


def _check_model_is_known(config: Config) -> None:
    """Raises `UserError` for the first start of a run whose model no checkpoint gives."""
    if config.init_model == "checkpoint" and config.init_from is None:
        raise UserError(
            "init_model=checkpoint takes the model of init_from, which is not set; set init_from,"
            " or set init_model=config to train the model of the config from random parameters."
        )


def _note_changes(workdir: Workdir, config: Config, finished: bool) -> None:
    """Prints the values that affect results and differ from those of the last start."""
    if changes := workdir.changes(config, "results"):
        outcome = " This run is finished; they have no effect." if finished else ""
        print(
            f"{workdir.location} was started with other values: {'; '.join(changes)}.{outcome}",
            file=sys.stderr,
            flush=True,
        )


def _lock(workdir: Workdir, config: Config, held: ExitStack, *, new: bool) -> None:
    """Locks `workdir` until `held` is closed, in the first process, and checks it again.

    Another process may have begun a run there since the first check, also where `new` says that
    there was none.
    """
    if jax.process_index() == 0:
        held.enter_context(workdir.lock())
        workdir.check(config)
        if new and workdir.has_checkpoints():
            raise UserError(
                f"Another process has begun a run in {workdir.location}; the same command goes on"
                " from its checkpoint."
            )
