"""Files: atomic writes, locks, odd paths, buckets, errors of the system, folders of others."""

from switch_jax.files.appended import append_lines
from switch_jax.files.atomic import build_once, write_atomically
from switch_jax.files.bucket_lock import hold_bucket_lock
from switch_jax.files.buckets import (
    COMMIT_FILE,
    adding_files,
    as_path,
    create_folder,
    download,
    explain_bucket_error,
    fetch,
    file_names,
    folder_bytes,
    list_files,
    remove,
    staged_file,
    staged_folder,
)
from switch_jax.files.lock import hold_lock
from switch_jax.files.os_errors import explain_os_error
from switch_jax.files.paths import absolute_path, cache_root, is_bucket, plain_path
from switch_jax.files.synced_folder import SyncedFolder
from switch_jax.files.untrusted import check_expansion, folder_size, path_within

__all__ = [
    "COMMIT_FILE",
    "SyncedFolder",
    "absolute_path",
    "adding_files",
    "append_lines",
    "as_path",
    "build_once",
    "cache_root",
    "check_expansion",
    "create_folder",
    "download",
    "explain_bucket_error",
    "explain_os_error",
    "fetch",
    "file_names",
    "folder_bytes",
    "folder_size",
    "hold_bucket_lock",
    "hold_lock",
    "is_bucket",
    "list_files",
    "path_within",
    "plain_path",
    "remove",
    "staged_file",
    "staged_folder",
    "write_atomically",
]
