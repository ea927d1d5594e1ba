"""Training loop: prepares a run, trains, logs, evaluates and saves checkpoints."""

import functools
import signal
import sys
from contextlib import ExitStack

import jax

from switch_jax.checkpoint import Checkpointer, MetricsWriter, Workdir
from switch_jax.config import Config
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.distributed import (
    all_gather_int,
    fail_together,
    make_mesh,
    raise_if_any_failed,
    stop_requests,
)
from switch_jax.errors import UserError
from switch_jax.evaluation import (
    TaskScorer,
    check_metric,
    evaluate,
    scores_table,
    sort_key,
    validation_batches,
)
from switch_jax.model import mfu, process_rows
from switch_jax.training.distill import check_distillation, teacher_config, teacher_parameters
from switch_jax.training.finite_guard import FiniteGuard
from switch_jax.training.idle_experts import IdleExperts
from switch_jax.training.initial_state import initial_state_notes, make_initial_state
from switch_jax.training.memory import check_memory
from switch_jax.training.optimizer import schedule_warnings
from switch_jax.training.progress import ProgressDisplay, evaluation_summary, train_status
from switch_jax.training.state import restore_state, save_state
from switch_jax.training.step import TrainProgram
from switch_jax.training.throughput import ThroughputMeter


def train(config: Config, workdir: Workdir) -> signal.Signals | None:
    """Trains to `train.steps`, from the newest readable checkpoint in `workdir` if there is one.

    An interrupted and continued run ends with the same bits as an uninterrupted one, because
    parameters, optimizer, random numbers and data follow from the checkpoint. SIGTERM or SIGINT in
    any process ends the loop after the current step, with a checkpoint.

    Returns the signal that ended the run early; None when the run is finished. Raises `UserError`
    where the config does not fit the devices, the data, the models that it names or `workdir`, and
    `NotFiniteError` where training diverges.
    """
    with ExitStack() as held:
        return _train(config, workdir, held)


def _train(config: Config, workdir: Workdir, held: ExitStack) -> signal.Signals | None:
    """Does the work of `train`; `held` takes the lock of `workdir`."""
    settings = config.train
    first_process = jax.process_index() == 0
    with fail_together():
        workdir.check(config)
        check_distillation(config)
        if config.init_from is not None and not workdir.checkpoints.exists():
            notes = initial_state_notes(config)  # before text is packed
            if first_process and notes:
                print(notes, file=sys.stderr, flush=True)

        # Mesh, model, data and evaluation
        teacher = teacher_config(config)
        mesh = make_mesh(config, teacher=teacher)
        device_kind = mesh.devices.flat[0].device_kind
        program, rows = TrainProgram(config, mesh, teacher), process_rows(mesh)
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

    # State, position in the data, and first batch. A start that is refused writes nothing: a new
    # run's folder is made, and config.json is written, after everything that can refuse.
    begun = bool(all_gather_int(workdir.checkpoints.exists())[0])
    checkpoints = state = None
    if begun:
        with fail_together():
            _lock(workdir, config, held, new=False)
        checkpoints = Checkpointer(workdir, settings.keep_checkpoints, best_key)
        state = restore_state(checkpoints, program.abstract_state, batches)
    if state is None:
        state = make_initial_state(program)
    start_step = int(state.step)
    if checkpoints is not None and start_step >= settings.steps:
        best = checkpoints.best()
        checkpoints.close()
        if first_process:
            print(f"{workdir.path} is finished: step {start_step} of {settings.steps}.")
            _print_results(config, workdir, best, {})
        return None
    teacher_params = teacher_parameters(program)
    with fail_together():
        first_batch = next(batches)
        if not begun:
            _lock(workdir, config, held, new=True)
        if first_process:
            workdir.prepare(config, vocabulary, f"{mesh.devices.size} × {device_kind}")
    if checkpoints is None:
        checkpoints = Checkpointer(workdir, settings.keep_checkpoints, best_key)

    # Steps
    meter = ThroughputMeter(lambda s: mfu(config, s, device_kind, mesh.devices.size, teacher))
    writer = MetricsWriter(workdir, start_step, active=first_process)
    idle_experts = IdleExperts(config)
    display = ProgressDisplay(
        settings.steps, start_step, status="compiling …", active=first_process
    )
    with display, writer, stop_requests() as stop_request:
        if start_step:
            display.print_line(f"continuing from step {start_step}")
        if mesh.devices.size < jax.device_count():
            display.print_line(f"using {mesh.devices.size} of {jax.device_count()} devices")
        for warning in schedule_warnings(config):
            display.print_line(warning)
        batch = program.sharded.shard_batch(first_batch)
        first_step, guard = start_step + 1, FiniteGuard(settings.on_nonfinite)
        for step in range(first_step, settings.steps + 1):
            state, metrics, load = program.train_step(state, batch, teacher_params)
            idle_experts.update(load)
            if step == first_step:
                jax.block_until_ready(state)  # so that compilation does not count as a step
                meter.restart(step, metrics)
            display.update(step, f"step {step} of {settings.steps}")
            finished = step == settings.steps
            stop_signal = stop_request()
            last = finished or stop_signal is not None
            saving = last or step % settings.checkpoint_every == 0
            evaluating = finished or step % settings.eval_every == 0
            logging = finished or step % settings.log_every == 0
            if not saving:
                with meter.loading_batch(metrics):  # while the device computes this step
                    batch = program.sharded.shard_batch(next(batches))
            # At most one step ahead of the device, so that the display is up to date and a signal
            # takes effect at once. Only finite states are evaluated and saved.
            divergence = guard.check(step, metrics, wait=logging or evaluating or saving)
            if divergence is not None:
                values = meter.read_metrics(divergence.step, divergence.metrics)
                writer.write(divergence.step, "train", values)
                checkpoints.close()
                raise_if_any_failed(divergence.error)
            if logging or (saving and guard.skipped_steps):
                values = meter.read_metrics(step, metrics)
                if settings.on_nonfinite == "skip":
                    values["skipped_steps"] = guard.skipped_steps
                    guard.skipped_steps = 0
                writer.write(step, "train", values)
                display.update(step, status=train_status(values), line=True)
                for warning in idle_experts.new_warnings():
                    display.print_line(f"step {step}  {warning}")
            evaluated = None
            if evaluating:
                evaluated = evaluate(program.sharded, state.params, validation)
                evaluated |= scorer(state.params, workdir.predictions / str(step))
                writer.write(step, "eval", evaluated)
                display.print_line(f"step {step}  {evaluation_summary(evaluated)}")
                meter.restart(step, metrics)
            if saving:
                # After the step's metrics are on disk, and before the next batch is read, so that
                # the saved position follows the batches that are trained on.
                save_state(checkpoints, state, batches, evaluated)
            if last:
                break
            if saving:
                with meter.loading_batch(metrics):
                    batch = program.sharded.shard_batch(next(batches))
        best = checkpoints.best()
        checkpoints.close()
    if first_process:
        if not finished:
            print(f"Stopped at step {step}; the same command continues from there.")
        else:
            _print_results(config, workdir, best, evaluated or {})
    return None if finished else stop_signal


def _lock(workdir: Workdir, config: Config, held: ExitStack, *, new: bool) -> None:
    """Locks `workdir` until `held` is closed, in the first process, and checks it again.

    Another process may have begun a run there since the first check, also where `new` says that
    there was none.
    """
    if jax.process_index() == 0:
        held.enter_context(workdir.lock())
        workdir.check(config)
        if new and workdir.checkpoints.exists():
            raise UserError(
                f"Another process has begun a run in {workdir.path}; the same command goes on from"
                " its checkpoint."
            )


def _print_results(
    config: Config,
    workdir: Workdir,
    best: tuple[int, dict[str, float]] | None,
    last: dict[str, float],
) -> None:
    """Prints the scores of tasks, of the best checkpoint or else the last, and the best's path."""
    print(scores_table(last if best is None else best[1]), end="")
    if best is not None:
        print(f"Best by {config.train.keep_best}: {workdir.checkpoints / str(best[0])}")
