"""The archives of a release: their content, their metadata, and the wheel in another environment.

The environment sees the installed dependencies of this one, but neither this checkout nor this
installation of it: nothing is downloaded.
"""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from switch_jax import __version__
from tests.support.paths import ROOT
from tests.support.runs import write_text

SOURCES = ("LICENSE", "README.md", "setup.cfg", "pyproject.toml", "mkdocs.yml")
TINY = {
    "model.vocab_size": 600,
    "moe.group_size": 32,
    "data.inputs_length": 16,
    "data.targets_length": 8,
    "data.batch_size": 4,
    "train.steps": 2,
    "train.eval_every": 2,
    "train.eval_batches": 1,
    "train.checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The archive of the sources, and the wheel that is built from it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=ignored)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    [sources], [wheel] = output.glob("*.tar.gz"), output.glob("*.whl")
    return sources, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """Folder of the programs of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    install = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
    subprocess.run([*install, "install", "--no-deps", "--no-index", archives[1]], check=True)
    [own] = folder.glob("lib/*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "shared.pth").write_text("\n".join(shared))  # the links in them are not followed
    return folder / "bin"


def run(installed, folder, program, *arguments):
    """Returns what a program of the environment prints, started in a folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [installed / program, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_archive_of_the_sources_has_what_the_checkout_has(archives):
    with tarfile.open(archives[0]) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert names >= set(SOURCES)
    for folder in ("configs", "docs", "scripts", "switch_jax", "tests"):
        files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
        kept = {
            f.as_posix() for f in files if not f.parts[-1].startswith(".") and f.suffix != ".pyc"
        }
        assert kept and not kept - names, folder


def test_the_wheel_has_the_package_and_the_presets_only(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = set(archive.namelist())
    info = f"switch_jax-{__version__}.dist-info/"
    assert all(name.startswith(("switch_jax/", info)) for name in names)
    assert not [name for name in names if "test" in name and not name.startswith("switch_jax/")]
    assert f"{info}licenses/LICENSE" in names
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "switch_jax").rglob("*.*")}
    package = {name for name in package if "__pycache__" not in name and name[-3:] != ".md"}
    presets = {
        f"switch_jax/presets/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.py")
    }
    assert names - {name for name in names if name.startswith(info)} == package | presets


def test_the_index_would_accept_the_archives(archives):
    check = [sys.executable, "-m", "twine", "check", "--strict", *archives]
    subprocess.run(check, check=True, stdout=subprocess.DEVNULL)


def test_the_metadata_names_what_the_package_is(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        text = archive.read(f"switch_jax-{__version__}.dist-info/METADATA").decode()
    about = email.message_from_string(text)
    assert (about["Name"], about["Version"]) == ("switch_jax", __version__)
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.11"
    assert about["Keywords"] and about["Summary"] and about["Author"]
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert about["Description-Content-Type"] == "text/markdown"


def test_the_wheel_works_in_another_environment(installed, tmp_path):
    where = run(installed, tmp_path, "python", "-c", "import switch_jax as s; print(s.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "switch-jax", "--version") == f"switch-jax {__version__}\n"
    assert "num_experts" in run(installed, tmp_path, "switch-jax", "config", "switch_base")
    text = write_text(
        tmp_path / "text", train=["a b c d e f g " * 40] * 9, validation=["a b " * 40]
    )
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    train = ["train", "--config", "switch_tiny:num_experts=2", "--workdir", "runs/tiny"]
    run(
        installed,
        tmp_path,
        *("switch-jax", *train, f"--config.data.mixture={text}", "--config.data.vocabulary=bytes"),
        *settings,
    )
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "2" / "params").is_dir()
