"""Files and folders in buckets of Google and of S3."""

import builtins
import threading

import pytest

from switch_jax.errors import UserError
from switch_jax.files import (
    SyncedFolder,
    adding_files,
    as_path,
    bucket_lock,
    create_folder,
    fetch,
    file_names,
    list_files,
    staged_file,
    staged_folder,
    synced_folder,
)
from switch_jax.files.buckets import COMMIT_FILE, download, read_text, remove, upload
from tests.support.buckets import reachable_bucket
from tests.support.paths import ODD_NAME, file_contents

ODD = ODD_NAME.replace("\n", " ")  # moto finds no name with a line feed
FILES = {"a.txt": b"a", f"{ODD}/b[1].txt": b"bb", "deep/er/config.json": b"{}"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    with reachable_bucket(request.param) as url:
        yield as_path(url)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_files(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_is_uploaded_is_listed_and_downloaded_with_the_same_names(bucket, tmp_path):
    upload(write_files(tmp_path / "local"), bucket / "copy", FILES)
    listed = list_files(bucket / "copy")
    assert {name: file.size for name, file in listed.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert list_files(bucket / "copy", skip=["deep"]).keys() == FILES.keys() - {
        "deep/er/config.json"
    }
    assert list_files(bucket / "copy" / "a.txt").keys() == {""}
    assert list_files(bucket / "nothing") == {}
    download(bucket / "copy", tmp_path / "again", listed)
    assert file_contents(tmp_path / "again") == FILES
    remove(bucket / "copy", ["a.txt"])
    assert list_files(bucket / "copy").keys() == FILES.keys() - {"a.txt"}


def test_the_file_that_completes_a_folder_is_uploaded_last_and_removed_first(bucket, tmp_path):
    folder = write_files(tmp_path / "local", {"config.json": b"{}", "z.txt": b"z"})
    (folder / "z.txt").unlink()  # so that its upload fails
    with pytest.raises(FileNotFoundError):
        upload(folder, bucket / "order", ["config.json", "z.txt"])
    assert "config.json" not in list_files(bucket / "order")


def test_fetch_copies_once_and_again_after_a_change(bucket, tmp_path, monkeypatch):
    upload(write_files(tmp_path / "local"), bucket / "fetched", FILES)
    folder = fetch(bucket / "fetched")
    assert file_contents(folder) == FILES
    assert fetch(bucket / "fetched") == folder
    file = fetch(bucket / "fetched" / "a.txt")
    assert (file.name, file.read_bytes()) == ("a.txt", b"a")
    (bucket / "fetched" / "a.txt").write_bytes(b"A")
    changed = fetch(bucket / "fetched")
    assert changed != folder and (changed / "a.txt").read_bytes() == b"A"
    with pytest.raises(UserError, match="does not exist"):
        fetch(bucket / "nothing")
    assert fetch(tmp_path / "local") == tmp_path / "local"


def test_a_name_that_leads_out_of_a_folder_is_refused(bucket, tmp_path):
    for name in ("../outside.txt", "/outside.txt", "a/../../outside.txt"):
        with pytest.raises(UserError, match="leads out of it"):
            download(bucket / "bad", tmp_path / "in", ["a.txt", name])
    assert not list(tmp_path.glob("**/outside.txt"))


def test_outputs_appear_when_they_are_complete(bucket):
    with pytest.raises(ValueError), create_folder(bucket / "failed") as folder:
        write_files(folder)
        raise ValueError
    assert list_files(bucket / "failed") == {}
    with create_folder(bucket / "made") as folder:
        write_files(folder)
        assert list_files(bucket / "made") == {}
    assert list_files(bucket / "made").keys() == FILES.keys()
    with pytest.raises(UserError, match="exists"), create_folder(bucket / "made"):
        pass
    with staged_folder(bucket / "twice"):
        again = staged_folder(bucket / "twice")
        with pytest.raises(UserError, match="writes"):
            again.__enter__()


def test_files_are_added_to_a_folder_when_they_are_complete(bucket, tmp_path):
    for target in (bucket / "grows", tmp_path / "grows"):
        with adding_files(target) as folder:
            (folder / "a.txt").write_bytes(b"a")
        with pytest.raises(ValueError), adding_files(target) as folder:
            (folder / "b.txt").write_bytes(b"b")
            raise ValueError
        with adding_files(target) as folder, adding_files(target) as other:
            (folder / "a.txt").write_bytes(b"again")
            (other / "a.txt").write_bytes(b"again")
            assert (target / "a.txt").read_bytes() == b"a"
        assert file_names(target) == {"a.txt"} == {path.name for path in target.iterdir()}
        assert (target / "a.txt").read_bytes() == b"again"
        remove(target, ["a.txt"])
        assert file_names(target) == set()


def test_an_interrupted_output_is_resumed(bucket):
    with pytest.raises(ValueError), staged_file(bucket / "x.txt", resume=True) as file:
        file.write_bytes(b"begun")
        raise ValueError
    with staged_file(bucket / "x.txt", resume=True) as file:
        file.write_bytes(file.read_bytes() + b" and ended")
    assert (bucket / "x.txt").read_bytes() == b"begun and ended"


def test_a_synchronised_folder_uploads_changes_and_removals(bucket, tmp_path):
    upload(write_files(tmp_path / "local"), bucket / "synced", FILES)
    synced = SyncedFolder(bucket / "synced", skip=["deep"])
    assert synced.folder.name == "synced"
    assert file_contents(synced.folder).keys() == FILES.keys() - {"deep/er/config.json"}
    (synced.folder / "a.txt").write_bytes(b"changed")
    (synced.folder / ODD / "b[1].txt").unlink()
    write_files(synced.folder, {"steps/5/params": b"p", "steps/6.tmp/params": b"q"})
    synced.upload(lambda name: ".tmp" not in name, complete=["steps/5"])
    stored = list_files(bucket / "synced")
    expected = {"a.txt", "deep/er/config.json", "steps/5/params", f"steps/5/{COMMIT_FILE}"}
    assert stored.keys() == expected
    assert (bucket / "synced" / "a.txt").read_bytes() == b"changed"
    synced.upload(lambda name: not name.startswith("steps"))
    assert list_files(bucket / "synced").keys() == {"a.txt", "deep/er/config.json"}


def test_a_lock_is_refused_while_its_holder_runs_and_taken_after_a_kill(bucket, monkeypatch):
    monkeypatch.setattr(synced_folder, "_UPLOAD_SECONDS", 0.2)
    for name, seconds in (("BEAT", 0.2), ("SILENCE", 5.0), ("POLL", 0.1)):
        monkeypatch.setattr(bucket_lock, f"_{name}_SECONDS", seconds)
    first, second = (SyncedFolder(bucket / "locked") for _ in range(2))
    uploads = threading.Event()
    with first.held("lock", "trains here", uploads.set):
        assert uploads.wait(10)
        with pytest.raises(UserError, match=r"Process \d+ on .* trains here"):
            second.held("lock", "trains here", lambda: None).__enter__()
    assert list_files(bucket / "locked") == {}
    (bucket / "locked" / "lock").write_text("Process 1 on a host that was killed, 5")
    with second.held("lock", "trains here", lambda: None):
        assert "that was killed" not in (bucket / "locked" / "lock").read_text()


def test_a_file_that_is_replaced_again_and_again_is_read_whole(bucket):
    file = bucket / "replaced.txt"
    assert read_text(file) == ""
    file.write_text("0" * 50)
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            for digit in "123":
                file.write_text(digit * 50)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        contents = [read_text(file) for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    assert {len(set(content)) for content in contents} == {1}
    assert len(set(contents)) > 1


def test_errors_are_sentences(bucket, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"cannot be reached|does not exist"):
        fetch(bucket.with_name("bucket-that-is-not-there") / "a.txt")
    synced = SyncedFolder(bucket / "errors")
    for _ in range(2):
        with synced.reporting_errors():
            raise UserError("The bucket is away.")
    assert capsys.readouterr().err == "The bucket is away. It is tried again.\n"

    def without_packages(name, *rest, real=builtins.__import__):
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_packages)
    with pytest.raises(UserError, match=r"install it with `pip install 'switch_jax\[buckets\]'`"):
        as_path(bucket / "a.txt")
