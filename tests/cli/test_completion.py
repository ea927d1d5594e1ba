"""Shell completion, in bash with the script that `switch-jax completion bash` prints."""

import os
import subprocess
import sys
import time

import pytest

from switch_jax.config import preset_names
from tests.support import runs

# Prints the completions of lines that are read from stdin, separated by |, a line for each.
_COMPLETE = """
source <(switch-jax completion bash)
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE} COMPREPLY=()
    _python_argcomplete switch-jax
    (IFS='|'; echo "${COMPREPLY[*]}")
done
"""

# Completes a line; fails if JAX or NumPy was imported.
_IMPORTS = """
import os, sys
from switch_jax.cli import main
def exit(code):
    assert not {"jax", "numpy"} & set(sys.modules), code
    raise SystemExit(code)
os._exit = exit
main([])
"""


def complete(folder, *lines):
    """The completions of lines by bash in a folder, without the spaces behind words."""
    program = folder / "bin" / "switch-jax"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m switch_jax "$@"\n')
    program.chmod(0o755)
    bash = subprocess.run(
        ["bash", "--norc", "-c", _COMPLETE],
        input="".join(f"{line}\n" for line in lines),
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
        **dict(cwd=folder, capture_output=True, text=True, timeout=120, check=True),
    )
    completions = [line.split("|") for line in bash.stdout.split("\n")[:-1]]
    return [sorted(word.strip() for word in words if word) for words in completions]


def test_bash_completes_verbs_flags_and_choices(tmp_path):
    lines = {
        "switch-jax tra": ["train"],
        "switch-jax data p": ["pack", "peek"],
        "switch-jax generate --to": ["--top_k", "--top_p"],
        "switch-jax eval --w": ["--workdir"],
        "switch-jax data peek --split v": ["validation"],
        "switch-jax completion ": ["--help", "--verbose", "bash", "fish", "zsh"],
        "switch-jax generate --seed ": [],
    }
    assert complete(tmp_path, *lines) == list(lines.values())


def test_bash_completes_keys_and_their_values(tmp_path):
    keys, last, values, flags, other = complete(
        tmp_path,
        "switch-jax train --config x --config.moe.second",
        "switch-jax data pack --config.data.pac",
        "switch-jax train --config.model.attention=",
        "switch-jax train --config.mesh.fsdp=T",
        "switch-jax generate --config.",
    )
    assert keys == ["--config.moe.second_policy=", "--config.moe.second_threshold="]
    assert last == ["--config.data.pack="] and values == ["auto", "einsum", "fused"]
    assert flags == ["True"] and other == []  # `generate` takes no config


def test_bash_completes_presets_files_and_folders(tmp_path):
    for name in ("mine.py", "mine.txt"):
        (tmp_path / name).touch()
    (tmp_path / "minefield").mkdir()
    configs, presets, sweeps, files, folders = complete(
        tmp_path,
        "switch-jax train --config min",
        "switch-jax train --config switch_",
        "switch-jax sweep --config ",
        "switch-jax generate --input min",
        "switch-jax generate --workdir=min",
    )
    assert configs == ["mine.py", "minefield/"]
    assert presets == [name for name in preset_names() if name.startswith("switch_")]
    assert set(preset_names("sweeps")) < set(sweeps) and "switch_base" not in sweeps
    assert files == ["mine.py", "mine.txt", "minefield/"] and folders == ["minefield/"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_completes_this_program(shell):
    out, err = runs.run("completion", shell)
    assert "switch-jax" in out and "_ARGCOMPLETE" in out and not err


def test_a_key_is_completed_quickly_and_without_jax(tmp_path):
    line = "switch-jax train --config.model.d_m"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    environment["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "out")
    began = time.perf_counter()
    runs.run(program=("-c", _IMPORTS), **environment)
    # The completion alone takes a third of a second; the test machine is busy.
    assert time.perf_counter() - began < 2
    assert (tmp_path / "out").read_text() == "--config.model.d_model="
