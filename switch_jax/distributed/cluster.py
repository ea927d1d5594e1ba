"""Launch of this process: process index, process count, coordinator address and host names.

They come from flags, or from JAX, which detects launchers: TPU pods with one or several slices,
GKE, Kubernetes, Slurm and Open MPI. This module decides when JAX detects them correctly, and reads
host names, for messages, from the launchers' environment variables.
"""

import dataclasses
import os
import re

from switch_jax.errors import UserError

# Number of processes of a job step. (SLURM_NTASKS is the number that an allocation allows, and is
# set in the allocation's shell, too.)
_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_GIVE_FLAGS = "give --coordinator, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of a multi-process run: its index, and what it needs to connect."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    hosts: tuple[str, ...] = ()  # of all processes, by index; empty: not known

    def name(self, index: int) -> str:
        """Returns the name of a process for messages, with its host if that is known."""
        return f"process {index}" + (f" ({self.hosts[index]})" if self.hosts else "")


def launch_from_flags(
    coordinator: str | None, count: int | None, index: int | None
) -> Launch | None:
    """Returns the launch that the flags describe; None without flags.

    Raises `UserError` where a flag is missing or wrong.
    """
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --num_processes and --process_id go together: give all.")
    if not 0 <= index < count:
        raise UserError(f"--process_id must be from 0 to {count - 1}.")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator must be HOST:PORT of process 0, not {coordinator!r}.")
    return Launch(coordinator, count, index, _hosts(count))


def detect_launch(seconds: float) -> Launch | None:
    """Returns the launch that JAX detects, within some seconds; None for a single process.

    Raises `UserError` where there are several processes and JAX cannot connect them.
    """
    counts = [os.environ[name] for name in _COUNT_VARIABLES if name in os.environ]
    if counts and set(counts) == {"1"}:
        # JAX would still assign one GPU to this process and, in the shell of a Slurm allocation,
        # wait for as many processes as the allocation allows.
        return None
    try:
        coordinator, count, index = _detect_with_jax(seconds)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"The launcher does not tell where the other processes are ({error}); {_GIVE_FLAGS}."
        ) from error
    if coordinator and count and index is not None:
        return Launch(coordinator, count, index, _hosts(count))
    if counts:
        raise UserError(
            f"This is one of {max(map(int, counts))} processes that JAX cannot connect by itself;"
            f" {_GIVE_FLAGS}."
        )
    return None


def _detect_with_jax(seconds: float) -> tuple[str | None, int | None, int | None]:
    """Returns address of process 0, process count and process index; None where not known."""
    tpu = any(f"TPU_{name}" in os.environ for name in ("WORKER_HOSTNAMES", "PROCESS_ADDRESSES"))
    pod = "KUBERNETES_SERVICE_HOST" in os.environ and not tpu
    if pod and "JOB_COMPLETION_INDEX" not in os.environ:
        return None, None, None  # no job: JAX would raise an error
    # A private module: the public `jax.distributed.initialize` also connects, and where a process
    # is missing it ends this one without naming the missing one; see `rendezvous.py`.
    from jax._src.clusters import ClusterEnv

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    coordinator, count, index, *_ = ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, None, int(seconds)
    )
    return coordinator, count, index


def _hosts(count: int) -> tuple[str, ...]:
    """Returns the hosts of all processes by index; empty where the environment has no such list."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers:
        hosts = [worker.split(":")[0] for worker in workers.split(",")]
    else:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        hosts = expand_hostlist(nodes)
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        if tasks and os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
            hosts = [host for host, n in zip(hosts, _tasks_per_node(tasks)) for _ in range(n)]
    return tuple(hosts) if len(hosts) == count else ()


def expand_hostlist(nodes: str) -> list[str]:
    """Returns the host names of a Slurm node list such as `a,node[01-03,7]-x`."""
    names = []
    for pattern in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", pattern):
            endings = [text] if text else [n for r in ranges.split(",") for n in _expand_range(r)]
            expanded = [name + ending for name in expanded for ending in endings]
        names += expanded
    return names


def _expand_range(text: str) -> list[str]:
    """Returns the numbers of `01-03` or `7`, as long as the first one."""
    first, _, last = text.partition("-")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]


def _tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks of each node; Slurm writes `2(x3),1` for [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
