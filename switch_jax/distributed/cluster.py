"""Launch of this process: process index, process count, coordinator address and host names.

They come from flags, or from JAX, which detects launchers: TPU pods with one or several slices,
GKE, Kubernetes, Slurm and Open MPI. This module decides when JAX detects them correctly, and reads
host names, for messages, from the launchers' environment variables. An empty variable counts as not
set.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator

from switch_jax.errors import UserError

# Variables of process count and process index, those of the innermost launcher first. (SLURM_NTASKS
# is the number that an allocation allows, and is set in the allocation's shell, too.)
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# Prefixes of the variables of launchers, and those that JAX reads as a number.
_PREFIXES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_COORDINATOR_")
_NUMBERS = (
    *(name for names in _LAUNCHERS for name in names),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "JOB_COMPLETION_INDEX"),
    *("JAX_COORDINATOR_PORT",),
)
_MAX_HOSTS = 10**5
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
    _drop_empty_variables()
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --num_processes and --process_id go together: give all.")
    if not 0 <= index < count:
        raise UserError(f"--process_id must be from 0 to {count - 1}.")
    if not _is_address(coordinator):
        raise UserError(f"--coordinator must be HOST:PORT of process 0, not {coordinator!r}.")
    return Launch(coordinator, count, index, _hosts(count))


def detect_launch(seconds: float) -> Launch | None:
    """Returns the launch that JAX detects, within some seconds; None for a single process.

    Raises `UserError` where there are several processes and JAX cannot connect them, or the
    launchers' variables contradict each other.
    """
    _drop_empty_variables()
    claims = _claims()
    if claims and all(count == 1 for _, count, _, _ in claims):
        # JAX would still assign one GPU to this process and, in the shell of a Slurm allocation,
        # wait for as many processes as the allocation allows.
        return None
    try:
        coordinator, count, index = _detect_with_jax(seconds)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        wrong = [name for name in _NUMBERS if not os.environ.get(name, "0").isdecimal()]
        reason = ", ".join(f"{name} is {os.environ[name]!r}" for name in wrong) or error
        raise UserError(
            f"The launcher does not tell where the other processes are ({reason}); {_GIVE_FLAGS}."
        ) from error
    if coordinator and count is not None and index is not None:
        _check_detected(coordinator, count, index, claims)
        return Launch(coordinator, count, index, _hosts(count))
    if claims:
        raise UserError(
            f"This is one of {max(count for _, count, _, _ in claims)} processes that JAX cannot"
            f" connect by itself; {_GIVE_FLAGS}."
        )
    return None


def _drop_empty_variables() -> None:
    """Removes empty variables of launchers from the environment, because JAX reads it, too."""
    for name in [name for name in os.environ if name.startswith(_PREFIXES)]:
        if not os.environ[name]:
            del os.environ[name]


def _claims() -> list[tuple[str, int, str, int | None]]:
    """Returns what launchers say: name and value of the process count, and of the process index.

    The innermost launcher comes first. Raises `UserError` for values that are no numbers.
    """
    claims = []
    for count_name, index_name in _LAUNCHERS:
        count, index = os.environ.get(count_name), os.environ.get(index_name)
        if count is None:
            continue
        for name, value in ((count_name, count), (index_name, index)):
            if value is not None and not value.isdecimal():
                raise UserError(f"{name} is {value!r}, no number; unset it, or {_GIVE_FLAGS}.")
        claims.append((count_name, int(count), index_name, None if index is None else int(index)))
    return claims


def _check_detected(
    coordinator: str, count: int, index: int, claims: list[tuple[str, int, str, int | None]]
) -> None:
    """Raises `UserError` where what JAX has detected is impossible, or the launcher denies it."""
    if not 0 <= index < count:
        raise UserError(f"The launcher calls this process {index} of {count}; {_GIVE_FLAGS}.")
    if not _is_address(coordinator):
        raise UserError(
            f"The launcher has no HOST:PORT of process 0, but {coordinator!r}; {_GIVE_FLAGS}."
        )
    if not claims:
        return
    count_name, launcher_count, index_name, launcher_index = claims[0]
    for name, value, detected in (
        (count_name, launcher_count, count),
        (index_name, launcher_index, index),
    ):
        if value is not None and value != detected:
            raise UserError(
                f"The launchers' variables contradict each other: {name} is {value}, and others"
                f" make this process {index} of {count}; {_GIVE_FLAGS}."
            )


def _is_address(text: str) -> bool:
    """Whether a text is HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


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
            repeated = (host for host, n in zip(hosts, _tasks_per_node(tasks)) for _ in range(n))
            hosts = list(itertools.islice(repeated, count + 1))
    return tuple(hosts) if len(hosts) == count else ()


def expand_hostlist(nodes: str) -> list[str]:
    """Returns the host names of a Slurm node list such as `a,node[01-03,7]-x`.

    Returns no names for a list that is malformed or absurdly long.
    """
    names: list[str] = []
    for pattern in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", pattern):
            try:
                endings = (
                    [text] if text else [n for r in ranges.split(",") for n in _expand_range(r)]
                )
            except ValueError:
                return []
            if len(expanded) * len(endings) > _MAX_HOSTS:
                return []
            expanded = [name + ending for name in expanded for ending in endings]
        names += expanded
    return names


def _expand_range(text: str) -> list[str]:
    """Returns the numbers of `01-03` or `7`, as long as the first one; raises `ValueError`."""
    first, _, last = text.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    if len(numbers) > _MAX_HOSTS:
        raise ValueError("too long")
    return [str(n).zfill(len(first)) for n in numbers]


def _tasks_per_node(text: str) -> Iterator[int]:
    """Yields the number of tasks of each node; Slurm writes `2(x3),1` for 2, 2, 2, 1."""
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from itertools.repeat(int(tasks), int(times or 1))
