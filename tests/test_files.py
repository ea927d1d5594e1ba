"""Atomic writes, the cache (`build_once` builds once or not at all), and folders of others."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from switch_jax.errors import UserError
from switch_jax.files import (
    append_lines,
    build_once,
    cache_root,
    check_expansion,
    create_folder,
    explain_os_error,
    folder_size,
    hold_lock,
    path_within,
    write_atomically,
)

# Each process logs that it builds, and takes long enough for the other process to wait.
_BUILDER = """
import sys, time
from pathlib import Path
from switch_jax.files import build_once

def build(path):
    path.mkdir()
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (path / "half").write_text("1")
    time.sleep(1.0)
    (path / "rest").write_text("2")

built = build_once(Path(sys.argv[1]), build)
print(sorted(p.name for p in built.iterdir()))
"""


def test_two_processes_build_once_and_both_see_the_complete_folder(tmp_path):
    args = [sys.executable, "-c", _BUILDER, str(tmp_path / "built"), str(tmp_path / "log")]
    processes = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["['half', 'rest']\n"] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_failed_build_leaves_nothing_and_the_next_call_builds(tmp_path):
    def fail(path):
        path.mkdir()
        (path / "half").write_text("1")
        raise ValueError("no")

    path = tmp_path / "folder" / "built"
    with pytest.raises(ValueError, match="no"):
        build_once(path, fail)
    assert [p.name for p in path.parent.iterdir()] == [".built.lock"]
    assert build_once(path, lambda p: p.write_text("whole") and None).read_text() == "whole"


def test_remains_of_a_killed_build_are_replaced(tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", _BUILDER, tmp_path / "built", tmp_path / "log"]
    )
    while not (tmp_path / ".built.partial" / "half").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "built").exists()
    build_once(tmp_path / "built", lambda p: p.mkdir())
    assert list((tmp_path / "built").iterdir()) == []


def test_an_existing_file_is_not_built_again(tmp_path):
    (tmp_path / "built").write_text("old")
    build_once(tmp_path / "built", lambda p: pytest.fail("built again"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_disk_errors_become_one_sentence(tmp_path, code):
    def fail(path):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=rf"Cannot write .*built: {os.strerror(code)}; .*\.$"):
        build_once(tmp_path / "built", fail)


# As raised by Python, TensorStore, safetensors (Rust) and TensorFlow.
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "…", "/a/b"), "/a/b: Read-only file system; allow it, or"),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "/a/b" [OS error 28: ENOSPC No space left'
                " on device] [source locations='tensorstore/x.cc:1']"
            ),
            "/a/b: No space left on device; make room",
        ),
        (RuntimeError("I/O error: Permission denied (os error 13)"), "Permission denied; allow"),
        (OSError(errno.ENAMETOOLONG, "…"), "File name too long; choose a shorter path"),
    ],
)
def test_errors_of_the_system_from_any_library_become_a_sentence(error, sentence):
    assert explain_os_error(error).startswith(sentence)
    try:
        raise KeyError("step") from error
    except KeyError as wrapper:
        assert explain_os_error(wrapper).startswith(sentence)


def test_errors_of_programs_have_no_sentence():
    for error in (KeyError("x"), FileNotFoundError(errno.ENOENT, "a bug"), OSError("no number")):
        assert explain_os_error(error) is None


def test_other_errors_keep_their_traceback(tmp_path):
    def fail(path):
        raise FileNotFoundError(errno.ENOENT, "a bug")

    with pytest.raises(FileNotFoundError):
        build_once(tmp_path / "built", fail)


def test_a_file_in_place_of_the_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        build_once(tmp_path / "file" / "built", lambda p: None)


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SWITCH_JAX_CACHE")
    assert cache_root().parts[-2:] == (".cache", "switch_jax")


def test_write_atomically_replaces_the_file_and_leaves_no_other(tmp_path):
    write_atomically(tmp_path / "file", b"old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "parent" / "folder"
    with create_folder(path) as partial:
        (partial / "file").write_text("content")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert (path / "file").read_text() == "content"


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), create_folder(tmp_path / "folder"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_an_existing_or_impossible_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in (("file", "exists; name a folder"), ("file/folder", "cannot be made")):
        with pytest.raises(UserError, match=words), create_folder(tmp_path / path):
            pass


def test_a_lock_is_held_by_one_process_and_released_when_it_is_killed(tmp_path):
    program = """
import sys, time
from pathlib import Path
from switch_jax.files import hold_lock

with hold_lock(Path(sys.argv[1]), "works"):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    words = rf"^Process {holder.pid} on .* trains; wait until it ends"
    with pytest.raises(UserError, match=words), hold_lock(tmp_path / "lock", "trains"):
        pass
    holder.kill()
    holder.communicate()
    with hold_lock(tmp_path / "lock", "trains"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    with hold_lock(tmp_path / "lock", "trains"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / "lock", "trains"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.fixture
def downloaded(tmp_path):
    """A folder of others, beside a secret."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "downloaded"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("123")
    (folder / "inside").symlink_to("sub/file")
    return folder


@pytest.mark.parametrize("name", ["sub/file", "sub/../inside", "inside", "missing", "%2e%2e/a"])
def test_names_and_links_within_a_folder_are_followed(name, downloaded, tmp_path):
    assert path_within(downloaded, name) == downloaded / name
    (tmp_path / "link").symlink_to(downloaded)  # the name that a user gives may be a link
    assert path_within(tmp_path / "link", name) == tmp_path / "link" / name
    assert folder_size(downloaded) == 6


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(name, downloaded):
    with pytest.raises(UserError, match="outside of it; do not use it"):
        path_within(downloaded, name)


@pytest.mark.parametrize("target", ["../secret", "/etc", "../none", "../downloaded2", ".."])
def test_links_that_lead_out_of_a_folder_are_refused(target, downloaded):
    (downloaded / "sub" / "link").symlink_to(os.path.join("..", target))
    with pytest.raises(UserError, match=r"'sub/link', which leads to /"):
        path_within(downloaded, "sub/link")
    with pytest.raises(UserError, match=r"'sub/link', which leads to /"):
        folder_size(downloaded)


def test_links_into_the_blobs_of_hugging_faces_cache_are_followed(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("content")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/1")
    (snapshot / "refs").symlink_to("../../refs/main")
    assert path_within(snapshot, "config.json").read_text() == "content"
    assert path_within(snapshot / "sub", "config.json").read_text() == "content"
    with pytest.raises(UserError, match="outside"):
        path_within(snapshot, "refs")


def test_data_that_expands_absurdly_is_refused_with_its_bytes():
    check_expansion("A", 2**30, 1)
    check_expansion("A", 500 * 2**30, 2**30)
    with pytest.raises(
        UserError, match=r"A expands to 2,000,000,000 bytes, and its files have 300;"
    ):
        check_expansion("A", 2 * 10**9, 300)


def test_a_cache_in_the_home_of_nobody_is_refused(monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", "~nobody-has-this-name/cache")
    with pytest.raises(UserError, match="no home folder for ~nobody-has-this-name/cache; set"):
        cache_root()


def test_what_a_killed_process_left_of_a_folder_is_removed_and_what_is_in_use_is_not(tmp_path):
    path = tmp_path / "run [1]"
    left, others = tmp_path / ".run [1].0123456789ab.partial", tmp_path / ".x.0123456789ab.partial"
    for folder in (left, others):
        (folder / "checkpoints").mkdir(parents=True)
    with create_folder(path) as partial:
        assert not left.exists() and partial.exists()
        with pytest.raises(ValueError, match="no"), create_folder(path):
            assert partial.exists()
            raise ValueError("no")
    assert path.is_dir() and others.is_dir()


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    left = tmp_path / ".config.json.0123456789ab.partial"
    left.write_text("half")
    write_atomically(tmp_path / "config.json", b"{}")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    assert (tmp_path / "config.json").read_bytes() == b"{}"


def test_a_folder_for_which_there_is_no_room_is_named_as_it_was_asked_for(tmp_path):
    path = tmp_path / "folder"
    words = f"^{path}/file: No space left on device; make room"
    with pytest.raises(UserError, match=words), create_folder(path) as partial:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial / "file"))
    assert not list(tmp_path.iterdir())


def append(path, made_with, *lines, multiple=1):
    """Appends lines behind those that are there; returns the number of the latter."""
    with append_lines(path, made_with, multiple) as (count, file):
        file.write(b"".join(lines))
        return count


def interrupt(path, made_with, *lines):
    """Appends lines as a writer that is stopped behind them."""
    with pytest.raises(ZeroDivisionError), append_lines(path, made_with) as (_, file):
        file.write(b"".join(lines))
        raise ZeroDivisionError


def test_lines_of_an_interrupted_writer_are_kept_in_whole_groups(tmp_path):
    path = tmp_path / "a.jsonl"
    interrupt(path, {"seed": 1}, b"1\n", b"2\n", b"3\n", b"4")
    assert not path.exists()
    assert append(path, {"seed": 1}, b"3\n", b"4\n", multiple=2) == 2
    assert path.read_bytes() == b"1\n2\n3\n4\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(UserError, match=r"a\.jsonl exists; name a file that does not"):
        append(path, {"seed": 1})


def test_lines_made_with_other_values_are_not_continued(tmp_path):
    path = tmp_path / "a.jsonl"
    interrupt(path, {"seed": 1, "text": "x"}, b"1\n")
    with pytest.raises(UserError, match="made with another value of seed; repeat that command"):
        append(path, {"seed": 2, "text": "x"})
    (tmp_path / "a.jsonl.partial" / "made_with.json").write_text("{")
    with pytest.raises(UserError, match="is damaged; delete it"):
        append(path, {"seed": 1, "text": "x"})


def test_a_writer_that_wrote_no_line_leaves_nothing(tmp_path):
    interrupt(tmp_path / "a.jsonl", {"seed": 1})
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.jsonl.partial").write_text("mine")
    with pytest.raises(UserError, match=r"a\.jsonl\.partial is a file; move it"):
        append(tmp_path / "a.jsonl", {"seed": 1})
    assert (tmp_path / "a.jsonl.partial").read_text() == "mine"


def test_lines_have_one_writer_at_a_time(tmp_path):
    with append_lines(tmp_path / "a", {}) as (_, file):
        file.write(b"1\n")
        with pytest.raises(UserError, match="wait until it ends"):
            append(tmp_path / "a", {})
    assert (tmp_path / "a").read_bytes() == b"1\n"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(UserError, match="exists"),
        append_lines(tmp_path / "a", {}) as (_, file),
    ):
        file.write(b"1\n")
        (tmp_path / "a").write_text("mine")
    assert (tmp_path / "a").read_text() == "mine"


# Appends lines of which the third exceeds the size that the system allows a file.
_FULL = """
import resource, sys
from pathlib import Path
from switch_jax.files import append_lines, explain_os_error

resource.setrlimit(resource.RLIMIT_FSIZE, (25, 25))
try:
    with append_lines(Path(sys.argv[1]), {}) as (_, file):
        for _ in range(4):
            file.write(b"123456789\\n")
            file.flush()
except OSError as error:
    print(explain_os_error(error))
"""


def test_a_full_disk_is_a_sentence_and_loses_no_complete_line(tmp_path):
    path = tmp_path / "a"
    out = subprocess.run(
        [sys.executable, "-c", _FULL, path], capture_output=True, text=True, check=True
    ).stdout
    assert "make room for it" in out
    assert append(path, {}, b"rest\n") == 2
    assert path.read_bytes() == b"123456789\n" * 2 + b"rest\n"
