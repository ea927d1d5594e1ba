"""Commands of README.md and docs/: found in the pages' code blocks, and run with tiny settings."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from switch_jax.checkpoint.metrics_log import last_metrics
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli import main
from switch_jax.config import load_config
from tests.support.configs import TINY_MODEL
from tests.support.paths import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
# Root folders that commands name; in a test they are below its folder.
ROOTS = ("/data", "/text", "/books", "/mine", "/downloads", "/models", "/t5x")
_MODEL = {
    **TINY_MODEL,
    "model.num_encoder_layers": 1,  # fewer kinds of layers compile faster
    "model.num_decoder_layers": 1,
    "model.vocab_size": 1024,
    "moe.every": 1,
    "moe.group_size": 32,
}
_TRAIN = {
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
# Presets whose text is that of the installed packages, which takes longer to read.
_OWN_TEXT = re.compile(r"(configs/)?switch_(mini|tiny)(\.py)?(:.*)?")


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in a language; commands have none."""
    text = (ROOT / page).read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for found, content in fenced if found == language]


def commands(page: str) -> list[str]:
    """Returns the commands of a page, one line each, without comments."""
    lines = [
        re.sub(r"\s+(#|&$).*", "", line.strip())
        for block in blocks(page, "")
        for line in block.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if line and not line.startswith("#")]


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """Runs a command in the current folder, with tiny settings and its paths below `folder`.

    `settings`: values of more keys that the command does not set.
    """
    for root in ROOTS:
        command = re.sub(rf"(?<![\w./]){root}(?=/|\s|$)", str(folder / root[1:]), command)
    for part in command.split(" && "):
        words = shlex.split(re.sub(r"^taskset --cpu-list \d+ ", "", part))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        if words[0] == "switch-jax":
            _run_verb(words[1:], folder, settings)
        else:
            part = re.sub(r"\bpython\b", sys.executable, part)
            subprocess.run(["bash", "-o", "pipefail", "-c", part], check=True)


def _run_verb(arguments: list[str], folder: Path, settings: dict[str, str]) -> None:
    verb = arguments[0]
    assert main([*arguments, *_tiny_settings(arguments, folder, settings)]) == 0, arguments
    if verb == "train":
        line = last_metrics(Workdir(arguments[arguments.index("--workdir") + 1]))
        assert line is not None and line["split"] == "eval" and line["cross_entropy"] > 0


def _tiny_settings(arguments: list[str], folder: Path, more: dict[str, str]) -> list[str]:
    """Returns arguments that make a command small.

    Sizes of a model replace those of the command; other keys that the command sets stay.
    """
    if arguments[0] == "sweep":
        return [] if "--commands" in arguments else ["--commands"]
    if "--config" not in arguments or "--topology" in arguments:  # a topology is not computed on
        return []
    given = {a.partition("=")[0].removeprefix("--config.") for a in arguments}
    config = arguments[arguments.index("--config") + 1]
    settings = {key: value for key, value in (_TRAIN | more).items() if key not in given}
    if "finetune.py" not in config:  # whose model is that of `init_from`
        settings |= {k: v for k, v in _MODEL.items() if k not in given or k.startswith("model.")}
        if not load_config(config).sparse:
            del settings["moe.num_experts"]
    if _OWN_TEXT.fullmatch(config) and "data.mixture" not in given:
        settings |= {"data.mixture": folder / "text" / "*.jsonl.gz"}
    return [f"--config.{key}={value}" for key, value in settings.items()]
