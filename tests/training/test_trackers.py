"""Trackers: the metrics of a run in other records, which continued runs continue."""

import json
import re
import sys

import pytest

from switch_jax.analysis import new_figure
from switch_jax.checkpoint import read_metrics
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli import main
from switch_jax.errors import UserError
from switch_jax.training.trackers import Trackers, find_trackers
from tests.support import runs
from tests.support.configs import tiny

OWN = """
import json

class Lines:
    def __init__(self, workdir, config, first_step):
        self.file = open(workdir / "lines.jsonl", "a")
        self.write(["begin", config["train.steps"], first_step])

    def write(self, value):
        self.file.write(json.dumps(value) + "\\n")
        self.file.flush()

    def log(self, step, values, files):
        self.write([step, values, [file.name for file in files]])

    def close(self):
        self.write(["end"])

class Failing(Lines):
    def log(self, step, values, files):
        raise ConnectionError("the server is gone.\\nTraceback …")

class Broken:
    def __init__(self, *arguments):
        raise ValueError("no key")
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "own.py").write_text(OWN)
    return runs.write_config(folder, runs.make_store(folder))


def train(config, workdir, trackers, steps=6):
    arguments = ["train", "--config", str(config), "--workdir", str(workdir)]
    arguments += [f"--config.train.steps={steps}", f"--config.train.trackers={trackers}"]
    arguments += ["--config.train.eval_every=3", "--config.train.checkpoint_every=3"]
    return main(arguments)


def expected(workdir):
    """Returns the finite values of every step in metrics.jsonl, by name with the split."""
    values = {}
    for line in read_metrics(Workdir(workdir)):
        split, step = line.pop("split"), line.pop("step")
        line.pop("time")
        finite = {f"{split}/{name}": value for name, value in line.items() if value is not None}
        values.setdefault(step, {}).update(finite)
    return values


@pytest.mark.slow
def test_a_class_of_ones_own_gets_all_metrics_of_both_starts(config, tmp_path):
    own = f"{config.parent / 'own.py'}:Lines"
    assert train(config, tmp_path / "run", own, steps=3) == 0
    assert train(config, tmp_path / "run", own) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "lines.jsonl").open()]
    assert [line for line in lines if isinstance(line[0], str)] == [
        ["begin", 3, 0],
        ["end"],
        ["begin", 6, 3],
        ["end"],
    ]
    heard = {}
    for step, values, _ in (line for line in lines if not isinstance(line[0], str)):
        heard.setdefault(step, {}).update(values)
    assert heard == expected(tmp_path / "run") and len(heard) == 6
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_a_failing_tracker_does_not_end_the_run(config, tmp_path, capsys):
    own = f"{config.parent / 'own.py'}:Failing"
    assert train(config, tmp_path / "run", f"{own},tensorboard") == 0
    err = capsys.readouterr().err
    assert err.count("(the server is gone) and receives nothing more") == 1
    assert "Traceback" not in err
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_full_disk_under_tensorboard_is_reported_without_endless_wait(tmp_path, capsys):
    settings = tiny(**{"train.trackers": "tensorboard"})
    trackers = Trackers(settings, Workdir(tmp_path), 0)
    [tensorboard] = trackers._trackers.values()
    recorder = tensorboard._writer._py_recordio_writer
    recorder._writer = open("/dev/full", "wb")  # noqa: SIM115
    for step in (1, 2):
        trackers.log(step, {f"metric_{n}": 1.0 for n in range(100)}, [])
    trackers.close()
    assert capsys.readouterr().err.count("No space left on device) and receives nothing more") == 1


@pytest.mark.parametrize(
    "trackers, sentence",
    [
        ("tensorbord", "no tracker 'tensorbord'; use tensorboard, wandb, mlflow, trackio or FILE"),
        ("{own}:Nothing", "has no function 'Nothing'"),
        ("missing.py:Lines", "there is no file 'missing.py'"),
        ("{own}:Broken", r"cannot begin \(no key\); correct that, or leave it out"),
    ],
)
def test_trackers_that_cannot_begin_are_told(config, tmp_path, capsys, trackers, sentence):
    own = str(config.parent / "own.py")
    assert train(config, tmp_path / "run", trackers.format(own=own)) == 2
    err = capsys.readouterr().err
    assert re.search(sentence, err), err


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'needs wandb: pip install "switch_jax\[trackers\]"'):
        find_trackers(tiny(**{"train.trackers": "wandb"}))


def test_mlflow_without_a_server_needs_the_whole_package(config, tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)  # as with mlflow-skinny
    assert train(config, tmp_path / "run", "mlflow") == 2
    assert "set MLFLOW_TRACKING_URI to a server, or pip install mlflow" in capsys.readouterr().err


def log(tracker, workdir, steps, first_step=0):
    """Logs the metrics and a file of some steps with a tracker."""
    workdir.mkdir(exist_ok=True)
    settings = tiny(**{"train.trackers": tracker, "train.steps": 9})
    trackers = Trackers(settings, Workdir(workdir), first_step)
    for step in steps:
        predictions = workdir / "predictions" / str(step) / "task.jsonl"
        predictions.parent.mkdir(parents=True)
        predictions.write_text(f'{{"step": {step}}}\n')
        trackers.log(step, {"train/loss": 1 / step, "eval/moe.0/load": step}, [predictions])
    if first_step:
        trackers.log_figures(steps[-1], lambda: draw(workdir / "figures"))
    trackers.close()


@pytest.mark.slow
def test_a_finished_run_gives_its_figures_to_trackers(config, tmp_path, capsys, monkeypatch):
    own = f"{config.parent / 'own.py'}:Lines"
    assert train(config, tmp_path / "run", own) == 0
    *_, last, end = [json.loads(line) for line in (tmp_path / "run" / "lines.jsonl").open()]
    assert (last, end) == ([6, {}, ["loss.png", "router.png"]], ["end"])
    assert train(config, tmp_path / "plain", "tensorboard") == 0
    assert not (tmp_path / "plain" / "figures").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert train(config, tmp_path / "without", own) == 0
    assert "no figures for trackers (" in capsys.readouterr().err


def draw(folder):
    """Draws a small figure; returns its file."""
    figure = new_figure(1, 1, (1, 1))
    folder.mkdir()
    figure.savefig(folder / "loss.png")
    return [folder / "loss.png"]


def test_mlflow_continues_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log("mlflow", tmp_path / "run", [1, 2])
    log("mlflow", tmp_path / "run", [3], first_step=2)
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    experiment = client.get_experiment_by_name("switch_jax").experiment_id
    [run] = client.search_runs([experiment])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "9"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in losses] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    files = client.list_artifacts(run.info.run_id, "predictions/3")
    assert [file.path for file in files] == ["predictions/3/task.jsonl"]
    figures = client.list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in figures] == ["figures/loss.png"]


def test_wandb_continues_one_run_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log("wandb", tmp_path / "run", [1, 2])
    log("wandb", tmp_path / "run", [3], first_step=2)
    records = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    number = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert records and all(f"-{number}" in record.name for record in records)
    assert wandb.run is None
    files = {path.name for record in records for path in record.rglob("*.jsonl")}
    assert files == {"task.jsonl"}
    images = {path for record in records for path in record.rglob("media/images/figures/*.png")}
    assert len(images) == 1


def test_trackio_continues_one_run(tmp_path, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    log("trackio", tmp_path / "run", [1, 2])
    log("trackio", tmp_path / "run", [3], first_step=2)
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    logged = storage.SQLiteStorage.get_logs("switch_jax", name)
    *logged, last = logged
    assert (last["step"], last["figures/loss"]["_type"]) == (3, "trackio.image")
    assert [(line["step"], line["train/loss"]) for line in logged] == [
        (1, 1),
        (2, 1 / 2),
        (3, 1 / 3),
    ]
