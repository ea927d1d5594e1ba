"""Training loop: trains, logs, evaluates and saves checkpoints."""

import contextlib
import functools
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from switch_jax.checkpoint import MetricsWriter, Workdir
from switch_jax.config import Config, MeshConfig
from switch_jax.data import Batch
from switch_jax.distributed import fail_together, raise_if_any_failed, stop_requests
from switch_jax.evaluation import evaluate, scores_table
from switch_jax.model import mfu
from switch_jax.training.finite_guard import FiniteGuard
from switch_jax.training.flat_routers import FlatRouters
from switch_jax.training.goodput import Goodput
from switch_jax.training.idle_experts import IdleExperts
from switch_jax.training.optimizer import schedule_warnings
from switch_jax.training.profiling import StepProfiler
from switch_jax.training.progress import ProgressDisplay, evaluation_summary, train_status
from switch_jax.training.start import StartedRun, start_run
from switch_jax.training.state import save_state
from switch_jax.training.throughput import ThroughputMeter
from switch_jax.training.trackers import Trackers

DrawFigures = Callable[[Workdir], Sequence[Path]]


def train(
    config: Config,
    workdir: Workdir,
    mesh: MeshConfig | None = None,
    draw_figures: DrawFigures | None = None,
) -> signal.Signals | None:
    """Trains to `train.steps`, from the newest readable checkpoint in `workdir` if there is one.

    An interrupted and continued run ends with the same bits as an uninterrupted one, because
    parameters, optimizer, random numbers and data follow from the checkpoint. SIGTERM or SIGINT in
    any process ends the loop after the current step, with a checkpoint.

    Args:
      config: of the run; written to `workdir`.
      workdir: folder of the run.
      mesh: sizes to use in place of `config.mesh`; no number depends on them.
      draw_figures: draws a finished run's figures for its trackers.

    Returns the signal that ended the run early; None when the run is finished. Raises `UserError`
    where the config does not fit the devices, the data, the models that it names or `workdir`, and
    `NotFiniteError` where training diverges.
    """
    goodput = Goodput()
    with start_run(config, workdir, mesh or config.mesh) as run:
        if run.first_batch is not None:
            goodput.add_time_so_far("starting")
            return _train_steps(config, workdir, run, run.first_batch, goodput, draw_figures)
        best = run.checkpoints.best()
        run.checkpoints.close()
        if jax.process_index() == 0:
            step = int(run.state.step)
            print(f"{workdir.location} is finished: step {step} of {config.train.steps}.")
            _print_results(config, workdir, best, {})
        return None


def _train_steps(
    config: Config,
    workdir: Workdir,
    run: StartedRun,
    first_batch: Batch,
    goodput: Goodput,
    draw_figures: DrawFigures | None,
) -> signal.Signals | None:
    """Trains to `train.steps`, beginning with `first_batch`; returns as `train` does."""
    settings = config.train
    first_process = jax.process_index() == 0
    program, checkpoints, batches, state = run.program, run.checkpoints, run.batches, run.state
    start_step = int(state.step)
    devices = program.mesh.devices
    device_kind = devices.flat[0].device_kind
    teacher = None if program.teacher is None else program.teacher.config
    meter = ThroughputMeter(lambda s: mfu(config, s, device_kind, devices.size, teacher), goodput)
    with fail_together():
        trackers = Trackers(config, workdir, start_step, active=first_process)
    writer = MetricsWriter(workdir, start_step, active=first_process, listener=trackers.log)
    idle_experts, flat_routers = IdleExperts(config), FlatRouters(config)
    profiler = StepProfiler(settings.profile_steps, workdir.profile)
    display = ProgressDisplay(
        settings.steps, start_step, status="compiling …", active=first_process
    )
    with contextlib.closing(trackers), display, writer, stop_requests() as stop_request:
        if start_step:
            display.print_line(f"continuing from step {start_step}")
        if devices.size < jax.device_count():
            display.print_line(f"using {devices.size} of {jax.device_count()} devices")
        for warning in schedule_warnings(config):
            display.print_line(warning)
        batch = program.sharded.shard_batch(first_batch)
        first_step, guard = start_step + 1, FiniteGuard(settings.on_nonfinite)
        for step in range(first_step, settings.steps + 1):
            profiler.begin_step(step)
            state, metrics, load = program.train_step(state, batch, run.teacher_params)
            idle_experts.update(load)
            flat_routers.update(step, metrics)
            if step == first_step:
                jax.block_until_ready(state)  # so that compilation does not count as a step
                goodput.add_time_so_far("compiling")
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
                for warning in idle_experts.new_warnings() + flat_routers.new_warnings(values):
                    display.print_line(f"step {step}  {warning}")
            evaluated = None
            if evaluating:
                with goodput.measure("evaluating"):
                    evaluated = evaluate(program.sharded, state.params, run.validation)
                    predictions = workdir.predictions / str(step)
                    evaluated |= run.scorer(state.params, predictions)
                writer.write(step, "eval", evaluated, sorted(predictions.glob("*.jsonl")))
                display.print_line(f"step {step}  {evaluation_summary(evaluated)}")
                meter.restart(step, metrics)
            if saving:
                # After the step's metrics are on disk, and before the next batch is read, so that
                # the saved position follows the batches that are trained on.
                with goodput.measure("saving"):
                    workdir.try_upload()
                    save_state(checkpoints, state, batches, evaluated)
            if profiler.ends_with(step, last=last):
                display.print_line(profiler.end(state, program.train_step_text))
            if last:
                break
            if saving:
                with meter.loading_batch(metrics):
                    batch = program.sharded.shard_batch(next(batches))
        best = checkpoints.best()
        with goodput.measure("saving"):
            checkpoints.close()
        if finished and draw_figures is not None:
            trackers.log_figures(step, functools.partial(draw_figures, workdir))
        display.print_line(goodput.summary())
    if first_process:
        if not finished:
            print(f"Stopped at step {step}; the same command continues from there.")
        else:
            _print_results(config, workdir, best, evaluated or {})
    return None if finished else stop_signal


def _print_results(
    config: Config,
    workdir: Workdir,
    best: tuple[int, dict[str, float]] | None,
    last: dict[str, float],
) -> None:
    """Prints the scores of tasks, of the best checkpoint or else the last, and the best's path."""
    print(scores_table(last if best is None else best[1]), end="")
    if best is not None:
        print(f"Best by {config.train.keep_best}: {workdir.checkpoint_location(best[0])}")
