"""Checkpointer: saving, restoring on other shardings, and checkpoints that cannot be read."""

import json
import logging
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from switch_jax.checkpoint import saver_failures
from switch_jax.checkpoint.checkpoint_reader import (
    abandoning_reads,
    find_checkpoint,
    parameter_shapes,
    restore_opt_state,
    restore_params,
)
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.saver_failures import watch_saver
from switch_jax.checkpoint.workdir import Workdir, step_numbers
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.files import explain_os_error, untrusted
from tests.support.configs import tiny
from tests.support.paths import ODD_NAME

CONFIG = tiny(**{"mesh.expert": 4})


class Position:
    """A data position that is one number."""

    def __init__(self, number: int = 0):
        self.number = number

    def save(self, folder: Path) -> None:
        (folder / "position.json").write_text(json.dumps(self.number))

    def restore(self, folder: Path) -> None:
        self.number = json.loads((folder / "position.json").read_text())


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    workdir = Workdir(tmp_path / ODD_NAME)
    workdir.prepare(CONFIG, None)
    return workdir


def on_mesh(value, *axes: str | None) -> jax.Array:
    return jax.device_put(value, NamedSharding(make_mesh(CONFIG), P(*axes)))


def arrays(step: int, *axes: str | None):
    """Returns parameters and the rest of a state that differ from step to step."""
    params = {"encoder/wi": on_mesh(np.full((8, 4), step, np.float32), *axes)}
    rest = {"step": on_mesh(np.int32(step)), "opt_state": (on_mesh(np.full(8, -step, np.float32)),)}
    return params, rest


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir: Workdir, *steps: int) -> None:
    checkpointer = Checkpointer(workdir, keep=3)
    for step in steps:
        checkpointer.save(step, *arrays(step, "expert"), Position(10 * step))
    checkpointer.close()


def restore(workdir: Workdir, params, rest):
    """Returns the restored arrays and the restored data position."""
    position = Position()
    checkpointer = Checkpointer(workdir, keep=3)
    try:
        return checkpointer.restore(abstract(params), abstract(rest), position), position.number
    finally:
        checkpointer.close()


def test_restore_reads_the_newest_checkpoint_onto_other_shardings(workdir, tmp_path):
    save(workdir, 1, 2)
    params, rest = arrays(2, None, "expert")
    restored, position = restore(workdir, params, rest)
    assert position == 20
    assert [path.name for path in tmp_path.iterdir()] == [ODD_NAME]  # nothing is written elsewhere
    assert jax.tree.structure(restored) == jax.tree.structure((params, rest))
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves((params, rest))):
        assert actual.sharding == expected.sharding
        np.testing.assert_array_equal(actual, expected)


def test_restore_returns_none_without_a_checkpoint(workdir):
    assert restore(workdir, *arrays(0)) == (None, 0)


def test_save_stores_the_position_at_the_time_of_the_call(workdir):
    checkpointer, position = Checkpointer(workdir, keep=1), Position(5)
    checkpointer.save(1, *arrays(1), position)
    position.number = 6
    checkpointer.close()
    assert restore(workdir, *arrays(1))[1] == 5


def damage(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")


def test_a_checkpoint_that_cannot_be_read_is_renamed_and_the_one_before_is_used(workdir, capsys):
    save(workdir, 1, 2)
    damage(workdir.checkpoints / "2" / "params")
    (params, _), position = restore(workdir, *arrays(1))
    assert position == 10 and (np.asarray(params["encoder/wi"]) == 1).all()
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"1", "corrupt-2"}
    assert "Checkpoint 2 cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_that_is_not_finite_is_set_aside(workdir, capsys):
    save(workdir, 1)
    checkpointer = Checkpointer(workdir, keep=3)
    params, rest = arrays(2)
    checkpointer.save(2, {"encoder/wi": params["encoder/wi"] * np.nan}, rest, Position(20))
    checkpointer.close()
    shutil.rmtree(workdir.checkpoints / "2" / "checksums")  # older versions have none
    (workdir.checkpoints / "2" / "data" / "checksums-0.json").unlink()
    (params, _), position = restore(workdir, *arrays(1))
    assert position == 10 and (np.asarray(params["encoder/wi"]) == 1).all()
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"1", "corrupt-2"}
    assert "32 values that are NaN or infinite, of 32" in capsys.readouterr().err


def wide_arrays(step: int):
    """Returns arrays that are too large to be stored among TensorStore's metadata."""
    values = np.random.default_rng(step).normal(size=(8, 400)).astype(np.float32)
    params, rest = arrays(step, "expert")
    return {**params, "encoder/wo": on_mesh(values, "expert")}, {**rest, "v": on_mesh(values / 2)}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Workdir:
    """WORKDIR with checkpoints 1 and 2 of `wide_arrays` at positions 10 and 20, with metrics."""
    workdir = Workdir(tmp_path_factory.mktemp("two") / "run")
    workdir.prepare(CONFIG, None)
    checkpointer = Checkpointer(workdir, keep=3, sort_key=lambda metrics: metrics["score"])
    for step in (1, 2):
        checkpointer.save(step, *wide_arrays(step), Position(10 * step), {"score": float(step)})
    checkpointer.close()
    return workdir


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_no_damaged_file_gives_other_values(two_checkpoints, tmp_path):
    right = {step: jax.tree.map(np.asarray, wide_arrays(step)) for step in (1, 2)}
    newest = two_checkpoints.checkpoints / "2"
    names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    # Values are in the largest files. scripts/campaigns damages all files.
    large = sorted(names, key=lambda name: (newest / name).stat().st_size)[-5:]
    record = Path("checksums/metadata")
    others = [record, Path("metrics/metrics"), Path("_CHECKPOINT_METADATA")]
    damages = [(flip_a_bit, name) for name in [*large, *others]]
    for damage in (Path.unlink, lambda file: file.write_bytes(b"")):
        damages += [(damage, name) for name in [large[-1], record]]
    for item in ("params", "optimizer", "data", "checksums"):  # those of another step
        damages.append(
            (lambda path: shutil.copytree(path.parents[1] / "1" / path.name, path), item)
        )
    used = []
    for number, (damage, name) in enumerate(damages):
        workdir = Workdir(tmp_path / str(number))
        shutil.copytree(two_checkpoints.path, workdir.path)
        path, position = workdir.checkpoints / "2" / name, Position()
        if path.is_dir():
            shutil.rmtree(path)
        damage(path)
        checkpointer = Checkpointer(workdir, keep=3, sort_key=lambda metrics: metrics["score"])
        restored = checkpointer.restore(*map(abstract, wide_arrays(1)), position)
        step, metrics = checkpointer.best()
        checkpointer.close()
        jax.tree.map(np.testing.assert_array_equal, restored, right[step])
        assert (position.number, metrics["score"]) == (10 * step, step), name
        used.append(step)
    assert used[-4:] == [1] * 4 and used.count(2) > 1


def test_a_flipped_bit_is_a_sentence_where_parameters_are_read(two_checkpoints, tmp_path):
    copy = tmp_path / "checkpoints" / "2"
    shutil.copytree(two_checkpoints.checkpoints / "2", copy)
    params, _ = wide_arrays(2)
    sizes = {file: file.stat().st_size for file in copy.glob("params/ocdbt.process_0/d/*")}
    flip_a_bit(max(sizes, key=sizes.get))
    with pytest.raises(UserError, match=r"2 cannot be read \(.*; take another one"):
        restore_params(copy, abstract(params))
    restored = restore_params(two_checkpoints.checkpoints / "2", abstract(params))
    np.testing.assert_array_equal(restored["encoder/wo"], params["encoder/wo"])


def test_a_second_bad_checkpoint_of_a_step_and_odd_names_are_set_aside_or_ignored(workdir, capsys):
    save(workdir, 1, 2)
    for name in ("corrupt-5", "5", "007", "²", "9" * 20, "abc", "3.orbax-checkpoint-tmp"):
        (workdir.checkpoints / name).mkdir()
    (workdir.checkpoints / "8").write_text("a file")
    assert find_checkpoint(workdir.path)[1].name == "5"
    assert restore(workdir, *arrays(2))[1] == 20
    names = {path.name for path in workdir.checkpoints.iterdir()}
    assert {"1", "2", "corrupt-5", "corrupt-5-2", "007", "8"} <= names and "5" not in names


@pytest.fixture
def small_files():
    """Files that this process writes can have 512 bytes: an error as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_without_room_is_raised_and_loses_nothing(two_checkpoints, small_files, capsys):
    checkpointer = Checkpointer(two_checkpoints, keep=3)
    checkpointer.save(3, *wide_arrays(3), Position(30))
    with pytest.raises(Exception) as error:
        checkpointer.close()
    assert "File too large; make room" in explain_os_error(error.value)
    assert "Traceback" not in capsys.readouterr().err
    assert step_numbers(two_checkpoints.checkpoints) == [1, 2]


def test_a_saver_that_fails_ends_one_of_several_processes(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(saver_failures, "exit_after_failure", codes.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = ValueError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]")
    record = logging.LogRecord(
        "absl", logging.ERROR, "/lib/orbax/x.py", 1, "failed", (), (type(error), error, None)
    )
    record.threadName = "async_save"
    watch_saver()
    assert not logging.getLogger("absl").filter(record)
    assert codes == [2] and "No space left on device; make room" in capsys.readouterr().err


def test_no_checkpoint_is_renamed_where_none_can_be_read(workdir):
    save(workdir, 1, 2)
    for step in ("1", "2"):
        damage(workdir.checkpoints / step / "params")
    with pytest.raises(UserError, match=r"(?s)No checkpoint in .* can be read"):
        restore(workdir, *arrays(1))
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"1", "2"}


def test_parameters_and_optimizer_are_read_from_a_checkpoint_folder(workdir):
    save(workdir, 3)
    params, rest = arrays(3, None, "expert")
    found, folder = find_checkpoint(workdir.path)
    assert (found.path, folder) == (workdir.path, workdir.checkpoints / "3")
    assert find_checkpoint(folder)[1] == folder
    assert parameter_shapes(folder) == {"encoder/wi": (8, 4)}
    restored = restore_params(folder, abstract(params))["encoder/wi"]
    assert restored.sharding == params["encoder/wi"].sharding
    np.testing.assert_array_equal(restored, params["encoder/wi"])
    (opt_state,) = restore_opt_state(folder, abstract(rest["opt_state"]))
    np.testing.assert_array_equal(opt_state, rest["opt_state"][0])


def test_links_that_lead_out_are_refused_and_a_folder_on_another_disk_is_not(workdir, tmp_path):
    save(workdir, 3)
    workdir.checkpoints.rename(tmp_path / "disk")
    workdir.checkpoints.symlink_to(tmp_path / "disk")
    folder = find_checkpoint(workdir.path)[1]
    assert parameter_shapes(folder) == {"encoder/wi": (8, 4)}
    (folder / "params" / "x").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"'params/x', which leads to /etc/passwd"):
        parameter_shapes(folder)
    with pytest.raises(UserError, match=r"'params/x', which leads to /etc/passwd"):
        restore_params(folder, {})
    workdir.vocabulary.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"'vocabulary\.model', which leads to /etc/passwd"):
        find_checkpoint(workdir.path)


def test_parameters_much_larger_than_their_files_are_refused(workdir, monkeypatch):
    save(workdir, 3)
    monkeypatch.setattr(untrusted, "_ALWAYS_ALLOWED_BYTES", 0)
    monkeypatch.setattr(untrusted, "_MAX_EXPANSION", 0)
    with pytest.raises(UserError, match="expands to 128 bytes"):
        parameter_shapes(workdir.checkpoints / "3")


def test_an_optimizer_state_of_another_shape_is_refused(workdir):
    save(workdir, 3)
    longer = (on_mesh(np.zeros(16, np.float32)),)
    with pytest.raises(UserError, match=r"\(8,\), not \(16,\)"):
        restore_opt_state(workdir.checkpoints / "3", abstract(longer))


def test_errors_name_a_missing_path_and_a_workdir_without_checkpoints(workdir, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(workdir.path)
    (workdir.checkpoints / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="1 cannot be read"):
        parameter_shapes(workdir.checkpoints / "1")


def test_a_read_that_ends_after_it_was_abandoned_prints_nothing(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: reported.append(error.exc_value))
    with pytest.raises(KeyError), abandoning_reads():
        raise KeyError
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(error) for error in reported] == ["another"]
