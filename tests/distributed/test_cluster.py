"""What launchers say, and where a process is alone whatever they say."""

import os

import pytest

from switch_jax.distributed.cluster import Launch, detect_launch, expand_hostlist, launch_from_flags
from switch_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.0.0.1,10.1.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
# As GKE sets it; the names must be known, for JAX asks for their addresses.
TPU = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment without launchers."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORD")):
            monkeypatch.delenv(name)
    return monkeypatch


def on_tpu(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)


def launched(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return detect_launch(5)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # a shell of the allocation
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # a batch script
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of its own
    ],
)
def test_alone(environment, variables):
    assert launched(environment, variables) is None


def test_slurm(environment):
    found = launched(environment, SLURM)
    hosts = ("node01", "node01", "node02", "node02")
    assert (found.count, found.index, found.hosts) == (4, 2, hosts)
    assert found.coordinator == f"node01:{4711 % 4096 + 61440}"
    assert found.name(3) == "process 3 (node02)"


def test_hosts_that_slurm_deals_out_in_turn_are_not_guessed(environment):
    found = launched(environment, SLURM | {"SLURM_DISTRIBUTION": "cyclic"})
    assert found.hosts == () and found.name(3) == "process 3"


def test_open_mpi(environment):
    found = launched(environment, OPEN_MPI)
    assert (found.count, found.index) == (4, 3) and found.coordinator.startswith("10.0.0.1:")


def test_tpu_pod(environment):
    on_tpu(environment)
    found = launched(environment, TPU)
    assert (found.count, found.index) == (2, 1) and found.coordinator.startswith("localhost:")
    assert found.hosts == ("localhost", "127.0.0.1")


def test_tpu_pods_of_several_slices(environment):
    on_tpu(environment)
    found = launched(environment, TPU | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"})
    assert (found.count, found.index, found.hosts) == (6, 5, ())


def test_several_that_cannot_find_each_other_do_not_start_alone(environment):
    """Open MPI 5 does not tell what JAX reads; each for itself, they would spoil one WORKDIR."""
    variables = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    with pytest.raises(UserError, match="give --coordinator, --num_processes and --process_id"):
        launched(environment, variables)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("a:1", None, 0), "go together"),
        ((None, 2, None), "go together"),
        (("a:1", 2, 2), "from 0 to 1"),
        (("a", 2, 0), "HOST:PORT"),
        (("a:99999", 2, 0), "HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(UserError, match=words):
        launch_from_flags(*flags)


def test_flags():
    assert launch_from_flags(None, None, None) is None
    assert launch_from_flags("[::1]:80", 2, 1) == Launch("[::1]:80", 2, 1)


@pytest.mark.parametrize(
    "nodes, names",
    [
        ("", []),
        ("a", ["a"]),
        ("a,b2", ["a", "b2"]),
        ("node[01-03,7],x", ["node01", "node02", "node03", "node7", "x"]),
        ("r[1-2]n[08-09]-x", ["r1n08-x", "r1n09-x", "r2n08-x", "r2n09-x"]),
    ],
)
def test_lists_of_nodes(nodes, names):
    assert expand_hostlist(nodes) == names
