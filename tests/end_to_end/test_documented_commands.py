"""The commands of docs/data.md and docs/finetune.md, in order, with tiny models and data."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from switch_jax.cli import main
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.vocabulary_builder import train_vocabulary
from tests.support import corpora, published_files
from tests.support.configs import TINY_MODEL
from tests.support.paths import ROOT

pytest.importorskip("tensorflow_datasets")
datasets = pytest.importorskip("datasets")

MODEL = {**TINY_MODEL, "model.vocab_size": 1024, "moe.every": 2, "moe.group_size": 32}
TRAIN = {
    "data.inputs_length": 32,
    "data.targets_length": 14,
    "data.batch_size": 4,
    "train.steps": 2,
    "train.log_every": 1,
    "train.eval_every": 2,
    "train.eval_batches": 1,
    "train.checkpoint_every": 2,
    "train.accumulate": 1,
    "mesh.data": 1,
}
# Root folders of the pages' commands; here they are folders of the test.
ROOTS = ("/data", "/text", "/books", "/mine", "/downloads")
TOO_LONG = {
    ".venv/bin/python scripts/docs/finetune_mini.py": "trains three models of the quickstart"
}


def commands(page):
    """Returns the command lines of a page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    starts = ("switch-jax ", "for ", "unzip ", ".venv/bin/python ")
    return [line.strip() for line in lines if line.startswith(starts)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Current folder with `configs/`, and the folders that the commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for root in ROOTS:
        (tmp_path / root[1:]).mkdir()
    return tmp_path


def run(command, folder):
    """Runs a command of a page with tiny settings; its paths are below `folder`."""
    for root in ROOTS:
        command = re.sub(rf"(?<![\w./]){root}(?=/|\s|$)", str(folder / root[1:]), command)
    if not command.startswith("switch-jax "):
        subprocess.run(["bash", "-c", command], check=True)
        return
    verb, *arguments = shlex.split(command)[1:]
    given = {a.partition("=")[0].removeprefix("--config.") for a in arguments if "--config." in a}
    if "--config" in arguments:
        tiny = TRAIN if "init_from" in given else MODEL | TRAIN
        tiny = {key: value for key, value in tiny.items() if key not in given}
        arguments += [f"--config.{key}={value}" for key, value in tiny.items()]
    assert main([verb, *arguments]) == 0, command


def texts(start, count):
    return [document.text for document in python_documents()][start : start + count]


def write_lines(path, field, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


@pytest.mark.parametrize("page", ["data.md", "finetune.md"])
def test_the_pages_have_commands(page):
    found = commands(page)
    assert len(found) > 8 and set(found) - set(TOO_LONG)


def test_commands_of_the_data_page(folder):
    for root in ("data", "data/c4"):  # a page names each
        corpora.write_tfds(folder / root, "en", "3.0.1", corpora.c4())
    corpora.write_tfds(folder / "data/mc4", "multilingual", "3.1.0", corpora.mc4())
    for name in ("t5", "mt5"):
        (folder / "data" / name).mkdir()
        train_vocabulary(texts(0, 20), folder / "data" / name / "sentencepiece.model", 1024)
    write_lines(folder / "text" / "a.jsonl", "text", texts(0, 20))
    subprocess.run(["gzip", str(folder / "text" / "a.jsonl")], check=True)
    books = datasets.Dataset.from_dict({"body": texts(0, 20)})
    books.save_to_disk(folder / "books")
    for command in commands("data.md"):
        if command.startswith("switch-jax plot"):  # draws a run that no command makes
            shutil.copytree(folder / "runs" / "mswitch", folder / "runs" / "mt5_base")
            command = command.replace("mswitch_base", "mswitch")
        run(command, folder)
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == ["base64", "books", "mine", "mswitch", "mt5_base", "packed64", "ul2"]


def test_commands_of_the_finetuning_page(folder):
    rng = np.random.default_rng(0)
    published = folder / "published"
    for archive, names in (
        ("glue", published_files.GLUE),
        ("combined", published_files.SUPER_GLUE.keys() - {"super_glue.dpr"}),
    ):
        for name in names:
            published_files.write_archive(published / archive, name)
    for part in (published / "glue").iterdir():
        zip_folder(folder / "downloads" / "glue" / f"{part.name}.zip", part)
    zip_folder(folder / "downloads" / "combined.zip", *(published / "combined").iterdir())
    # What the page says is not in the zip.
    published_files.write_archive(folder / "data" / "tasks", "super_glue.dpr")
    write_lines(folder / "text" / "a.jsonl", "text", texts(0, 20))
    base = "switch-jax train --config configs/switch_base.py --workdir runs/base64"
    base += " --config.data.reader=store --config.data.mixture=/text/a.jsonl"
    run(base, folder)
    for split in ("train", "validation"):
        pairs = [
            json.dumps({"inputs": str(n), "targets": str(n + 1)}) for n in rng.integers(0, 99, 9)
        ]
        (folder / "mine" / f"{split}.jsonl").write_text("\n".join(pairs))
    Path("articles.txt").write_text("summarize: A short article.\n")
    Path("articles.jsonl").write_text('{"text": "summarize: A short article."}\n')
    # The page shows how to fine-tune on GLUE before it says how to get its files.
    found = [command for command in commands("finetune.md") if command not in TOO_LONG]
    found.sort(key=lambda command: not command.startswith(("for ", "unzip ")))
    for command in found:
        if "generate" in command:  # runs that no command of the page makes
            for name in ("xsum", "quickstart"):
                shutil.copytree(folder / "runs/glue", folder / "runs" / name, dirs_exist_ok=True)
        run(command, folder)
    scores = folder / "runs" / "superglue" / "metrics.jsonl"
    assert "average" in json.loads(scores.read_text().splitlines()[-1])


def zip_folder(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [entry.name for entry in entries]
    command = ["python3", "-m", "zipfile", "-c", str(path), *names]
    subprocess.run(command, check=True, cwd=entries[0].parent)
