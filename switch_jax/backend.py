"""Starting JAX for a command: the other processes, the compilation cache, XLA's flags."""

import importlib.metadata
import os

import jax

from switch_jax.cache import cache_root


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Call once, before anything is computed.

    Compiled programs are kept in the cache and taken from it by the next start of the same
    config. With `coordinator` ("host:port" of process 0), joins a run of several processes.
    """
    # The reductions over leading dimensions that jaxlib 0.10 hands to its CPU kernel library run
    # 50 times slower there than XLA's own; later versions mended that.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flag = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _launched_together():
        jax.distributed.initialize()


def _launched_together() -> bool:
    """Whether a launcher that JAX knows started several processes (Slurm, Open MPI, TPU pod)."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return any(count.isdigit() and int(count) > 1 for count in counts) or len(hosts) > 1
