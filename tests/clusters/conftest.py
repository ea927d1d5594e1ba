"""A cluster of this computer, and the arguments of a tiny run."""

from pathlib import Path

import pytest

from tests.support import runs, slurm


@pytest.fixture(scope="module")
def cluster():
    """A running Slurm of two nodes."""
    with slurm.slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Arguments of a run of 60 steps, which is slow while its WORKDIR has a file `slow`."""
    folder = tmp_path_factory.mktemp("data")
    config = runs.write_config(folder, runs.make_store(folder))
    tracker = Path(__file__).parent / "slow_tracker.py"
    changes = runs.SMALL | {"train.trackers": f"{tracker}:SlowTracker"}
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in changes.items())]
