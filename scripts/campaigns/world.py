"""The small world of a campaign: text, vocabularies, models of every kind, and a command per verb.

Everything is made by `switch-jax` itself in a few seconds, but for the T5X checkpoint.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from scripts.campaigns.processes import run

_MODEL = """
    config.model.update(
        vocab_size=640, d_model=16, d_ff=32, num_heads=2, head_dim=8,
        num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1, dtype="float32",
    )
    config.moe.update(num_experts=4, every=1, min_capacity=1, group_size=32)
    config.optimizer.update(warmup_steps=4)
    config.train.update(
        steps=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2
    )
    config.mesh.data = 1
"""
_LENGTHS = "inputs_length=32, targets_length=11, batch_size=4"
_CONFIG = """from switch_jax.config import defaults, parse_arg


def get_config(arg=""):
    parse_arg(arg)
    config = defaults()
{model}
    config.data.update({data}, {lengths})
{more}
    return config
"""
_TEXT = 'mixture="text-{split}.jsonl", vocabulary="vocabulary.model"'
_PAIRS = 'mixture="pairs:pairs-{split}.jsonl", vocabulary="vocabulary.model"'
_SHORT = "    config.train.update(steps=4, eval_every=2, checkpoint_every=2)\n"
# Name of a config file → its data and what else it changes.
_CONFIGS = {
    "text.py": (_TEXT, ""),
    "tiny.py": ('mixture="text", data_dir="store"', ""),
    "dense.py": ('mixture="text", data_dir="store"', _SHORT + "    config.moe.num_experts = 0"),
    "pairs.py": (_PAIRS, _SHORT + '    config.init_from = "run"'),
    "distil.py": (
        'mixture="text", data_dir="store"',
        _SHORT + '    config.moe.num_experts = 0\n    config.distill.teacher = "run"',
    ),
}
_SWEEP = """from switch_jax.sweeps import Sweep, SweepRun, Table


def get_sweep(arg=""):
    short = {"train.steps": 2, "train.eval_every": 2, "train.checkpoint_every": 2}
    return Sweep(
        "Two runs",
        {"dense": SweepRun("tiny.py", {**short, "moe.num_experts": 0}),
         "sparse": SweepRun("tiny.py", short)},
        tables={"loss": Table("Loss", "sparse is better", {"Dense": "dense", "Sparse": "sparse"})},
    )
"""


@dataclass(frozen=True)
class Command:
    """A command line that succeeds in the world."""

    verb: str
    arguments: tuple[str, ...]
    results: tuple[str, ...] = ()  # paths that it writes
    prints: bool = False  # whether what it prints is its result


def _command(verb: str, *arguments: str, results: str = "", prints: bool = False) -> Command:
    return Command(verb, (*verb.split(), *arguments), tuple(results.split()), prints)


def _training(verb: str, config: str) -> Command:
    return Command(verb, ("train", "--config", config, "--workdir", "new"), ("new",))


_RUN = ("--workdir", "run")
# All commands write to `new`.
COMMANDS = {
    command.verb: command
    for command in (
        _training("train", "tiny.py"),
        _training("fine-tune", "pairs.py"),
        _training("distil", "distil.py"),
        _command("data vocab", "--config", "text.py", "--output", "new", results="new"),
        _command(
            "data pack", "--config", "text.py", "--output", "new", "--workers", "2", results="new"
        ),
        _command("data peek", "--config", "tiny.py", "--count", "2", prints=True),
        _command("convert from-hf", "hf", "new", results="new"),
        _command("convert to-hf", "run", "new", results="new"),
        _command("convert from-t5x", "t5x", "new", results="new"),
        _command("convert upcycle", "dense", "new", "--config.moe.num_experts=2", results="new"),
        _command("export", *_RUN, "--output", "new", results="new"),
        _command("sweep", "--config", "sweep.py", "--workdir", "new", results="new"),
        _command("experts", *_RUN, "--output", "new", results="new"),
        _command("eval", *_RUN, "--json", prints=True),
        _command("generate", *_RUN, "--text", "import ___ as np", "--max_length", "8", prints=True),
        _command("plot", *_RUN, "--output", "new", results="new"),
        _command("inspect", *_RUN, "--json", prints=True),
        _command("compile", "--config", "tiny.py", "--topology", "cpu:1"),
        _command("bench", "--config", "tiny.py", "--repeats", "1"),
    )
}


def make_world(folder: Path) -> None:
    """Fills a folder; every command of `COMMANDS` can be run in a copy of it."""
    folder.mkdir(parents=True)
    _write_text(folder)
    for name, (data, more) in _CONFIGS.items():
        values = {"model": _MODEL.strip("\n"), "data": data, "lengths": _LENGTHS, "more": more}
        (folder / name).write_text(_CONFIG.format(**values))
    (folder / "sweep.py").write_text(_SWEEP)
    text = ("--config", "text.py", "--config.model.vocab_size=600", "--output")
    _make(folder, "data", "vocab", *text, "vocabulary.model", "--megabytes", "0.1")
    _make(folder, "data", "pack", *text, "store", "--workers", "1")
    _make(folder, "train", "--config", "tiny.py", "--workdir", "run")
    _make(folder, "train", "--config", "dense.py", "--workdir", "dense")
    _make(folder, "convert", "to-hf", "run", "hf")
    _complete_hf(folder / "hf")
    _write_t5x(folder / "t5x")
    # The run as a kill after step 6 would leave it.
    shutil.copytree(folder / "run", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "8")
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _make(folder: Path, *arguments: str) -> None:
    ended = run(arguments, folder, timeout=600)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {ended.err}")


def _write_text(folder: Path) -> None:
    """Writes the beginnings of a few modules of Python, as text and as pairs."""
    from tests.support.corpora import documents

    for split, skip in (("train", 0), ("validation", 40)):
        texts = documents(8, skip)
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"text-{split}.jsonl").write_text("".join(lines))
        pairs = [{"inputs": text[:60], "targets": text[60:75]} for text in texts]
        lines = [json.dumps(pair) + "\n" for pair in pairs]
        (folder / f"pairs-{split}.jsonl").write_text("".join(lines))


def _complete_hf(folder: Path) -> None:
    """Adds what larger models have: several files of weights, and generation settings."""
    from safetensors.numpy import load_file, save_file

    weights = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": weights[::2], "model-2.safetensors": weights[1::2]}
    for name, tensors in parts.items():
        save_file(dict(tensors), folder / name, {"format": "pt"})
    file_of_tensor = {tensor: name for name, tensors in parts.items() for tensor, _ in tensors}
    index = {"metadata": {}, "weight_map": file_of_tensor}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def _write_t5x(folder: Path) -> None:
    from tests.support.t5x import random_model, t5x_arrays, write_legacy

    write_legacy(folder, t5x_arrays(random_model("switch-c")))
