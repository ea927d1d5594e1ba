"""Buckets: files and folders at gs://BUCKET/… and s3://BUCKET/….

A bucket has no locks, and its files can neither be appended to nor renamed at once. So a folder is
filled on the local disk and then uploaded, and the files by which a reader knows that it is
complete are uploaded last. Orbax reads and writes checkpoints in gs:// itself.

fsspec transfers the files, with `gcsfs` or `s3fs` of the extra `buckets`, which also define how
credentials and other servers are set.
"""

import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from etils import epath

from switch_jax.errors import UserError
from switch_jax.files.atomic import build_once, create_folder_atomically
from switch_jax.files.lock import hold_lock
from switch_jax.files.paths import cache_root, expand_user, is_bucket

COMMIT_FILE = "commit_success.txt"
"""Name of the file that Orbax writes into a checkpoint in a bucket when it is complete."""
_COMPLETING = (COMMIT_FILE, "manifest.json", "config.json")  # uploaded last, and removed first
_ERROR_MODULES = ("aiobotocore.", "aiohttp.", "botocore.", "gcsfs.", "google.auth.", "s3fs.")
_ADVICE = "check its name, your credentials and the network"
_REPORTED_BYTES = 2**28  # of a download
_REQUESTS = 16  # at a time, of what fsspec does one by one
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}

# TensorFlow's client, which `epath` prefers where TensorFlow is installed, reads no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")


class RemoteFile(NamedTuple):
    """A file in a bucket.

    size: bytes.
    version: changes with the content.
    """

    size: int
    version: str


def as_path(path: str | os.PathLike) -> Path:
    """Returns a path on a disk, with `~` in front replaced, or in a bucket.

    A path in a bucket is an `epath.Path`, which has the methods of a `Path`.

    Raises `UserError` where the package for such buckets is missing.
    """
    if not is_bucket(path):
        return expand_user(os.fspath(path))
    _file_system(path)  # tells a missing package
    return cast(Path, epath.Path(path))


def list_files(path: Path, skip: Collection[str] = ()) -> dict[str, RemoteFile]:
    """Returns the files of a folder in a bucket, or a single file, by path below it.

    The key of a single file is "". Folders directly in `path` whose name is in `skip` are left out.

    Raises `UserError` where the bucket cannot be read.
    """
    with _explaining_errors(path):
        system = _file_system(path)
        root = os.fspath(path).rstrip("/")
        if not system.exists(root):
            return {}
        if system.isfile(root):
            return {"": _remote_file(system.info(root))}
        found = {}
        prefix = len(system._strip_protocol(root)) + 1
        for folder, folders, files in system.walk(root, detail=True):
            if len(folder) < prefix:
                for name in set(folders) & set(skip):
                    del folders[name]
            for name, info in files.items():
                if name:  # an object whose name ends with a slash marks an empty folder
                    found[f"{folder}/{name}"[prefix:]] = _remote_file(info)
        return found


def file_names(path: Path) -> set[str]:
    """Returns the paths of the files below a folder on a disk or in a bucket."""
    return set(list_files(path)) if is_bucket(path) else set(local_files(path))


def folder_bytes(path: Path) -> int:
    """Returns the bytes of all files in a folder in a bucket."""
    return sum(file.size for file in list_files(path).values())


def download(path: Path, folder: Path, names: Collection[str]) -> None:
    """Copies files below a path in a bucket, by `list_files`, into a folder on the local disk.

    Raises `UserError` for a name that leads out of the folder, and where the bucket cannot be read.
    """
    targets = [folder / (name or path.name) for name in names]
    for name, target in zip(names, targets):
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{path} has a file {name!r}, which leads out of it; do not use it.")
        target.parent.mkdir(parents=True, exist_ok=True)
    if targets:
        with _explaining_errors(path):
            sources = [f"{os.fspath(path).rstrip('/')}/{name}".rstrip("/") for name in names]
            _file_system(path).get(sources, [str(target) for target in targets])


def read_text(path: Path) -> str:
    """Returns the content of a small file in a bucket, read in one request; "" if there is none.

    With several requests, as `path.read_text()` makes, a file that is replaced between them cannot
    be read. Raises `UserError` where the bucket cannot be read.
    """
    with _explaining_errors(path):
        try:
            return _file_system(path).cat_file(os.fspath(path)).decode()
        except FileNotFoundError:
            return ""


def upload(folder: Path, path: Path, names: Collection[str]) -> None:
    """Copies files of a local folder into a folder in a bucket, those that complete it last."""
    with _explaining_errors(path):
        for completing in (False, True):
            chosen = [name for name in names if is_completing(name) == completing]
            if chosen:
                targets = [os.path.join(path, name) for name in chosen]
                _file_system(path).put([str(folder / name) for name in chosen], targets)


def commit(path: Path, names: Collection[str]) -> None:
    """Writes empty files, by which folders are complete, into a folder in a bucket."""
    with _explaining_errors(path):
        for name in names:
            _file_system(path).pipe_file(os.path.join(path, name), b"")


def remove(path: Path, names: Collection[str]) -> None:
    """Removes files of a folder on a disk or in a bucket, those that complete it first."""
    if not is_bucket(path):
        for name in names:
            (path / name).unlink(missing_ok=True)
        return
    with _explaining_errors(path), ThreadPoolExecutor(_REQUESTS) as pool:
        system = _file_system(path)
        for completing in (True, False):
            chosen = [name for name in names if is_completing(name) == completing]
            list(pool.map(system.rm_file, [os.path.join(path, name) for name in chosen]))


def is_completing(name: str) -> bool:
    """Whether a file says that the folder in which it is is complete."""
    return os.path.basename(name) in _COMPLETING


def fetch(path: str | os.PathLike) -> Path:
    """Returns a path on the local disk with the content of a path; one on a disk is returned as is.

    Files and folders of a bucket are copied into the cache once, and again when they change there.

    Raises `UserError` where nothing is there, or the bucket cannot be read.
    """
    path = as_path(path)
    if not is_bucket(path):
        return path
    files = list_files(path)
    if not files:
        raise UserError(f"{path} does not exist; name what does.")
    identity = repr((os.fspath(path), sorted(files.items()))).encode()
    digest = hashlib.blake2b(identity, digest_size=8).hexdigest()

    def copy(partial: Path) -> None:
        size = sum(file.size for file in files.values())
        if size > _REPORTED_BYTES:
            note = f"Copying {path} ({size / 2**30:.1f} GiB) into {cache_root()} (once) …"
            print(note, file=sys.stderr, flush=True)
        download(path, partial, files)

    copied = build_once(cache_root() / "downloads" / f"{path.name}-{digest}", copy)
    return copied / path.name if "" in files else copied


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yields the folder to fill in place of a folder that may be in a bucket.

    It is `path` itself on a disk. For a bucket it is a folder in the cache, which is uploaded at
    the end and removed; after an exception nothing is uploaded.

    Raises `UserError` where another process fills the same folder of a bucket.
    """
    if not is_bucket(path):
        yield path
        return
    with _staging(path, resume=False) as folder:
        yield folder
        upload(folder, path, local_files(folder))


@contextmanager
def staged_file(path: Path, *, resume: bool = False) -> Iterator[Path]:
    """Does for a file what `staged_folder` does for a folder.

    Args:
      resume: the file begins with what a call that failed left in the cache, and is kept there if
        this call fails.
    """
    if not is_bucket(path):
        yield path
        return
    with _staging(path, resume) as folder:
        yield folder / path.name
        upload(folder, path.parent, [path.name])


@contextmanager
def _staging(path: Path, resume: bool) -> Iterator[Path]:
    digest = hashlib.blake2b(os.fspath(path).encode(), digest_size=8).hexdigest()
    parent = cache_root() / "uploads"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{path.name}-{digest}"
    with hold_lock(parent / f".{folder.name}.lock", f"writes {path}"):
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)


@contextmanager
def adding_files(path: Path) -> Iterator[Path]:
    """Yields an empty folder on the local disk; its files are moved into folder `path` at the end.

    Each file appears there whole, on a disk or in a bucket, and replaces one of the same name.
    After an exception none does. Several processes may add the same files at the same time.
    """
    if is_bucket(path):
        with TemporaryDirectory(prefix="switch_jax-") as folder:
            yield Path(folder)
            upload(Path(folder), path, local_files(Path(folder)))
        return
    path.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=path) as folder:
        yield Path(folder)
        for name in local_files(Path(folder)):
            os.replace(os.path.join(folder, name), path / name)


@contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `path`, on a disk or in a bucket, at the end.

    After an exception nothing is left. Raises `UserError` if `path` exists or cannot be written.
    """
    if not is_bucket(path):
        with create_folder_atomically(path) as partial:
            yield partial
        return
    if list_files(path):
        raise UserError(f"{path} exists; name a folder that does not, or remove it.")
    with staged_folder(path) as folder:
        yield folder


def local_files(folder: Path, include: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Returns size and modification time of the files of a local folder by path below it.

    Hidden files, which are being written, are left out, and what `include` is false for: it is
    called with the path of each folder and file.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        below = os.path.relpath(parent, folder)
        prefix = "" if below == "." else f"{below}/"
        folders[:] = [f for f in folders if not f.startswith(".") and include(f"{prefix}{f}")]
        for name in files:
            if not name.startswith(".") and include(f"{prefix}{name}"):
                try:
                    stat = os.stat(os.path.join(parent, name))
                except FileNotFoundError:  # removed meanwhile
                    continue
                found[f"{prefix}{name}"] = (stat.st_size, stat.st_mtime_ns)
    return found


def _file_system(path: str | os.PathLike) -> Any:
    """Returns fsspec's file system of a bucket."""
    scheme = os.fspath(path).partition("://")[0]
    try:
        importlib.import_module(_PACKAGES[scheme])
        import fsspec
    except ImportError as error:
        raise UserError(
            f"{path} needs the package {_PACKAGES[scheme]}; install it with"
            " `pip install 'switch_jax[buckets]'`."
        ) from error
    for protocol in ("gs", "gcs", "s3"):  # other processes change what is there
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def _remote_file(info: dict[str, Any]) -> RemoteFile:
    version = next((info[key] for key in ("generation", "ETag", "etag") if key in info), "")
    return RemoteFile(int(info["size"]), str(version or info.get("LastModified", "")))


def explain_bucket_error(error: BaseException) -> str | None:
    """Returns a sentence for an error of the packages for buckets; None for other errors."""
    if not f"{type(error).__module__}.".startswith(_ERROR_MODULES):
        return None
    return f"A bucket cannot be reached ({_first_line(error)}); {_ADVICE}."


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@contextmanager
def _explaining_errors(path: Path) -> Iterator[None]:
    """Raises `UserError` in place of the many types of errors of the packages for buckets."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not is_bucket(error.filename):
            raise  # of the local disk
        raise UserError(f"{path} cannot be reached ({_first_line(error)}); {_ADVICE}.") from error
