"""Resuming the input data in killed and restarted processes: the same batches continue.

A token store resumes on any number of processes, streamed text on the same number.
"""

import itertools
import json
import time

import pytest

from switch_jax.config.load import load_config
from switch_jax.data import open_batches
from tests.support import runs
from tests.support.batch_logger import row_digests
from tests.support.configs import share
from tests.support.paths import ROOT

BATCH_LOGGER = str(ROOT / "tests" / "support" / "batch_logger.py")
KILLED_AFTER, RESUMED_FOR = 8, 10  # batches


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configs of both readers, with the same text and vocabulary."""
    folder = tmp_path_factory.mktemp("data")
    store = runs.make_store(folder)
    packed = runs.write_config(folder, store)
    streamed = folder / "streamed.py"
    text = packed.read_text().replace('mixture="text"', f'mixture="{folder}/text-{{split}}.jsonl"')
    text = text.replace(f"data_dir={str(store)!r}", f'vocabulary="{folder}/tiny.model"')
    streamed.write_text(text.replace("batch_size=4", 'batch_size=8, reader="seqio"'))
    packed.write_text(packed.read_text().replace("batch_size=4", "batch_size=8"))
    return {"store": packed, "seqio": streamed}


def start_loggers(config, folder, count, last, *position):
    folder.mkdir()
    return [
        runs.start(config, folder, index, count, last, *position, program=[BATCH_LOGGER])
        for index in range(count)
    ]


def logged_batches(folder, count):
    """Yields the row digests of each global batch that all processes have read."""
    logs = []
    for path in (folder / f"batches-{index}.jsonl" for index in range(count)):
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        logs.append([json.loads(line) for line in lines])
    for parts in zip(*logs):
        assert len({part["number"] for part in parts}) == 1
        yield [row for part in parts for row in part["rows"]]


def kill_after_some_batches(config, folder, count):
    """Starts processes, kills them after some batches; returns the newest complete position."""
    processes = start_loggers(config, folder, count, 10_000)
    deadline = time.time() + 120
    while len(list(logged_batches(folder, count))) < KILLED_AFTER:
        assert time.time() < deadline and all(p.poll() is None for p in processes), [
            p.communicate() for p in processes if p.poll() is not None
        ]
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.communicate()
    positions = [path for path in folder.iterdir() if path.name.isdigit()]
    parts = max(len(list(path.iterdir())) for path in positions)
    return max(
        (path for path in positions if len(list(path.iterdir())) == parts),
        key=lambda path: int(path.name),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "reader, before, after",
    [
        *(("store", 1, 1), ("store", 2, 2), ("store", 2, 4), ("store", 4, 1)),
        ("seqio", 2, 2),
    ],
)
def test_killed_processes_resume_with_the_next_batch(configs, tmp_path, reader, before, after):
    if reader == "seqio":
        pytest.importorskip("seqio")
    spec = str(configs[reader])
    position = kill_after_some_batches(spec, tmp_path / "before", before)
    last = int(position.name) + RESUMED_FOR
    for process in start_loggers(spec, tmp_path / "after", after, last, position):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err or out
    config = load_config(spec)
    uninterrupted = [open_batches(config, "train", share(i, before)) for i in range(before)]
    expected = [
        [row for batch in batches for row in row_digests(batch)]
        for batches in itertools.islice(zip(*uninterrupted), last)
    ]
    logged = list(logged_batches(tmp_path / "before", before))[:last]
    assert len(logged) >= KILLED_AFTER and logged == expected[: len(logged)]
    assert list(logged_batches(tmp_path / "after", after)) == expected[-RESUMED_FOR:]
