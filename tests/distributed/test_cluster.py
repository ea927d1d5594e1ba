"""Detection of launchers, launches by flags, and host names."""

import os

import pytest

from switch_jax.distributed.cluster import (
    Launch,
    detect_launch,
    expand_hostlist,
    launch_from_flags,
)
from switch_jax.distributed.multihost import connect
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
# As GKE sets it; the names must resolve, because JAX looks up their addresses.
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
    """Environment variables without those of launchers."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORD")):
            monkeypatch.delenv(name)
    return monkeypatch


def pretend_tpu_vm(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)


def detect_with(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return detect_launch(5)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # the shell of an allocation
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # a batch script
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod without a job
        {"SLURM_STEP_NUM_TASKS": "", "SLURM_JOB_ID": "77"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": ""},
        dict.fromkeys((*SLURM, *OPEN_MPI, *TPU), ""),
    ],
)
def test_a_single_process_has_no_launch(environment, variables):
    assert detect_with(environment, variables) is None


def test_slurm_gives_index_count_coordinator_and_hosts(environment):
    launch = detect_with(environment, SLURM)
    hosts = ("node01", "node01", "node02", "node02")
    assert (launch.count, launch.index, launch.hosts) == (4, 2, hosts)
    assert launch.coordinator == f"node01:{4711 % 4096 + 61440}"
    assert launch.name(3) == "process 3 (node02)"


def test_hosts_of_a_cyclic_slurm_distribution_are_not_guessed(environment):
    launch = detect_with(environment, SLURM | {"SLURM_DISTRIBUTION": "cyclic"})
    assert launch.hosts == () and launch.name(3) == "process 3"


def test_absurd_task_counts_name_no_hosts(environment):
    odd = {"SLURM_STEP_TASKS_PER_NODE": "999999999999(x999999999999)"}
    assert detect_with(environment, SLURM | odd).hosts == ()


def test_open_mpi_in_a_slurm_step_is_the_innermost_launcher(environment):
    """mpirun starts one task of a step on each node, and its processes inherit the variables."""
    launch = detect_with(environment, SLURM | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI)
    assert (launch.count, launch.index) == (4, 3)


def test_open_mpi_gives_index_count_and_coordinator(environment):
    launch = detect_with(environment, OPEN_MPI)
    assert (launch.count, launch.index) == (4, 3) and launch.coordinator.startswith("10.0.0.1:")


def test_a_tpu_pod_gives_index_count_coordinator_and_hosts(environment):
    pretend_tpu_vm(environment)
    launch = detect_with(environment, TPU)
    assert (launch.count, launch.index) == (2, 1) and launch.coordinator.startswith("localhost:")
    assert launch.hosts == ("localhost", "127.0.0.1")


def test_tpu_slices_count_all_processes_without_hosts(environment):
    pretend_tpu_vm(environment)
    launch = detect_with(
        environment, TPU | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    )
    assert (launch.count, launch.index, launch.hosts) == (6, 5, ())


def test_processes_that_jax_cannot_connect_are_refused(environment):
    """Open MPI 5 sets no variable that JAX reads; single processes would corrupt one WORKDIR."""
    variables = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    with pytest.raises(UserError, match="give --coordinator, --num_processes and --process_id"):
        detect_with(environment, variables)


@pytest.mark.parametrize(
    "variables, words",
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two', no number"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "-1"}, "SLURM_STEP_NUM_TASKS is '-1', no number"),
        (SLURM | {"SLURM_JOB_ID": "77x"}, "SLURM_JOB_ID is '77x'"),
        (SLURM | {"SLURM_LOCALID": "x\x1b"}, r"SLURM_LOCALID is 'x\\x1b'"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, and .* 2 of 4"),
        (SLURM | {"SLURM_PROCID": "4"}, "process 4 of 4"),
        (SLURM | {"SLURM_NTASKS": "0", "SLURM_STEP_NUM_TASKS": "0"}, "process 2 of 0"),
        # Processes of mpirun in a Slurm step, where JAX would take them for process 0 of the step
        (
            {k: v for k, v in OPEN_MPI.items() if "orte" not in k} | SLURM,
            "OMPI_COMM_WORLD_RANK is 3, and .* 2 of 4",
        ),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "here"}, "no HOST:PORT of process 0, but 'here'"),
        (SLURM | {"JAX_COORDINATOR_PORT": "99999"}, "no HOST:PORT"),
    ],
)
def test_odd_variables_of_launchers_are_refused(environment, variables, words):
    with pytest.raises(UserError, match=f"{words}.*; .*give --coordinator"):
        detect_with(environment, variables)


@pytest.mark.parametrize("seconds", ["x", "nan", "-1", "0", "1e300"])
def test_an_odd_time_limit_is_refused(environment, seconds):
    environment.setenv("SWITCH_JAX_START_TIMEOUT", seconds)
    with pytest.raises(UserError, match=f"SWITCH_JAX_START_TIMEOUT is '{seconds}'; set it to"):
        connect(None, {})


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
def test_wrong_flags_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        launch_from_flags(*flags)


def test_flags_describe_a_launch():
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
        ("a[1-x]", []),
        ("a[1-999999999]", []),
        ("a[1-9999]b[1-9999]", []),
    ],
)
def test_slurm_node_lists_are_expanded(nodes, names):
    assert expand_hostlist(nodes) == names
