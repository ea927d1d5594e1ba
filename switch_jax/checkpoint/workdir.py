"""WORKDIR, the folder of a run: its configuration, and where everything in it lies.

config.json            resolved config, package versions, git revision, devices
metrics.jsonl          one JSON object a line
tensorboard/           the same
checkpoints/STEP/      state, data position
figures/*.png
experts/experts.*       what each expert specialises in, as HTML and JSON
predictions/STEP/*.jsonl  what the model answers to the examples of fine-tuning tasks;
                          eval-STEP/ where a checkpoint was evaluated alone
"""

import importlib.metadata
import json
import subprocess
from pathlib import Path

from switch_jax import __version__
from switch_jax.config import (
    Config,
    change_effect,
    config_differences,
    config_from_dict,
    config_to_dict,
)
from switch_jax.errors import UserError
from switch_jax.files import write_atomically


class Workdir:
    """Paths of a run's folder; nothing is created until `prepare`."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.json"
        self.vocabulary = self.path / "vocabulary.model"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.figures = self.path / "figures"
        self.experts = self.path / "experts"
        self.predictions = self.path / "predictions"

    def config(self) -> Config:
        """The config the run was made with; raises `UserError` where there is none."""
        try:
            content = json.loads(self.config_file.read_text())
            if "model_type" in content:
                raise UserError(
                    f"{self.path} is a folder of Hugging Face's; make a WORKDIR of it with"
                    f" `switch-jax convert from-hf {self.path} OUT`."
                )
            return config_from_dict(content["config"])
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} is not a WORKDIR: it has no config.json; name the folder that was"
                " given to `switch-jax train --workdir`."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config_file} cannot be read ({error}); restore it or use another WORKDIR."
            ) from error

    def check(self, config: Config) -> None:
        """Raises `UserError` where the folder holds a run of another model; writes nothing."""
        if self.config_file.exists():
            differences = [
                text
                for key, text in config_differences(self.config(), config).items()
                if change_effect(key) == "checkpoint"
            ]
            if differences:
                raise UserError(
                    f"{self.path} holds a run of another model"
                    f" ({'; '.join(differences)}); use another --workdir."
                )
        elif self.checkpoints.exists():
            raise UserError(
                f"{self.path} has checkpoints but no config.json; use another --workdir."
            )

    def prepare(self, config: Config, vocabulary: bytes | None, devices: str | None = None) -> None:
        """Creates the folder for a run of `config`, which has passed `check`.

        The vocabulary's content stays with the run: the cache's own may be another one on
        another Python. `devices` says what trains it. Raises `UserError` for a WORKDIR of
        another vocabulary, before anything is written, and for a folder that cannot be written.
        """
        if self.vocabulary.exists() and vocabulary not in (None, self.vocabulary.read_bytes()):
            raise UserError(
                f"{self.path} was trained with another vocabulary; set"
                f" data.vocabulary={self.vocabulary}, or use another --workdir."
            )
        content = {
            "config": config_to_dict(config),
            "versions": _versions(),
            "git_revision": _git_revision(),
            "devices": devices,
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if vocabulary is not None:
                write_atomically(self.vocabulary, vocabulary)
            write_atomically(self.config_file, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); use another --workdir."
            ) from error


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"switch_jax": __version__} | {name: importlib.metadata.version(name) for name in names}


def _git_revision() -> str | None:
    """The revision of this source tree, where it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
