"""The training loop."""

import functools
import signal

import jax

from switch_jax.checkpoint import Checkpointer, MetricsWriter, Workdir
from switch_jax.config import Config
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.distributed import fail_together, make_mesh, stop_requests
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
from switch_jax.training.idle_experts import IdleExperts
from switch_jax.training.initial_state import initial_state_report, make_initial_state
from switch_jax.training.progress import ProgressDisplay, evaluation_summary, train_status
from switch_jax.training.state import restore_state, save_state
from switch_jax.training.step import TrainProgram
from switch_jax.training.throughput import ThroughputMeter


def train(config: Config, workdir: Workdir) -> signal.Signals | None:
    """Trains to `train.steps`, from the newest good checkpoint in `workdir` if there is one.

    A run that was stopped, at whatever moment, and continued ends with the same bits as one
    that was not: parameters, optimizer, random numbers and data follow from the checkpoint.
    SIGTERM and SIGINT end the loop after the current step, with a checkpoint; of several
    processes one that receives it is enough.

    Returns the signal that ended the run early, or None when it is finished.
    """
    settings = config.train
    first_process = jax.process_index() == 0
    with fail_together():
        workdir.check(config)

        # Mesh and data
        taught_by = teacher_config(config)
        mesh = make_mesh(config, teacher=taught_by)
        device_kind = mesh.devices.flat[0].device_kind
        program, feed = TrainProgram(config, mesh, taught_by), process_rows(mesh)
        batches = open_batches(config, "train", feed)
        validation = validation_batches(config, feed)
        score = TaskScorer(program.sharded)
        rank = None
        if settings.keep_best is not None:
            check_metric(settings.keep_best, validation, score.names)
            rank = functools.partial(sort_key, settings.keep_best)

        # What cannot be: say so before anything is written.
        check_distillation(config)
        if config.init_from is not None and not workdir.checkpoints.exists():
            initial_state_report(config)
    score.agree()
    with fail_together():
        if first_process:
            synthetic = config.data.reader == "synthetic"
            vocabulary = None if synthetic else open_vocabulary(config).content
            workdir.prepare(config, vocabulary, f"{mesh.devices.size} × {device_kind}")

    # State
    checkpoints = Checkpointer(workdir, settings.keep_checkpoints, rank)
    state = restore_state(checkpoints, program.abstract_state, batches) or make_initial_state(
        program
    )
    first_step = int(state.step)
    if first_step >= settings.steps:
        best = checkpoints.best()
        checkpoints.close()
        if first_process:
            print(f"{workdir.path} is finished: step {first_step} of {settings.steps}.")
            _conclude(config, workdir, best, {})
        return None

    # Steps
    teacher = teacher_parameters(program)
    meter = ThroughputMeter(lambda s: mfu(config, s, device_kind, mesh.devices.size, taught_by))
    writer = MetricsWriter(workdir, first_step, active=first_process)
    idle = IdleExperts(config)
    display = ProgressDisplay(
        settings.steps, first_step, status="compiling …", active=first_process
    )
    with display, writer, stop_requests() as stop_request:
        if first_step:
            display.print_line(f"continuing from step {first_step}")
        if mesh.devices.size < jax.device_count():
            display.print_line(f"using {mesh.devices.size} of {jax.device_count()} devices")
        batch = program.sharded.shard_batch(next(batches))
        previous = None
        for step in range(first_step + 1, settings.steps + 1):
            state, metrics, load = program.train_step(state, batch, teacher)
            idle.update(load)
            if previous is None:
                jax.block_until_ready(state)  # compilation is not a step
                meter.restart(step, metrics)
            else:
                # One step ahead of the device and no more: what is shown, or asked to stop, is now.
                jax.block_until_ready(previous)
            previous = metrics["loss"]
            display.update(step, f"step {step} of {settings.steps}")
            finished = step == settings.steps
            stopped_by = stop_request()
            last = finished or stopped_by is not None
            saving = last or step % settings.checkpoint_every == 0
            if not saving:
                with meter.waiting(metrics):  # the device is computing this step meanwhile
                    batch = program.sharded.shard_batch(next(batches))
            if finished or step % settings.log_every == 0:
                values = meter.read(step, metrics)
                writer.write(step, "train", values)
                display.update(step, status=train_status(values), line=True)
                for sentence in idle.news():
                    display.print_line(f"step {step}  {sentence}")
            evaluated = None
            if finished or step % settings.eval_every == 0:
                evaluated = evaluate(program.sharded, state.params, validation)
                evaluated |= score(state.params, workdir.predictions / str(step))
                writer.write(step, "eval", evaluated)
                display.print_line(f"step {step}  {evaluation_summary(evaluated)}")
                meter.restart(step, metrics)
            if saving:
                # After its metrics are on disk, and before the next batch is drawn, so that the
                # position saved is of the batch consumed.
                save_state(checkpoints, state, batches, evaluated)
            if last:
                break
            if saving:
                with meter.waiting(metrics):
                    batch = program.sharded.shard_batch(next(batches))
        best = checkpoints.best()
        checkpoints.close()
    if first_process:
        if not finished:
            print(f"Stopped at step {step}; the same command continues from there.")
        else:
            _conclude(config, workdir, best, evaluated or {})
    return None if finished else stopped_by


def _conclude(
    config: Config,
    workdir: Workdir,
    best: tuple[int, dict[str, float]] | None,
    last: dict[str, float],
) -> None:
    """Shows scores of tasks: of the best checkpoint, if one is known, and where it is."""
    print(scores_table(last if best is None else best[1]), end="")
    if best is not None:
        print(f"Best by {config.train.keep_best}: {workdir.checkpoints / str(best[0])}")
