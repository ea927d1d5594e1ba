"""Who started this process: as which of how many, and on which hosts.

JAX knows the launchers (TPU pods and several of their slices, GKE, Kubernetes, Slurm, Open MPI);
what is here says when to ask it, and reads names of hosts for messages.
"""

import dataclasses
import os
import re

from switch_jax.errors import UserError

# How many processes were started together with this one. (SLURM_NTASKS is how many the job may
# have, also in the shell of an allocation.)
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_GIVE_FLAGS = "give --coordinator, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process among several."""

    coordinator: str  # host:port of process 0
    count: int
    index: int
    hosts: tuple[str, ...] = ()  # of all processes in order, where the launcher tells

    def name(self, index: int) -> str:
        """A process as a message calls it."""
        return f"process {index}" + (f" ({self.hosts[index]})" if self.hosts else "")


def launch_from_flags(
    coordinator: str | None, count: int | None, index: int | None
) -> Launch | None:
    """What the flags say, None where there are none; raises `UserError`."""
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
    """What the launcher says, None where this process was started alone.

    Raises `UserError` where it is one of several and how to find the others is not known.
    """
    counts = [os.environ[name] for name in _COUNTS if name in os.environ]
    if counts and set(counts) == {"1"}:
        # JAX would still give it one GPU of all and, in the shell of a Slurm allocation, wait for
        # as many processes as the job may have.
        return None
    try:
        coordinator, count, index = _ask_jax(seconds)
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


def _ask_jax(seconds: float) -> tuple[str | None, int | None, int | None]:
    """Address of process 0, number of processes and number of this one."""
    tpu = any(f"TPU_{name}" in os.environ for name in ("WORKER_HOSTNAMES", "PROCESS_ADDRESSES"))
    pod = "KUBERNETES_SERVICE_HOST" in os.environ and not tpu
    if pod and "JOB_COMPLETION_INDEX" not in os.environ:
        return None, None, None  # not part of a job, and JAX would fail to find one
    # JAX has no public name for this, and the processes must meet before they are initialized,
    # for then JAX ends a process whose others are missing without saying which.
    from jax._src.clusters import ClusterEnv

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, None, int(seconds)
    )
    return found[0], found[1], found[2]


def _hosts(count: int) -> tuple[str, ...]:
    """Hosts of the processes in order; empty where the environment does not tell."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers:
        hosts = [worker.split(":")[0] for worker in workers.split(",")]
    else:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        hosts = expand_hostlist(nodes)
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        if tasks and os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
            hosts = [host for host, n in zip(hosts, _tasks(tasks)) for _ in range(n)]
    return tuple(hosts) if len(hosts) == count else ()


def expand_hostlist(nodes: str) -> list[str]:
    """The names in a Slurm list of nodes such as `a,node[01-03,7]-x`."""
    names = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        made = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", word):
            endings = [text] if text else [n for r in ranges.split(",") for n in _numbers(r)]
            made = [name + ending for name in made for ending in endings]
        names += made
    return names


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]


def _tasks(text: str) -> list[int]:
    """Tasks of each node in Slurm's `2(x3),1`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
