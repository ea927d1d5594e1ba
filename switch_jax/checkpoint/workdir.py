"""WORKDIR, the folder of a run: its config and the paths of its files.

config.json               resolved config, package versions, git revision, devices
vocabulary.model          the run's vocabulary
metrics.jsonl             metrics, one JSON object per line; metrics.damaged.jsonl: as it was before
                          a start removed damaged lines
tensorboard/              the same metrics
trackers.json             ids of the run's records with other trackers (`train.trackers`)
checkpoints/STEP/         parameters, optimizer state, data position
figures/*.png             figures of the metrics
experts/experts.*         expert specialisation report, as HTML and JSON
predictions/STEP/*.jsonl  the model's answers to the examples of fine-tuning tasks; eval-STEP/ where
                          `switch-jax eval` evaluated a checkpoint
profile/                  trace of some train steps (`train.profile_steps`)
train.lock                locked while a process trains in the folder; names the process

Of a WORKDIR in a bucket, each process has a local copy without the larger folders, which the
process that trains uploads as it changes. Checkpoints in gs:// are written and read there by Orbax;
those in s3:// are part of the copy.
"""

import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from switch_jax import __version__
from switch_jax.config import (
    Config,
    change_effect,
    config_differences,
    config_from_dict,
    config_to_dict,
    read_json,
)
from switch_jax.errors import UserError
from switch_jax.files import (
    COMMIT_FILE,
    SyncedFolder,
    as_path,
    hold_lock,
    is_bucket,
    list_files,
    path_within,
    remove,
    write_atomically,
)

_CHECKPOINTS = "checkpoints"
_LEFT_IN_BUCKET = (_CHECKPOINTS, "tensorboard", "figures", "experts", "predictions", "profile")
_MAX_STEP = 2**31 - 1


class RunRecord(NamedTuple):
    """Origin of a run; None for what is not recorded.

    config_digest: BLAKE2b of the config, 32 hexadecimal digits.
    version: of switch_jax.
    git_revision: of the checkout of switch_jax.
    devices: description of the devices that train the run.
    """

    config_digest: str
    version: str | None
    git_revision: str | None
    devices: str | None


class Workdir:
    """Paths in a run's folder; creates nothing there before `prepare`.

    Attributes:
      location: the folder, on a disk or in a bucket.
      path: the folder on the local disk: `location`, or the copy of one in a bucket.
    """

    def __init__(self, path: str | Path):
        self.location = as_path(path)
        self._copy = None
        if is_bucket(self.location):
            self._copy = SyncedFolder(self.location, _LEFT_IN_BUCKET)
        self.path = self.location if self._copy is None else self._copy.folder
        self.config_file = self.path / "config.json"
        self.vocabulary = self.path / "vocabulary.model"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.trackers_file = self.path / "trackers.json"
        # Orbax writes to gs:// itself, and not to s3://.
        self._copies_checkpoints = os.fspath(self.location).startswith("s3://")
        parent = self.path if self._copies_checkpoints else self.location
        self.checkpoints = parent / _CHECKPOINTS
        self.figures = self.location / "figures"
        self.experts = self.location / "experts"
        self.predictions = self.path / "predictions"
        self.profile = self.path / "profile"
        self.lock_file = self.path / "train.lock"

    def config(self) -> Config:
        """Returns the run's config.

        Raises `UserError` where config.json is missing or invalid, a file of the run is a
        symbolic link that leads out of the folder, or vocabulary.model is not the run's.
        """
        for file in (self.config_file, self.vocabulary):
            path_within(self.path, file.name)
        content = self._content()
        recorded = content.get("vocabulary_digest")  # absent in WORKDIRs of older versions
        if recorded is not None and self.vocabulary.is_file() and self._digest() != recorded:
            raise UserError(
                f"{self._shown(self.vocabulary)} is not the file that the run was trained with;"
                " restore it."
            )
        try:
            return config_from_dict(content["config"])
        except UserError as error:
            where = "" if str(self.path) in str(error) else f"{self._shown(self.config_file)}: "
            raise UserError(f"{where}{error}") from error

    def record(self) -> RunRecord:
        """Returns what config.json has recorded of the run; raises like `config`."""
        content = self._content()
        config = json.dumps(content["config"], sort_keys=True).encode()
        digest = hashlib.blake2b(config, digest_size=16).hexdigest()
        versions = content.get("versions")
        version = versions.get("switch_jax") if isinstance(versions, dict) else None
        texts = (version, content.get("git_revision"), content.get("devices"))
        return RunRecord(digest, *(text if isinstance(text, str) else None for text in texts))

    def _content(self) -> dict[str, Any]:
        """Returns config.json, with a `config` that is an object."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.location} is not a WORKDIR: it has no config.json; name the folder that was"
                " given to `switch-jax train --workdir`."
            )
        content = read_json(self.config_file)
        if isinstance(content, dict) and "model_type" in content:
            raise UserError(
                f"{self.location} is a folder of Hugging Face's; make a WORKDIR of it with"
                f" `switch-jax convert from-hf {shlex.quote(str(self.location))} OUT`."
            )
        if not (isinstance(content, dict) and isinstance(content.get("config"), dict)):
            raise UserError(
                f"{self._shown(self.config_file)} has no `config` as `switch-jax train` writes it;"
                " restore it or use another WORKDIR."
            )
        return content

    def check(self, config: Config) -> None:
        """Raises `UserError` where the folder holds another run; writes nothing.

        So it does in several processes for a folder in s3://.
        """
        if jax.process_count() > 1 and self._copies_checkpoints:
            raise UserError(
                f"{self.location} takes the checkpoints of one process only; name a folder in gs://"
                " or on a disk that all processes see."
            )
        if self.config_file.exists():
            if differences := self.changes(config, "checkpoint"):
                raise UserError(
                    f"{self.location} holds another run ({'; '.join(differences)}); use another"
                    " --workdir."
                )
        elif self.has_checkpoints():
            raise UserError(
                f"{self.location} has checkpoints but no config.json; use another --workdir."
            )

    def changes(self, config: Config, *effects: str) -> list[str]:
        """Returns texts of the values, of keys with these effects, that differ from the run's.

        Empty where the folder has no config.json.
        """
        if not self.config_file.exists():
            return []
        return [
            text
            for key, text in config_differences(self.config(), config).items()
            if change_effect(key) in effects
        ]

    def check_vocabulary(self, content: bytes) -> None:
        """Raises `UserError` where the folder holds a run of another vocabulary."""
        if self.vocabulary.exists() and content != self.vocabulary.read_bytes():
            raise UserError(
                f"{self.location} was trained with another vocabulary; set"
                f" data.vocabulary={self._shown(self.vocabulary)}, or use another --workdir."
            )

    def has_checkpoints(self) -> bool:
        """Whether a run has begun to save checkpoints here."""
        return (self.location / _CHECKPOINTS).exists()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in increasing order."""
        return step_numbers(self.location / _CHECKPOINTS)

    def checkpoint_location(self, step: int) -> Path:
        """Returns the folder of a checkpoint as users name it, on a disk or in a bucket."""
        return self.location / _CHECKPOINTS / str(step)

    def open_checkpoint(self, step: int) -> Path:
        """Returns the folder of a checkpoint, from which it can be read."""
        folder = self.checkpoints / str(step)
        if self._copy is not None and self._copies_checkpoints and not folder.exists():
            name = f"{_CHECKPOINTS}/{step}"
            files = list_files(self.location / name)
            self._copy.download([f"{name}/{file}" for file in files])
        return folder

    def lock(self) -> AbstractContextManager[None]:
        """Creates the folder and holds its lock: only one process may train in it at a time.

        Readers need no lock. Raises `UserError` where another process holds it.
        """
        if self._copy is not None:
            return self._hold_in_bucket(self._copy)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        return hold_lock(self.lock_file, f"trains in {self.location}")

    @contextmanager
    def _hold_in_bucket(self, copy: SyncedFolder) -> Iterator[None]:
        task = f"trains in {self.location}"
        with copy.held(self.lock_file.name, task, lambda: self._upload(copy)):
            copy.download(list_files(self.location, _LEFT_IN_BUCKET))  # another process's changes
            if self._copies_checkpoints:
                self._download_checkpoints(copy)
            yield

    def _download_checkpoints(self, copy: SyncedFolder) -> None:
        """Downloads the complete checkpoints, and removes what a killed process left of others."""
        complete, folder = set(self.steps()), self.location / _CHECKPOINTS
        files = [name for name in list_files(folder) if is_step(name.partition("/")[0])]
        whole = [name for name in files if int(name.partition("/")[0]) in complete]
        remove(folder, set(files) - set(whole))
        copy.download([f"{_CHECKPOINTS}/{name}" for name in whole])

    def upload(self) -> None:
        """Uploads what has changed in the copy of a WORKDIR in a bucket.

        Raises `UserError` where the bucket cannot be reached.
        """
        if self._copy is not None:
            self._upload(self._copy)

    def try_upload(self) -> None:
        """Does the same as `upload`, but reports an error on stderr, and goes on."""
        if self._copy is not None:
            with self._copy.reporting_errors():
                self._upload(self._copy)

    def _upload(self, copy: SyncedFolder) -> None:
        steps = step_numbers(self.checkpoints) if self._copies_checkpoints else []
        copy.upload(
            lambda name: "orbax-checkpoint-tmp" not in name,
            complete=[f"{_CHECKPOINTS}/{step}" for step in steps],
        )

    def prepare(self, config: Config, vocabulary: bytes | None, devices: str | None = None) -> None:
        """Creates the folder and writes config.json and vocabulary.model.

        Args:
          config: the run's config, which has passed `check`.
          vocabulary: content of its `vocabulary.model`. It is stored with the run, because the
            cache of another Python version may have another vocabulary.
          devices: description of the devices that train the run.

        Raises `UserError` for a WORKDIR of another vocabulary, before anything is written, and for
        a folder that cannot be written.
        """
        if vocabulary is not None:
            self.check_vocabulary(vocabulary)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if vocabulary is not None:
                write_atomically(self.vocabulary, vocabulary)
            content = {
                "config": config_to_dict(config),
                "vocabulary_digest": self._digest() if self.vocabulary.is_file() else None,
                "versions": _versions(),
                "git_revision": _git_revision(),
                "devices": devices,
            }
            write_atomically(self.config_file, (json.dumps(content, indent=2) + "\n").encode())

    def _shown(self, file: Path) -> Path:
        """Returns the path of a file in the folder as the user knows it."""
        return self.location / file.name

    def _digest(self) -> str:
        return hashlib.blake2b(self.vocabulary.read_bytes(), digest_size=16).hexdigest()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises `UserError` in place of the errors of a folder that cannot be written."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.location} cannot be written ({error.strerror}); use another --workdir."
            ) from error


def step_numbers(checkpoints: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint, in increasing order.

    Other names are ignored. On a disk, Orbax renames a checkpoint when it is complete; in a bucket
    it has a commit file then.
    """
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    folders = {int(name): checkpoints / name for name in names if is_step(name)}
    return sorted(
        step
        for step, folder in folders.items()
        if ((folder / COMMIT_FILE).exists() if is_bucket(checkpoints) else folder.is_dir())
    )


def is_step(name: str) -> bool:
    """Whether Orbax would give this name to a step: decimal, without zeros before it."""
    return name.isdecimal() and str(int(name)) == name and int(name) <= _MAX_STEP


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"switch_jax": __version__} | {name: importlib.metadata.version(name) for name in names}


def _git_revision() -> str | None:
    """Returns the git revision of this source tree; None where it is no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
