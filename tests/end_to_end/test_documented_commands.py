"""Every command of README.md and docs/ runs, with tiny models and data, or it is known why not."""

import argparse
import json
import re
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
from flax import nnx

from switch_jax.cli import main
from switch_jax.cli.main import make_parser
from switch_jax.config import describe_groups, describe_keys
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.vocabulary_builder import train_vocabulary
from tests.support import corpora, published_files, t5x
from tests.support.documented_commands import PAGES, ROOTS, blocks, commands, run
from tests.support.paths import ROOT

pytest.importorskip("tensorflow_datasets")
datasets = pytest.importorskip("datasets")

# Commands that are not run here: their beginning, and why.
LEFT_OUT = {
    "pip install": "needs a package index",
    "source .venv/bin/activate": "changes the shell",
    "bash scripts/test.sh": "runs the tests",
    "bash scripts/install_clusters.sh": "installs packages of the system",
    "bash scripts/quickstart.sh": "trains for minutes; test_notebook.py runs its verbs",
    "bash scripts/launch/": "test_launchers.py runs it with --dry-run",
    "gcloud": "needs an account",
    "mpirun": "needs Open MPI; tests/clusters",
    "switch-jax bench": "measures for minutes; test_benchmark.py",
    "switch-jax compile": "needs a compiler of the extra `tpu` or `cuda-compile`",
    "python scripts/bench/": "measures for minutes; test_scripts.py",
    "taskset -c 0 python scripts/bench/": "measures for minutes",
    "python scripts/campaigns/run.py": "takes hours; test_campaigns.py",
    "python scripts/data/": "reads all installed packages; test_scripts.py",
    "python scripts/docs/results.py": "needs a finished sweep; test_scripts.py",
    ".venv/bin/python scripts/docs/finetune_mini.py": "trains three models of the quickstart",
}


FILES = {"train.lock", "train.jsonl", "model.safetensors"}  # files whose names look like keys


def left_out(command):
    uses_bucket = "gs://" in command  # test_buckets.py
    return uses_bucket or command.startswith(tuple(LEFT_OUT))


PAGES_TO_RUN = [page for page in PAGES if not all(map(left_out, commands(page)))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `configs/` and the data, models and runs that commands name."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for root in ROOTS:
        (folder / root[1:]).mkdir()
    for root in ("data", "data/c4"):  # a page names each
        corpora.write_tfds(folder / root, "en", "3.0.1", corpora.c4())
    corpora.write_tfds(folder / "data/mc4", "multilingual", "3.1.0", corpora.mc4())
    for name in ("t5", "mt5"):
        (folder / "data" / name).mkdir()
        train_vocabulary(texts(20), folder / "data" / name / "sentencepiece.model", 1024)
    write_lines(folder / "text" / "a.jsonl", [{"text": text} for text in texts(20)])
    subprocess.run(["gzip", str(folder / "text" / "a.jsonl")], check=True)
    datasets.Dataset.from_dict({"body": texts(20)}).save_to_disk(folder / "books")
    for split in ("train", "validation"):
        pairs = [{"inputs": f"{n} + 1 =", "targets": str(n + 1)} for n in range(9)]
        write_lines(folder / "mine" / f"{split}.jsonl", pairs)
    (folder / "articles.txt").write_text("summarize: A short article.\n")
    write_lines(folder / "articles.jsonl", [{"text": "summarize: A short article."}])
    write_tasks(folder)
    t5x.write_legacy(
        folder / "t5x" / "checkpoint_500100",
        t5x.t5x_arrays(t5x.random_model("switch", **{"model.vocab_size": 1024})),
    )
    return folder


@pytest.fixture(scope="module")
def trained(world):
    """The world with a sparse and a dense run in `trained/`, and the sparse one as exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        patch.setenv("SWITCH_JAX_CACHE", str(world / "cache"))
        for name, preset in (("sparse", "switch_base:num_experts=4"), ("dense", "t5_base")):
            train = f"switch-jax train --config {preset}"
            text = "--config.data.reader=store --config.data.mixture=/text/a.jsonl.gz"
            run(f"{train} --workdir trained/{name} {text}", world, patch)
        assert main(["convert", "to-hf", "trained/sparse", "models/switch-base-8"]) == 0
    return world


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the world, which is the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(trained / "cache"))
    return tmp_path


def texts(count):
    return [document.text for document in python_documents()][:count]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tasks(folder):
    """Writes the zips of GLUE and SuperGLUE, and what SuperGLUE's does not have."""
    published = folder / "published"
    for name in published_files.GLUE:
        published_files.write_archive(published / "glue", name)
    for name in published_files.SUPER_GLUE.keys() - {"super_glue.dpr"}:
        published_files.write_archive(published / "combined", name)
    (folder / "downloads" / "glue").mkdir()
    for part in (published / "glue").iterdir():
        zip_folders(folder / "downloads" / "glue" / f"{part.name}.zip", [part])
    zip_folders(folder / "downloads" / "combined.zip", (published / "combined").iterdir())
    published_files.write_archive(folder / "data" / "tasks", "super_glue.dpr")


def zip_folders(path, folders):
    with zipfile.ZipFile(path, "w") as archive:
        for root in folders:
            for file in root.rglob("*"):
                archive.write(file, file.relative_to(root.parent))


def runs_from_before(found):
    """Returns the runs that are used before any of the commands writes them."""
    output = r"(?:(?:train|sweep) .*?--workdir|--output|convert \S+ \S+) (runs/[\w-]+)"
    is_used_first = {}
    for command in found:
        written = re.findall(output, command)
        for name in re.findall(r"runs/[\w-]+", command):
            is_used_first.setdefault(name, name not in written)
    return [name for name, used_first in is_used_first.items() if used_first]


@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_commands_of_the_page(page, folder, monkeypatch):
    found = [command for command in dict.fromkeys(commands(page)) if not left_out(command)]
    for name in runs_from_before(found):
        kind = "dense" if name == "runs/dense" else "sparse"
        shutil.copytree(folder / "trained" / kind, folder / name)
    if not any("unzip" in command for command in found):
        for archive in folder.glob("downloads/**/*.zip"):
            zipfile.ZipFile(archive).extractall(folder / "data" / "tasks")
    mixtures = {} if page == "docs/finetune.md" else {"data.mixture": "glue.rte"}
    # A page may show how to train on files before it says how to get them.
    for command in sorted(found, key=lambda command: "unzip" not in command):
        run(command, folder, monkeypatch, **(mixtures if "finetune.py" in command else {}))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_of_the_page(page, folder):
    shutil.copytree(folder / "trained" / "sparse", folder / "runs" / "quickstart")
    tokens = np.ones((2, 8), np.int32)
    names = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
    for block in blocks(page, "python"):
        exec(block.replace('"/models/', f'"{folder}/models/'), names)
    assert isinstance(names["model"], nnx.Module)


def test_every_reason_is_that_of_a_command():
    every = [command for page in PAGES for command in commands(page)]
    assert len(every) > 60
    assert not [start for start in LEFT_OUT if not any(c.startswith(start) for c in every)]


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_have_verbs_and_options_that_exist(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`(?:[A-Z_]+=\S+ )?switch-jax ([^`]+)`", text):
        parser, words = make_parser(), command.split()
        assert words[0] in {*verbs_of(parser), "VERB", "--version"}, command
        while words and words[0] in (verbs := verbs_of(parser)):
            parser = verbs[words.pop(0)]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = {option for action in parser._actions for option in action.option_strings}
        assert {o for o in options if not o.startswith("--config.")} <= known, command


def verbs_of(parser):
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return groups[0].choices if groups else {}


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_a_page_names_exist(page):
    keys, groups = describe_keys(), "|".join(name for name in describe_groups() if name)
    named = re.findall(
        rf"(?:`|config\.)((?:{groups})\.[a-z]\w*)(?=[`=\s])", (ROOT / page).read_text()
    )
    assert not set(named) - set(keys) - FILES
