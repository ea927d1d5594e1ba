"""Every fine-tuning task, from files to metrics and predictions."""

import json

import numpy as np
import pytest

from switch_jax.cli.main import main
from switch_jax.data.finetuning.task_mixtures import find_task_or_mixture
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.sources.source import SPLITS
from switch_jax.data.vocabulary_builder import train_vocabulary
from tests.support import published_files
from tests.support.paths import CONFIGS

FINETUNE = CONFIGS / "finetune.py"

WITHOUT_VALIDATION = {"glue.mnli", "super_glue.dpr"}
UNLABELLED = {"glue.ax", "super_glue.axb", "super_glue.axg"}  # have predictions, but no metrics


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folder with all tasks, in the files of their authors, or of the hub where those have none."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for name, task in TASKS.items():
        if name.startswith("closed_book."):
            continue
        if name in published_files.ARCHIVES:
            published_files.write_archive(root, name)
        else:
            published_files.write_hub_repository(root, task, rng)
    published_files.write_closed_book_archives(root)
    return root


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_vocabulary([d.text for d in python_documents()[:20]], path, 900)
    return path


SMALL = [
    f"--config.{setting}"
    for setting in (
        *("model.vocab_size=900", "model.d_model=16", "model.d_ff=32", "model.num_heads=2"),
        *("model.head_dim=8", "model.num_encoder_layers=2", "model.num_decoder_layers=2"),
        *("model.dtype=float32", "moe.num_experts=4", "moe.group_size=64", "mesh.data=1"),
        *("data.inputs_length=64", "data.targets_length=8", "data.batch_size=8"),
        *("train.steps=20", "train.log_every=10", "train.eval_every=20", "train.eval_batches=1"),
        *("train.checkpoint_every=20", "init_model=config"),
    )
]


@pytest.mark.parametrize(
    "task, method",
    [
        ("glue", "generate"),
        ("superglue", "rank"),
        ("winogrande", "rank"),
        *((name, "generate") for name in ("squad", "arc", "anli", "closed_book_qa")),
        *((name, "generate") for name in ("cnn_dailymail", "xsum", "wmt_ende", "wmt_enro")),
    ],
)
def test_tasks_run_from_files_to_metrics(data_dir, vocabulary, tmp_path, monkeypatch, task, method):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    spec, workdir = f"{FINETUNE}:task={task}", tmp_path / "run"
    settings = [f"--config.data.data_dir={data_dir}", f"--config.data.vocabulary={vocabulary}"]
    settings.append(f"--config.eval.method={method}")
    arguments = ["train", "--config", spec, *SMALL, *settings, "--workdir", str(workdir)]
    assert main(arguments) == 0
    mixture = json.loads((workdir / "config.json").read_text())["config"]["data"]["mixture"]
    [*_, evaluated] = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    task_mixture = find_task_or_mixture(mixture)
    for name in set(task_mixture.rates) - WITHOUT_VALIDATION:
        task = TASKS[name]
        if name in UNLABELLED:
            assert f"{name}/score" not in evaluated
        else:
            assert -100 <= evaluated[f"{name}/score"] <= 100
        lines = (workdir / "predictions" / "20" / f"{name}.jsonl").read_text().splitlines()
        examples = [json.loads(line) for line in lines]
        assert examples and set(examples[0]) == {*("inputs", "targets", "answer", "prediction")}
        if method == "rank" and task.classes and name != "super_glue.wsc":
            assert {example["prediction"] for example in examples} <= set(task.classes)
            assert evaluated.get(f"{name}/invalid", 0) == 0
    assert "average" in evaluated
    assert not {f"{name}/score" for name in WITHOUT_VALIDATION} & set(evaluated)


def test_splits_are_train_validation_and_test():
    assert {split for task in TASKS.values() for split in task.splits} <= {*SPLITS, "test"}
