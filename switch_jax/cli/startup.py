"""Starting JAX for a command: the other processes, the compilation cache, XLA's flags."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax

from switch_jax.distributed import Launch, connect
from switch_jax.files import cache_root

_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"


def start_jax(flags: Launch | None = None, facts: Mapping[str, Any] | None = None) -> None:
    """Call before anything is computed; the arguments are those of `processes.join`.

    Compiled programs are kept in the cache, or where JAX_COMPILATION_CACHE_DIR says, and taken
    from there by the next start of the same config. Raises `UserError` where this is one of
    several processes and they do not fit together.
    """
    # The reductions over leading dimensions that jaxlib 0.10 hands to its CPU kernel library run
    # 50 times slower there than XLA's own; later versions mended that.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags_before = os.environ.get("XLA_FLAGS", "")
        if _YNN_FLAG not in flags_before:  # they are part of what programs are kept under
            os.environ["XLA_FLAGS"] = f"{_YNN_FLAG} {flags_before}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    # Programs must be the same everywhere, and so must text: the built-in one is Python's own.
    versions = {"Python": platform.python_version(), "jax": jax.__version__}
    connect(flags, {**versions, **(facts or {})})
