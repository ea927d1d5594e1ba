"""scripts/launch/: --dry-run prints the commands of a launch, and the last one trains."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from switch_jax.cli.commands import train
from switch_jax.cli.main import _split_overrides, make_parser
from switch_jax.config.load import load_config
from switch_jax.distributed.mesh import check_mesh, resolve_mesh
from tests.support.paths import ROOT

FOLDER = ROOT / "scripts" / "launch"
HELPERS = {"common", "cloud", "tpu_host", "slurm_job"}
LAUNCHERS = sorted({path.stem for path in FOLDER.glob("*.sh")} - HELPERS)
DOCS = (ROOT / "docs" / "launch.md").read_text()
COMMON = ["--config", "configs/switch_base.py:num_experts=64", "--workdir"]
ARGUMENTS = {
    "gke_xpk": [*COMMON, "gs://b/runs/a b", "--cluster", "c", "--type", "v6e-64", "--zone", "z"],
    "gpu_box": [*COMMON, "runs/a b"],
    "multislice": [*COMMON, "gs://b/a b", "--type=v5p-128", "--slices=2", "--zone=z"],
    "slurm_gpu": [*COMMON, "runs/a b", "--nodes", "4"],
    "tpu_vm": [*COMMON, "gs://b/a b", "--type", "v5p-128", "--zone", "z", "--project", "p"],
}
VOCABULARY = """it's "a $HOME ${HOME} $(HOME) $$ `b`\\ c;d& [1] *? é {a,b} ~ # %20 ! |<>"""
PASSED = [f"--config.data.vocabulary={VOCABULARY}", "--config.train.steps", "7"]
PASSED += ["--", "--coordinator", VOCABULARY]
BASH = shutil.which("bash")
STUBS = ["gcloud", "xpk", "git", "mkdir", "sbatch", "bash", "nvidia-smi"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A git checkout of the files that launchers need."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(FOLDER, folder / "scripts" / "launch")
    shutil.copy(ROOT / "scripts" / "venv.sh", folder / "scripts")
    (folder / ".gitignore").write_text("/runs/\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def launch(checkout):
    """Runs a launcher; `first`: a folder in front of PATH; `path`: replaces PATH."""

    def launch(name, arguments, *, first=None, path=None):
        path = path or os.environ["PATH"]
        env = os.environ | {"PATH": f"{first}:{path}" if first else str(path)}
        command = [BASH, checkout / "scripts" / "launch" / f"{name}.sh", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)

    return launch


@pytest.fixture
def dry_run(launch):
    """Returns the words of every command that --dry-run prints."""

    def dry_run(name, arguments, **where):
        done = launch(name, ["--dry-run", *arguments], **where)
        assert (done.returncode, done.stderr) == (0, "")
        return [shlex.split(line) for line in done.stdout.splitlines()]

    return dry_run


def expand(text, environment):
    """Expands variables in a command as systemd and Kubernetes do, quoted or not."""

    def value(match):
        name = match[1] or match[2]
        return "$" if name is None else environment.get(name, match[0])

    return re.sub(r"\$\$|\$\{(\w+)\}|\$\((\w+)\)", value, text)


@pytest.fixture
def on_host(tmp_path):
    """Runs the remote part of a command as the host does; returns the words of `switch-jax`."""
    folder, log = tmp_path / "host", tmp_path / "words"
    folder.mkdir()
    for name in ("git", "pip", "sudo", "switch-jax"):
        text = "mkdir -p switch_jax" if name == "git" else f"printf '%s\\0' {name} \"$@\" >'{log}'"
        (folder / name).write_text(f"#!{BASH}\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/home/me", "USER": "me"}

    def on_host(command):
        (text,) = (w.removeprefix("--command=") for w in command if w.startswith("--command="))
        if command[0] == "xpk":
            text = expand(text, environment)
        subprocess.run([BASH, "-c", text], env=environment, cwd=tmp_path, check=True)
        words = log.read_text().split("\0")[:-1]
        if words[0] == "sudo":
            assert words[1] == "systemd-run"
            assert "--property=EnvironmentFile=/home/me/switch_jax.env" in words
            words = [expand(word, environment) for word in words]
        return words

    return on_host


@pytest.fixture
def train_arguments(on_host):
    """Parses the arguments of the `switch-jax train` at the end of a command, also on a host."""

    def train_arguments(command):
        words = command if "train" in command else on_host(command)
        start = words.index("train")
        assert words[start - 1].endswith("switch-jax")
        overrides, rest = _split_overrides(words[start:])
        args = make_parser().parse_args(rest)
        args.overrides = overrides
        return args

    return train_arguments


@pytest.fixture
def stubs(tmp_path):
    """A folder of programs that log their arguments, and a function that returns the log."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    log.touch()
    for name in STUBS:
        stub = folder / name
        # `describe` fails, as if nothing existed; with --format it prints the state ACTIVE.
        stub.write_text(
            f"#!{BASH}\nprintf '%s\\0' {name} \"$@\" >>'{log}'; printf '\\n' >>'{log}'\n"
            'case "$*" in *--format=*) echo ACTIVE ;; *" describe "*) exit 1 ;; esac\n'
        )
        stub.chmod(0o755)

    def calls():
        lines = log.read_text().split("\0\n")[:-1]
        return [line.split("\0") for line in lines]

    return folder, calls


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.sh")))
def test_every_script_has_valid_bash_syntax(name):
    done = subprocess.run(["bash", "-n", FOLDER / f"{name}.sh"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_last_command_trains_with_all_given_arguments(name, dry_run, train_arguments):
    """Also with names that the shells, systemd, Kubernetes and Slurm on the way would expand."""
    workdir = f"{ARGUMENTS[name][3]} {VOCABULARY}"
    command = dry_run(name, [*ARGUMENTS[name], "--workdir", workdir, *PASSED])[-1]
    args = train_arguments(command)
    assert args.run is train.run and args.coordinator == VOCABULARY
    assert args.config == "configs/switch_base.py:num_experts=64"
    assert args.workdir == workdir
    if name == "slurm_gpu":  # which replaces %j, and %% by %
        assert f"--output={workdir.replace('%', '%%')}/slurm-%j.log" in command
    slices = {"multislice": {"mesh.slice": "2"}, "gke_xpk": {"mesh.slice": "1"}}
    assert args.overrides == {
        "data.vocabulary": VOCABULARY,
        "train.steps": "7",
        **slices.get(name, {}),
    }


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launch_runs_the_commands_that_dry_run_prints(name, launch, dry_run, stubs):
    folder, calls = stubs
    arguments = [*ARGUMENTS[name], *PASSED]
    printed = dry_run(name, arguments, first=folder)
    # A dry run checks with git whether files are committed; that is not part of the launch.
    git_checks = calls()
    assert all(c[:2] in (["git", "cat-file"], ["git", "diff"]) for c in git_checks)
    if name == "gpu_box":  # its last command is exec
        assert printed.pop()[:2] == ["exec", ".venv/bin/switch-jax"]
    done = launch(name, arguments, first=folder)
    assert done.returncode == (127 if name == "gpu_box" else 0), done.stderr
    assert [c for c in calls() if c not in git_checks] == printed
    assert [shlex.split(line) for line in done.stdout.splitlines()][: len(printed)] == printed


@pytest.mark.parametrize(("name", "hosts"), [("tpu_vm", 1), ("multislice", 2)])
def test_commands_run_on_every_host(name, hosts, dry_run):
    remote = [words for words in dry_run(name, ARGUMENTS[name]) if {"ssh", "scp"} & {*words}]
    assert len(remote) == 4
    flags = ["--node=all", "--worker=all"][-hosts:]
    assert all(word in words for words in remote for word in flags)


@pytest.mark.parametrize("name", ["tpu_vm", "multislice"])
def test_an_existing_tpu_is_not_created_again(name, launch, stubs):
    folder, calls = stubs
    stub = folder / "gcloud"
    stub.write_text(stub.read_text().replace("exit 1", "exit 0"))
    assert launch(name, ARGUMENTS[name], first=folder).returncode == 0
    verbs = [c[4] for c in calls() if c[0] == "gcloud"]
    assert "describe" in verbs and "create" not in verbs and verbs[-1] == "ssh"


def test_nothing_is_installed_on_hosts_that_already_train(launch, stubs):
    folder, calls = stubs
    stub = folder / "gcloud"
    stub.write_text(stub.read_text() + 'case "$*" in *is-active*) exit 1 ;; esac\n')
    assert launch("tpu_vm", ARGUMENTS["tpu_vm"], first=folder).returncode == 1
    assert "is-active" in " ".join(calls()[-1])


def test_a_failed_slice_request_ends_the_wait(launch, stubs):
    folder, _ = stubs
    stub = folder / "gcloud"
    stub.write_text(stub.read_text().replace("ACTIVE", "SUSPENDED"))
    done = launch("multislice", ARGUMENTS["multislice"], first=folder)
    assert done.returncode == 2 and "switch-jax is SUSPENDED; delete it" in done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_missing_option_is_named_in_one_sentence(name, launch):
    given = ARGUMENTS[name]
    pairs = [word.split("=", 1)[0] for word in given if word.startswith("--")]
    for option in pairs:
        if option == "--project":
            continue
        index = next(i for i, word in enumerate(given) if word.split("=")[0] == option)
        count = 1 if given[index].startswith(f"{option}=") else 2
        done = launch(name, ["--dry-run", *given[:index], *given[index + count :]])
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch(rf"\S+/{name}\.sh: give {option}, as in: bash .*\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("tpu_vm", ["--workdir", "runs/a"], "all hosts must see --workdir"),
        ("gke_xpk", ["--config.data.data_dir=a\nb"], "no argument may have a line break"),
        ("tpu_vm", ["--config", "configs/none.py"], "configs/none.py does not exist"),
        ("slurm_gpu", ["--workdir", "gs://b/a"], "must be a folder"),
        ("slurm_gpu", ["--nodes", "0"], "--nodes must be a whole number, at least 1, not '0'"),
        ("slurm_gpu", ["--nodes", "two"], "--nodes must be a whole number, at least 1, not 'two'"),
        ("slurm_gpu", ["--nodes", "2-4"], "at least 1, not '2-4'"),
        ("slurm_gpu", ["--nodes", "a[$(false)]"], "at least 1, not 'a[$(false)]'"),
        ("slurm_gpu", ["--gpus_per_node", "-1"], "--gpus_per_node must be a whole number, at lea"),
        ("slurm_gpu", ["--gpus_per_node="], "--gpus_per_node must be a whole number, at least 0"),
        ("slurm_gpu", ["--time", "0:19:59"], "--time must be at least 20 minutes"),
        ("slurm_gpu", ["--time", "10"], "--time must be at least 20 minutes"),
        ("slurm_gpu", ["--time", "soon"], "--time must be a limit such as 24:00:00"),
        ("multislice", ["--slices", "x"], "--slices must be a whole number, at least 1, not 'x'"),
        ("gke_xpk", ["--slices", "0"], "--slices must be a whole number, at least 1, not '0'"),
        ("gke_xpk", ["--restarts", "1.5"], "--restarts must be a whole number, at least 0"),
        ("gpu_box", ["--nodes", "4"], "there is no --nodes"),
        ("gpu_box", ["--workdir"], "--workdir needs a value"),
        ("gpu_box", ["--config.train.steps"], "--config.train.steps needs a value"),
        ("gpu_box", ["runs/a"], "'runs/a' is not an option"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(name, arguments, sentence, launch):
    done = launch(name, ["--dry-run", *ARGUMENTS[name], *arguments])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert sentence in done.stderr


@pytest.mark.parametrize("limit", ["20", "20:00", "0:20:00", "1-0", "1-0:0", "0-0:20:00"])
def test_time_limits_of_every_form_are_passed_to_slurm(limit, dry_run):
    assert f"--time={limit}" in dry_run("slurm_gpu", [*ARGUMENTS["slurm_gpu"], "--time", limit])[-1]


@pytest.mark.parametrize(("gpus", "tasks", "extra"), [(0, 1, ""), (1, 1, " cuda"), (4, 4, " cuda")])
def test_slurm_starts_a_process_for_each_gpu_or_else_for_each_node(gpus, tasks, extra, dry_run):
    _, install, _, submit = dry_run(
        "slurm_gpu", [*ARGUMENTS["slurm_gpu"], f"--gpus_per_node={gpus}"]
    )
    assert f"--ntasks-per-node={tasks}" in submit
    assert [w for w in submit if "gpus" in w] == ([f"--gpus-per-node={gpus}"] if gpus else [])
    assert install[2] == f"source scripts/venv.sh; install{extra}"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_missing_tool_is_named(name, launch, tmp_path):
    for tool in ("bash", "dirname", "basename", "awk", "sed", "git"):  # and nothing else
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = launch(name, ARGUMENTS[name], path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"(gcloud|xpk|sbatch|nvidia-smi) is not installed; .*\.\n$", done.stderr)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_lists_every_option(name, launch):
    done = launch(name, ["--help"])
    text = (FOLDER / f"{name}.sh").read_text()
    required, optional = re.search(r'^parse ("[^"]*"|\w+) ("[^"]*") ', text, re.M).groups()
    for option in f"{required} {optional} dry-run config workdir".replace('"', "").split():
        assert re.search(rf"^  --{option}\b", done.stdout, re.M), option


def test_the_secret_of_a_run_reaches_every_host_in_no_command_line(checkout, launch, stubs):
    """The file's command runs for real; what copies it is a stand-in."""
    folder, calls = stubs
    (folder / "bash").unlink()
    (folder / "mkdir").unlink()
    for name in ("tpu_vm", "gke_xpk"):
        done = launch(name, ARGUMENTS[name], first=folder)
        assert done.returncode == 0, done.stderr
        file = checkout / "runs" / "switch_jax.env"
        secret = re.fullmatch("SWITCH_JAX_START_SECRET=([0-9a-f]{32})\n", file.read_text())[1]
        assert file.stat().st_mode & 0o777 == 0o600
        assert secret not in done.stdout and not any(secret in w for call in calls() for w in call)
        file.unlink()
    scp = next(call for call in calls() if "scp" in call)
    assert "runs/switch_jax.env" in scp and scp[-1] == "--worker=all"
    assert "--env-file=runs/switch_jax.env" in calls()[-1]


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (137, True), (0, False), (3, False)])
def test_a_job_near_its_time_limit_saves_and_is_requeued(status, requeued, tmp_path):
    """Unless it has finished or failed just before: then its exit code is that of its step."""
    log = tmp_path / "log"
    programs = {
        "srun": f"""trap 'echo saved >>{log}; exit {status}' TERM
            echo $$ >{tmp_path}/pid
            echo "${{#SWITCH_JAX_START_SECRET}} srun $*" >>{log}; while :; do sleep 0.02; done""",
        "scancel": f'echo "scancel $*" >>{log}; kill -TERM $(cat {tmp_path}/pid)',
        "scontrol": f'echo "scontrol $*" >>{log}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!{BASH}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    job = subprocess.Popen(["bash", FOLDER / "slurm_job.sh", "train", "a b"], env=env)
    deadline = time.time() + 20
    while not log.exists() and time.time() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    code = job.wait(20)
    srun, *rest = log.read_text().splitlines()
    assert srun.startswith("32 srun ") and srun.endswith(" train a b")
    assert rest == [
        "scancel --signal=TERM 12",
        "saved",
        *(["scontrol requeue 12"] if requeued else []),
    ]
    assert requeued or code == status


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (2, 2), (143, 143)])
def test_a_job_has_the_exit_code_of_its_step(status, expected, tmp_path):
    (tmp_path / "srun").write_text(f"#!{BASH}\nexit {status}\n")
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    assert subprocess.run(["bash", FOLDER / "slurm_job.sh"], env=env).returncode == expected


def test_hosts_get_the_checked_out_commit(checkout, dry_run, tmp_path):
    bundle = dry_run("tpu_vm", ARGUMENTS["tpu_vm"])[3]
    assert bundle[:3] == ["git", "bundle", "create"]
    bundle[-2] = str(tmp_path / "switch_jax.bundle")
    subprocess.run(bundle, cwd=checkout, check=True)
    unpack = re.search("^unpack='(.*)'", (FOLDER / "cloud.sh").read_text(), re.M)[1]
    subprocess.run(unpack.split(), cwd=tmp_path, check=True)
    heads = [
        subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder)
        for folder in (checkout, tmp_path / "switch_jax")
    ]
    assert heads[0] == heads[1]
    assert (tmp_path / "switch_jax" / "scripts" / "launch" / "tpu_host.sh").exists()


def test_an_uncommitted_config_is_refused_and_other_changes_are_mentioned(checkout, launch):
    new, changed = checkout / "configs" / "new.py", checkout / "configs" / "switch_c.py"
    before = changed.read_text()
    try:
        new.write_text(before)
        changed.write_text(f"{before}\n")
        done = launch("gke_xpk", ["--dry-run", *ARGUMENTS["gke_xpk"], "--config", "configs/new.py"])
        assert (done.returncode, done.stdout) == (2, "")
        assert "configs/new.py is not committed; commit it" in done.stderr
        done = launch("gke_xpk", ["--dry-run", *ARGUMENTS["gke_xpk"]])
        assert done.returncode == 0 and "not committed stay here" in done.stderr
    finally:
        new.unlink()
        changed.write_text(before)


def documented_launches():
    """Returns every launch command in docs/launch.md."""
    blocks = re.findall(r"^```\n(bash scripts/launch/.*?)^```", DOCS, re.M | re.S)
    return [shlex.split(block.replace("\\\n", " "))[1:] for block in blocks]


def test_docs_show_exactly_the_existing_launchers():
    assert sorted(Path(command[0]).stem for command in documented_launches()) == LAUNCHERS
    assert set(re.findall(r"scripts/launch/(\w+)\.sh", DOCS)) == set(LAUNCHERS)
    assert "(docs/launch.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "command", documented_launches(), ids=lambda command: Path(command[0]).stem
)
def test_documented_launches_match_the_table_of_meshes(command, dry_run, train_arguments):
    name = Path(command[0]).stem
    options = dict(zip(command[1::2], command[2::2], strict=False))
    kind = options.get("--type", "")
    slices = int(options.get("--slices", 1))
    if kind:  # a v5p is named after its cores, two a chip
        devices = slices * int(kind.split("-")[1]) // (2 if kind.startswith("v5p") else 1)
        machine = f"{slices} × {kind}" if slices > 1 else kind
    else:
        nodes = int(options.get("--nodes", 1))
        devices = 8 * nodes
        machine = f"{nodes} nodes × 8 GPUs" if nodes > 1 else "8 GPUs"
    args = train_arguments(dry_run(name, command[1:])[-1])
    loaded = load_config(str(ROOT / args.config), args.overrides)
    sizes = resolve_mesh(loaded.mesh, devices)
    check_mesh(loaded, sizes)
    row = next(line for line in DOCS.splitlines() if line.startswith(f"| {machine} |"))
    assert row.split(" | ")[1:6] == [
        str(n)
        for n in (devices, sizes["slice"], sizes["data"], sizes["expert"], loaded.moe.group_size)
    ]
