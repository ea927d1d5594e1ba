"""`switch-jax sweep`: the runs of a sweep, trained and compared."""

import argparse
import shlex
from pathlib import Path

from switch_jax.cli.arguments import add_workdir, path
from switch_jax.errors import UserError
from switch_jax.files import is_bucket

HELP = "train the runs of a sweep, and write tables and figures of their results"

_CONFIG_HELP = (
    "configs/sweeps/NAME.py or configs/sweeps/NAME.py:size=mini; change keys of all runs with"
    " --config.KEY=VALUE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `sweep`."""
    parser.add_argument("--config", required=True, type=path, metavar="FILE", help=_CONFIG_HELP)
    add_workdir(parser, "folder of the sweep; several processes may share it")
    parser.add_argument(
        "--commands",
        action="store_true",
        help="train nothing; print the commands that train the runs which can begin",
    )


def run(args: argparse.Namespace) -> int:
    """Trains the runs that are missing, and writes the report."""
    import jax

    from switch_jax.analysis import import_matplotlib
    from switch_jax.distributed import detect_launch
    from switch_jax.sweeps import (
        check_same_text,
        load_sweep,
        prepare_sweep,
        ready_jobs,
        run_sweep,
        sweep_jobs,
        write_sweep_report,
    )

    import_matplotlib()  # reports a missing Matplotlib before anything is trained
    jax.config.update("jax_platforms", "cpu")  # in this process; accelerators are for the runs
    if is_bucket(args.workdir):
        raise UserError("A sweep needs locks, which a bucket has not; name a folder on a disk.")
    made, folder = load_sweep(args.config).but(args.overrides), Path(args.workdir)
    jobs = sweep_jobs(made, folder)
    prepare_sweep(jobs, folder)
    check_same_text(jobs)
    if args.commands:
        print("\n".join(shlex.join(job.command()) for job in ready_jobs(jobs)))
        return 0
    if detect_launch(seconds=10) is not None:
        raise UserError(
            "A sweep trains one run after the other, each as one process, and this is one of"
            " several; start what --commands prints with your launcher."
        )
    progress = run_sweep(jobs)
    check_same_text(jobs)
    if progress.finished or progress.diverged:
        print("\n".join(map(str, write_sweep_report(made, jobs, folder))))
    if progress.stopped_by is not None:
        print(
            f"Stopped with {progress.finished} of {len(jobs)} runs finished; the same command"
            " continues from there."
        )
        return 128 + progress.stopped_by
    if progress.failed:
        blocked = f", and {', '.join(progress.blocked)} need them" if progress.blocked else ""
        raise UserError(
            f"{len(progress.failed)} of {len(jobs)} runs failed ({', '.join(progress.failed)}; what"
            f" they printed is in {folder / 'jobs'}){blocked}; put that right, and the same command"
            " trains what is missing."
        )
    if progress.diverged and progress.blocked:
        raise UserError(
            f"{', '.join(progress.diverged)} diverged, and {', '.join(progress.blocked)} need what"
            " they train; change the config of those that diverged, and use another --workdir."
        )
    if progress.diverged:
        print(
            f"{len(progress.diverged)} of {len(jobs)} runs diverged"
            f" ({', '.join(progress.diverged)}); the report has them without a final quality."
        )
    return 0
