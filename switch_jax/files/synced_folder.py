"""Local copy of a folder in a bucket, which one process changes and uploads again and again."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError
from switch_jax.files.atomic import scratch_folder
from switch_jax.files.buckets import (
    COMMIT_FILE,
    commit,
    download,
    list_files,
    local_files,
    read_text,
    remove,
    upload,
)
from switch_jax.files.paths import cache_root

UPLOAD_SECONDS = 10.0  # between two uploads; a killed process loses the changes of this time
_SILENCE_SECONDS = 2 * UPLOAD_SECONDS  # after which the holder of a lock counts as killed
_POLL_SECONDS = 1.0


class SyncedFolder:
    """Local copy of a folder in a bucket; it is removed when the process ends.

    Attributes:
      path: of the folder in the bucket.
      folder: the copy.

    Args:
      skip: names of folders in `path` that are not downloaded.
    """

    def __init__(self, path: Path, skip: Collection[str] = ()):
        self.path = path
        self.folder = scratch_folder(cache_root() / "buckets") / path.name  # which names the run
        self.folder.mkdir()
        self._uploaded: dict[str, object] = {}  # size and modification time by path below `folder`
        self._uploading = threading.Lock()
        self._is_reported = False  # that the bucket cannot be reached
        self.download(list_files(path, skip))

    def download(self, names: Collection[str]) -> None:
        """Copies files, by their path below the folder, from the bucket."""
        download(self.path, self.folder, names)
        stored = local_files(self.folder)
        self._uploaded |= {name: stored[name] for name in names if name in stored}

    def upload(self, include: Callable[[str], bool], complete: Collection[str] = ()) -> None:
        """Copies changed files into the bucket, and removes there what was removed here.

        Args:
          include: is called with the path of each file and folder below the copy; those for which
            it is false stay here.
          complete: paths of folders below the copy that get a commit file in the bucket.

        Raises `UserError` where the bucket cannot be reached.
        """
        with self._uploading:
            files = local_files(self.folder, include)
            upload(
                self.folder,
                self.path,
                [name for name, state in files.items() if self._uploaded.get(name) != state],
            )
            commits = {f"{name}/{COMMIT_FILE}" for name in complete}
            commit(self.path, commits - self._uploaded.keys())
            remove(self.path, self._uploaded.keys() - files.keys() - commits)
            self._uploaded = dict.fromkeys(commits) | files

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Reports on stderr that the bucket cannot be reached, once until it can, and goes on."""
        try:
            yield
            self._is_reported = False
        except FileNotFoundError:
            pass  # a file was removed while it was uploaded; the next upload has the others
        except UserError as error:
            if not self._is_reported:
                print(f"{error} It is tried again.", file=sys.stderr, flush=True)
            self._is_reported = True

    @contextmanager
    def held(self, lock: str, task: str, upload: Callable[[], None]) -> Iterator[None]:
        """Holds the folder's lock, and uploads every 10 seconds and at the end.

        The lock is a file in the bucket, which its holder writes again and again: where it stays
        the same for 20 seconds, its holder was killed, and another process takes it.

        Args:
          lock: name of the file.
          task: what the holder does, for the message: "trains in gs://bucket/run".
          upload: calls `SyncedFolder.upload`. Its errors are raised at the end only.

        Raises `UserError` where another process holds the lock.
        """
        heartbeat = _Heartbeat(self.path / lock)
        heartbeat.take(task)
        stop = threading.Event()
        thread = threading.Thread(
            target=self._repeat, args=(stop, heartbeat, upload), name="uploads", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            try:
                upload()
            finally:
                heartbeat.release()

    def _repeat(
        self, stop: threading.Event, heartbeat: "_Heartbeat", upload: Callable[[], None]
    ) -> None:
        while not stop.wait(UPLOAD_SECONDS):
            with self.reporting_errors():
                heartbeat.beat()
                upload()


class _Heartbeat:
    """A lock file in a bucket, whose content its holder changes as long as it runs."""

    def __init__(self, file: Path):
        self._file = file
        self._holder = f"Process {os.getpid()} on {socket.gethostname()}"
        self._id = uuid.uuid4().hex

    def take(self, task: str) -> None:
        """Takes the lock; waits until its holder shows that it runs, or has been silent.

        Raises `UserError` where another process holds the lock.
        """
        before = read_text(self._file)
        silent_since = time.monotonic()
        while before and time.monotonic() - silent_since < _SILENCE_SECONDS:
            if silent_since + _POLL_SECONDS > time.monotonic():
                print(f"Waiting for the lock {self._file} …", file=sys.stderr, flush=True)
            time.sleep(_POLL_SECONDS)
            now = read_text(self._file)
            if now and now != before:
                raise UserError(
                    f"{now.partition(', ')[0]} {task}; wait until it ends, or stop it, or choose"
                    " another folder."
                )
            before = now
        self.beat()
        time.sleep(_POLL_SECONDS)  # another process may have taken it at the same moment
        if self._id not in read_text(self._file):
            raise UserError(f"Another process {task}; choose another folder.")

    def beat(self) -> None:
        """Shows that the holder runs."""
        self._file.write_text(f"{self._holder}, {self._id} at {time.time():.0f}\n")

    def release(self) -> None:
        """Removes the lock."""
        self._file.unlink(missing_ok=True)
