"""Files: atomic writes, locks, odd paths, errors of the system, folders that others made."""

from switch_jax.files.appended import append_lines
from switch_jax.files.atomic import build_once, create_folder_atomically, write_atomically
from switch_jax.files.lock import hold_lock
from switch_jax.files.os_errors import explain_os_error
from switch_jax.files.paths import cache_root, expand_user, plain_path
from switch_jax.files.untrusted import check_expansion, folder_size, path_within

__all__ = [
    "append_lines",
    "build_once",
    "cache_root",
    "check_expansion",
    "create_folder_atomically",
    "expand_user",
    "explain_os_error",
    "folder_size",
    "hold_lock",
    "path_within",
    "plain_path",
    "write_atomically",
]
