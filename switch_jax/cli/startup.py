"""Startup of a verb: its config, JAX with its compilation cache, and the other processes."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# JAX and all that imports it are imported by the functions: `--help` must not wait for them.
if TYPE_CHECKING:
    from switch_jax.checkpoint import Workdir
    from switch_jax.config import Config
    from switch_jax.distributed import Launch

_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"


def load_config_argument(args: argparse.Namespace) -> "Config":
    """Returns the config of `--config` and its overrides; raises `UserError`.

    With `init_model=checkpoint` the model is that of `init_from` or, where a run has begun in
    `--workdir`, that of the run.
    """
    from switch_jax.config import load_config

    def find_model(path: str) -> "Config":
        from switch_jax.checkpoint import Workdir, find_pretrained

        folder = getattr(args, "workdir", None)
        if folder is not None and Workdir(folder).config_file.exists():
            return Workdir(folder).config()
        return find_pretrained(path).config

    return load_config(args.config, args.overrides, find_model)


def load_checkpoint_argument(args: argparse.Namespace) -> "tuple[Workdir, Path, Config]":
    """Starts JAX; returns WORKDIR and checkpoint of `--workdir`, and the config to use with them.

    The config is that of `--config` or, without it, the run's own with the overrides.
    Raises `UserError`.
    """
    from switch_jax.checkpoint import find_checkpoint_together
    from switch_jax.config import override_config

    start(args)
    workdir, folder = find_checkpoint_together(args.workdir)
    if args.config:
        return workdir, folder, load_config_argument(args)
    return workdir, folder, override_config(workdir.config(), args.overrides)


def start(args: argparse.Namespace, config: "Config | None" = None) -> None:
    """Starts JAX, connected with the other processes where there are several.

    Verb, WORKDIR and config (or overrides) must be the same in all processes. Raises `UserError`.
    """
    from switch_jax.config import flatten_config
    from switch_jax.distributed import launch_from_flags
    from switch_jax.files import absolute_path, as_path

    flags = None
    if hasattr(args, "process_id"):
        flags = launch_from_flags(args.coordinator, args.num_processes, args.process_id)
    facts = {"the verb": args.verb}
    if hasattr(args, "workdir"):
        facts["--workdir"] = os.fspath(absolute_path(as_path(args.workdir)))
    facts |= args.overrides if config is None else flatten_config(config)
    start_jax(flags, facts)


def start_jax(flags: "Launch | None" = None, facts: Mapping[str, Any] | None = None) -> None:
    """Sets XLA's flags and compilation cache, then connects the processes.

    Must be called before anything is computed. Compiled programs are kept in
    $JAX_COMPILATION_CACHE_DIR, by default in the cache of `switch_jax.files`, and reused by the
    next start of the same config.

    Args:
      flags: the process as the command line describes it; None: detected from the launcher.
      facts: what must be the same in all processes.

    Raises `UserError` where processes are missing or differ in `facts`.
    """
    import jax

    from switch_jax.distributed import connect
    from switch_jax.files import cache_root

    # The reductions over leading dimensions that jaxlib 0.10 hands to its CPU kernel library run
    # 50 times slower there than XLA's own; later versions mended that.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags_before = os.environ.get("XLA_FLAGS", "")
        if _YNN_FLAG not in flags_before:  # XLA_FLAGS is part of the cache's keys
            os.environ["XLA_FLAGS"] = f"{_YNN_FLAG} {flags_before}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    # Python too: the built-in text is that of its standard library.
    versions = {"Python": platform.python_version(), "jax": jax.__version__}
    connect(flags, {**versions, **(facts or {})})


def choose_attached_mesh(config: "Config") -> "Config":
    """Returns the config with a mesh over the attached devices, and says so on stderr.

    A config that gives a mesh is returned as it is. Raises `UserError` where no mesh is legal.
    """
    import jax

    from switch_jax.distributed import fail_together
    from switch_jax.performance import choose_mesh, describe_choice, with_mesh

    devices = jax.devices()
    with fail_together():
        chosen = choose_mesh(config, devices)
    if chosen is not None and jax.process_index() == 0:
        print(describe_choice(chosen, len(devices)), file=sys.stderr, flush=True)
    return with_mesh(config, chosen)


def print_result(text: str) -> None:
    """Prints a result on stdout; of several processes, the first does."""
    import jax

    if jax.process_index() == 0:
        print(text)
