"""A real Slurm of two nodes on this computer, in a folder and on ports of its own."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.ports import free_ports

# Names that every resolver knows, because JAX connects to the first node by its name.
NODES = ("127.0.0.1", "127.0.0.2")
GPUS = 4  # a node has, as far as Slurm knows
_PATH = f"{os.environ['PATH']}:/usr/sbin"  # where daemons are, and not every user looks
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
IS_INSTALLED = all(shutil.which(name, path=_PATH) for name in _PROGRAMS)
WHY_SKIPPED = "needs Slurm: apt-get install slurm-wlm munge"

_CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A job that was requeued waits until its credential has expired: 120 s, or 5 s at the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
# JAX's port follows from the number of a job; other tests take the first free ones from 61440 on.
FirstJobId=1000
SchedulerParameters=sched_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=8 \
Gres=gpu:{gpus}
PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


class SlurmCluster:
    """A running Slurm of the nodes `NODES`.

    environment: what Slurm's commands need to reach it, as variables.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._daemons: list[subprocess.Popen] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        gpus = [folder / f"gpu{i}" for i in range(GPUS)]  # Slurm only looks whether they exist
        for file in (*gpus, folder / "key"):
            file.touch(mode=0o600)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        settings = {
            "folder": folder,
            "ports": free_ports(3),
            "user": getpass.getuser(),
            "gpus": GPUS,
        }
        config = _CONFIG.format(nodes=",".join(NODES), **settings)
        (folder / "slurm.conf").write_text(config)

    def start(self) -> None:
        """Starts the daemons, and returns once both nodes take jobs."""
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "seed"}
        munge |= {"key-file": "key", "log-file": "munge.log"}
        paths = [f"--{option}={self._folder}/{name}" for option, name in munge.items()]
        self._start_daemon("munged", "--foreground", "--force", *paths)
        self.wait_until((self._folder / "munge.socket").exists, "munged listens")
        self._start_daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node, and returns once the node takes jobs."""
        self._start_daemon("slurmd", "-D", "-N", node, SLURMD_NODENAME=node)
        self.wait_until(lambda: self._node_state(node) == "idle", f"{node} is idle")

    def kill_node(self, node: str) -> None:
        """Kills all processes of a node at once, as if it had lost its power."""
        for pid in self.processes(SLURMD_NODENAME=node):
            _kill(pid)

    def stop(self) -> None:
        """Kills all processes of the cluster and of its jobs."""
        while pids := self.processes():
            for pid in pids:
                _kill(pid)
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait()

    def command(self, *words: str) -> str:
        """Runs a command of Slurm and returns its output."""
        environment = os.environ | self.environment
        return subprocess.run(
            words, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def job(self, number: int) -> dict[str, str]:
        """Returns what Slurm knows about a job, such as its JobState."""
        shown = self.command("scontrol", "show", "job", str(number), "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_for_job(self, number: int, state: str, seconds: float = 300) -> dict[str, str]:
        """Waits until a job is in a state; returns what Slurm knows about it."""
        job: dict[str, str] = {}

        def is_there() -> bool:
            job.update(self.job(number))
            return job["JobState"] == state

        self.wait_until(is_there, f"job {number} is {state}", seconds, lambda: str(job))
        return job

    def processes(self, **environment: str) -> list[int]:
        """Returns the processes of the cluster that were started with these variables."""
        wanted = {f"{name}={value}" for name, value in (self.environment | environment).items()}
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if folder.name.isdecimal() and _is_running(folder):
                    text = (folder / "environ").read_bytes().decode()
                    found += [int(folder.name)] if wanted <= {*text.split("\0")} else []
        return found

    def wait_until(
        self,
        condition: Callable[[], bool],
        sentence: str,
        seconds: float = 60,
        reason: Callable[[], str] = str,
    ) -> None:
        """Waits until a condition is true; fails after some seconds with the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{log}:\n{log.read_text()[-3000:]}" for log in self._folder.glob("*.out")]
                raise AssertionError("\n".join([f"not so: {sentence}", reason(), *logs]))
            time.sleep(0.1)

    def _start_daemon(self, *words: str, **environment: str) -> None:
        with open(self._folder / f"{words[0]}{words[-1][-1]}.out", "ab") as log:
            daemon = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PATH": _PATH} | self.environment | environment,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _node_state(self, node: str) -> str:
        try:
            return self.command("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split()[0]
        except (subprocess.CalledProcessError, IndexError):  # slurmctld does not listen yet
            return "unknown"


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Starts a cluster and, at the end, stops everything that runs in it."""
    # Not in pytest's folder: the name of a socket is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder:
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _is_running(folder: Path) -> bool:
    """Whether the process of a folder of /proc is no zombie."""
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
