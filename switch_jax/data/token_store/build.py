"""Writing packed records: all documents of a mixture, tokenised, by several processes.

Every shard of the text becomes a shard of tokens, whichever process tokenises it, so that the
same text gives the same files. A file beside a shard says that it is done: a pack that was
interrupted goes on there.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from switch_jax.config import DataConfig
from switch_jax.data.finetuning.task_source import TaskSource, examples_to_json
from switch_jax.data.mixture import find_sources
from switch_jax.data.sources.bad_records import MISSING, BadRecordAction, BadRecords
from switch_jax.data.sources.source import SPLITS, Shard, Source, Split
from switch_jax.data.token_store.store import (
    FORMAT,
    MANIFEST,
    examples_path,
    is_store,
    offsets_path,
    tokens_path,
)
from switch_jax.data.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary
from switch_jax.errors import UserError
from switch_jax.files import write_atomically

_PLAN = "plan.json"  # what an incomplete store is going to be
_LOCK = ".lock"
_SPEAK_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class _Task:
    """A shard of text that becomes shard `number` of its split in the store."""

    source: Source
    split: Split
    number: int
    shard: Shard
    store: Path

    @property
    def folder(self) -> Path:
        return self.store / self.source.name / self.split

    @property
    def done(self) -> Path:
        """The file that says what the shard holds, written after it."""
        return self.folder / f"{self.number:05d}.json"


def build_token_store(
    data: DataConfig, vocabulary: Vocabulary, output: Path, workers: int
) -> dict[str, Any]:
    """Packs all sources of a mixture into a store at `output`, with progress on stderr.

    A store that the same call left incomplete there is completed; one that is complete stays as
    it is. Records that cannot be read are left out and told in one sentence, or end the work, as
    `data.on_bad_record` says.

    Returns the manifest. Raises `UserError`, also where `output` holds anything else.
    """
    sources = find_sources(data)
    tasks = [
        _Task(source, split, number, shard, output)
        for source in sources
        for split in SPLITS
        for number, shard in enumerate(source.shards(split))
    ]
    if output.exists() and not _ours(output):
        raise UserError(f"{output} exists and is no packed text; choose another --output.")
    with _alone(output):
        return _pack(data, vocabulary, output, workers, sources, tasks)


def _pack(
    data: DataConfig,
    vocabulary: Vocabulary,
    output: Path,
    workers: int,
    sources: list[Source],
    tasks: list[_Task],
) -> dict[str, Any]:
    if _claim(output, _plan(tasks, vocabulary)):
        _tidy(output, tasks)
        return json.loads((output / MANIFEST).read_text())
    bad = BadRecords(data.on_bad_record)
    for source in sources:
        for split in SPLITS:
            for path in source.missing_files(split):
                bad.add(MISSING, path)
    (output / VOCABULARY_FILE).write_bytes(vocabulary.content)
    todo = []
    with _Progress(sum(task.shard.size for task in tasks)) as progress:
        for task in tasks:
            if task.done.is_file():
                progress.finished(task, 0)
            else:
                todo.append(task)
        for task, tokens in _run(todo, data.on_bad_record, workers):
            progress.finished(task, tokens)
    manifest = _plan(tasks, vocabulary) | _held(sources, tasks, vocabulary, bad)
    write_atomically(output / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _tidy(output, tasks)
    progress.say(bad.summary())
    return manifest


def _ours(output: Path) -> bool:
    """Whether there is nothing at `output` but what a pack has written, complete or not."""
    if not output.is_dir():
        return False
    visible = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    return not visible or not {MANIFEST, _PLAN}.isdisjoint(visible)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds `output` against other packs; raises `UserError` where one is at work."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / _LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise UserError(
            f"Another process packs into {output}; wait for it, or choose another --output."
        ) from error
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        if error.filename is None or not str(error.filename).startswith(str(output)):
            raise
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output."
        ) from error


def _tidy(output: Path, tasks: list[_Task]) -> None:
    """Removes what only an incomplete store needs."""
    for file in (output / _PLAN, output / _LOCK, *(task.done for task in tasks)):
        file.unlink(missing_ok=True)


def _plan(tasks: list[_Task], vocabulary: Vocabulary) -> dict[str, Any]:
    """All that the files of a store depend on."""
    text = [[t.source.name, t.source.fingerprint, t.split, t.shard.size] for t in tasks]
    digest = hashlib.blake2b(json.dumps(text).encode(), digest_size=16)
    return {"format": FORMAT, "vocabulary": vocabulary.fingerprint, "text": digest.hexdigest()}


def _claim(output: Path, plan: dict[str, Any]) -> bool:
    """Makes `output` the place for a plan; True where it is complete already."""
    if is_store(output):
        manifest = _json(output / MANIFEST)
        if plan == {key: manifest.get(key) for key in plan}:
            return True
        raise UserError(f"{output} holds other packed text; choose another --output.")
    if (output / _PLAN).is_file():
        if _json(output / _PLAN) != plan:
            raise UserError(
                f"{output} holds an incomplete pack of other text or another vocabulary; delete it"
                " or choose another --output."
            )
    else:
        write_atomically(output / _PLAN, json.dumps(plan).encode())
    return False


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete {path.parent} and pack again.") from error


def _run(tasks: list[_Task], action: BadRecordAction, workers: int) -> Iterator[tuple[_Task, int]]:
    """Does all tasks, in any order; yields each with its number of tokens when it is done."""
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, _tokenise(task, action)
        return
    # Not forked: the caller may have threads, JAX's or TensorFlow's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _end_with_parent) as pool:
        # The largest first, so that none is left at the end to be waited for.
        largest_first = sorted(tasks, key=lambda task: -task.shard.size)
        running = {pool.submit(_tokenise, task, action): task for task in largest_first}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker ended, for want of memory or because the program that packs has no"
                " `if __name__ == '__main__':`; the same command with fewer --workers goes on."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Lets a worker not outlive a parent that was killed: another may be packing by then."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tokenise(task: _Task, action: BadRecordAction) -> int:
    """Writes a shard of tokens; returns how many there are."""
    vocabulary, bad = _vocabulary(task.store / VOCABULARY_FILE), BadRecords(action)
    dtype = _dtype(vocabulary)
    task.folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    offsets = [0]
    if isinstance(task.source, TaskSource) and task.split != "train":
        examples = task.source.examples(task.split, bad)
        lines = "".join(line + "\n" for line in examples_to_json(examples))
        write_atomically(examples_path(task.folder), lines.encode())
        bad = BadRecords(action)  # they are counted below
    tokens_file = tokens_path(task.folder, task.number)
    partial = tokens_file.with_suffix(".partial")
    with open(partial, "wb") as file:
        for text in task.source.texts(task.split, task.shard, bad):
            tokens = np.array(vocabulary.encode(text), dtype).tobytes()
            file.write(tokens)
            digest.update(tokens)
            offsets.append(offsets[-1] + len(tokens) // dtype.itemsize)
    partial.replace(tokens_file)
    np.save(offsets_path(task.folder, task.number), np.array(offsets, np.int64))
    digest.update(np.array(offsets, np.int64).tobytes())
    done = {
        "documents": (len(offsets) - 1) // (2 if task.source.has_targets else 1),
        "tokens": offsets[-1],
        "fingerprint": digest.hexdigest(),
        "left_out": bad.counts,
        "first": bad.first,
    }
    write_atomically(task.done, json.dumps(done).encode())
    return offsets[-1]


@functools.cache
def _vocabulary(path: Path) -> Vocabulary:
    return read_vocabulary(path)


def _dtype(vocabulary: Vocabulary) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)


def _held(
    sources: list[Source], tasks: list[_Task], vocabulary: Vocabulary, bad: BadRecords
) -> dict[str, Any]:
    """What a store holds, from what its tasks say; adds to `bad` what they left out."""
    held = {source.name: _nothing(source, vocabulary) for source in sources}
    for task in tasks:
        done = json.loads(task.done.read_text())
        bad.merge(done["left_out"], done["first"])
        split = held[task.source.name][task.split]
        split["documents"] += done["documents"]
        split["tokens"] += done["tokens"]
        split["left_out"] = _sum(split["left_out"], done["left_out"])
        split["shards"].append([done["documents"], done["tokens"]])
        both = split["fingerprint"] + done["fingerprint"]
        split["fingerprint"] = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
    return {
        "vocabulary_size": vocabulary.size,
        "dtype": _dtype(vocabulary).name,
        "left_out": bad.counts,
        "first_left_out": bad.first,
        "sources": held,
    }


def _nothing(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a store holds of a source before anything is packed."""
    empty: dict[str, Any] = {"documents": 0, "tokens": 0, "fingerprint": vocabulary.fingerprint}
    splits: dict[str, Any] = {split: {**empty, "left_out": {}, "shards": []} for split in SPLITS}
    return {"spec": source.spec, "pairs": source.has_targets, **splits}


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


class _Progress:
    """A bar over the bytes of all shards; without a terminal, a line now and then."""

    def __init__(self, size: int):
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("packing"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %  {task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._total = max(1, size)
        self._task = self._bar.add_task("pack", total=self._total, status="")
        self._bytes, self._tokens = 0, 0
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def finished(self, task: _Task, tokens: int) -> None:
        """A shard is done; `tokens` are those made in this run."""
        self._bytes += task.shard.size
        self._tokens += tokens
        now = time.monotonic()
        status = f"{self._tokens / max(now - self._began, 1e-3) / 1e6:.2f} M tokens/s"
        self._bar.update(self._task, completed=self._bytes, status=status)
        if not self._console.is_terminal and now - self._spoke > _SPEAK_SECONDS:
            self._spoke = now
            self.say(f"packed {self._bytes / self._total:.0%}  {status}")

    def say(self, text: str | None) -> None:
        if text:
            self._console.print(text, highlight=False, soft_wrap=True)


def store_table(manifest: dict[str, Any]) -> str:
    """A table of what a store holds."""
    lines = [f"{'source':16} {'split':10} {'documents':>14} {'tokens':>18} {'left out':>9}"]
    for name, source in manifest["sources"].items():
        for split in SPLITS:
            held = source[split]
            if not held["shards"]:
                continue
            left_out = sum(held["left_out"].values())
            lines.append(
                f"{name:16} {split:10} {held['documents']:>14,} {held['tokens']:>18,}"
                f" {left_out:>9,}"
            )
    return "\n".join(lines)
