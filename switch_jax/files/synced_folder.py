"""Local copy of a folder in a bucket, which one process changes and uploads again and again."""

import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError
from switch_jax.files.atomic import scratch_folder
from switch_jax.files.bucket_lock import hold_bucket_lock, repeating
from switch_jax.files.buckets import (
    COMMIT_FILE,
    commit,
    download,
    list_files,
    local_files,
    remove,
    upload,
)
from switch_jax.files.paths import cache_root

_UPLOAD_SECONDS = 10.0  # between two uploads; a killed process loses the changes of this time


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

        Args:
          lock: name of the file, for `hold_bucket_lock`.
          task: what the holder does, for the message: "trains in gs://bucket/run".
          upload: calls `SyncedFolder.upload`. Its errors are raised at the end only.

        Raises `UserError` where another process holds the lock.
        """

        def try_to_upload() -> None:
            with self.reporting_errors():
                upload()

        with hold_bucket_lock(self.path / lock, task):
            try:
                with repeating(_UPLOAD_SECONDS, try_to_upload, "uploads"):
                    yield
            finally:
                upload()
