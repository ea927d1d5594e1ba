"""Building a token store: tokenises all documents of a mixture with several processes.

Every shard of text becomes one shard of tokens, in whichever process, so the same text gives the
same files. A JSON file beside each finished shard records that it is finished; an interrupted build
continues with the other shards.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from switch_jax.config import DataConfig
from switch_jax.data.finetuning.task_source import TaskSource, examples_to_json
from switch_jax.data.mixture import find_sources
from switch_jax.data.sources.bad_records import MISSING, BadRecordAction, BadRecords
from switch_jax.data.sources.source import SPLITS, Shard, Source, Split
from switch_jax.data.token_store.checksums import checksums_path, write_checksums
from switch_jax.data.token_store.manifest import (
    FORMAT,
    MANIFEST,
    is_store,
    read_manifest,
    write_manifest,
)
from switch_jax.data.token_store.store import examples_path, offsets_path, tokens_path
from switch_jax.data.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary
from switch_jax.errors import UserError
from switch_jax.files import hold_lock, write_atomically

_PLAN = "plan.json"  # identity of an incomplete store
_LOCK = ".lock"
_LOG_SECONDS = 30.0  # between lines of progress where stderr is no terminal


@dataclasses.dataclass(frozen=True)
class _ShardTask:
    """A shard of text, to become shard `number` of its split in the store."""

    source: Source
    split: Split
    number: int
    shard: Shard
    store: Path
    vocabulary_size: int

    @property
    def folder(self) -> Path:
        return self.store / self.source.name / self.split

    @property
    def summary_file(self) -> Path:
        """Documents, tokens and fingerprint of the finished shard; written last."""
        return self.folder / f"{self.number:05d}.json"


def build_token_store(
    data: DataConfig, vocabulary: Vocabulary, output: Path, workers: int
) -> dict[str, Any]:
    """Builds a store of all sources of a mixture at `output`, with progress on stderr.

    A store that the same call left incomplete is completed; a complete one stays unchanged. Bad
    records are left out and reported in one sentence, or end the build, as `data.on_bad_record`
    says.

    Returns the manifest. Raises `UserError`, also if `output` contains anything else.
    """
    sources = find_sources(data)
    tasks = [
        _ShardTask(source, split, number, shard, output, vocabulary.size)
        for source in sources
        for split in SPLITS
        for number, shard in enumerate(source.shards(split))
    ]
    if output.exists() and not _is_empty_or_store(output):
        raise UserError(f"{output} exists and is no packed text; choose another --output.")
    with _locked(output):
        return _build(data, vocabulary, output, workers, sources, tasks)


def store_table(manifest: dict[str, Any]) -> str:
    """Returns a table of the documents and tokens of a store."""
    lines = [f"{'source':16} {'split':10} {'documents':>14} {'tokens':>18} {'left out':>9}"]
    for name, source in manifest["sources"].items():
        for split in SPLITS:
            contents = source[split]
            if not contents["shards"]:
                continue
            left_out = sum(contents["left_out"].values())
            lines.append(
                f"{name:16} {split:10} {contents['documents']:>14,} {contents['tokens']:>18,}"
                f" {left_out:>9,}"
            )
    return "\n".join(lines)


def _build(
    data: DataConfig,
    vocabulary: Vocabulary,
    output: Path,
    workers: int,
    sources: list[Source],
    tasks: list[_ShardTask],
) -> dict[str, Any]:
    """Tokenises the missing shards, writes the manifest and returns it."""
    plan = _plan(tasks, vocabulary)
    if _is_complete(output, plan):
        _remove_build_files(output, tasks)
        return dataclasses.asdict(read_manifest(output))
    _remove_partial_files(output)
    bad_records = BadRecords(data.on_bad_record)
    for source in sources:
        for note in source.notes():
            print(note, file=sys.stderr, flush=True)
        for split in SPLITS:
            for path in source.missing_files(split):
                bad_records.add(MISSING, path)
    (output / VOCABULARY_FILE).write_bytes(vocabulary.content)
    _tokenise_all(tasks, data.on_bad_record, workers)
    manifest = plan | _contents(sources, tasks, vocabulary, bad_records)
    for source in sources:
        contents = manifest["sources"][source.name]
        if not contents["train"]["documents"] and source.shards("train"):
            _discard(output, sources)
            left_out = f": {summary}" if (summary := bad_records.summary()) else "."
            raise UserError(
                f"{source.name} has no text to train on; leave it out of data.mixture, or name"
                f" files for it that have text{left_out}"
            )
        if not contents["validation"]["documents"] and source.shards("validation"):
            print(
                f"{source.name} has no text for validation; name files for it with {{split}} if it"
                " is to be validated on.",
                file=sys.stderr,
            )
    write_manifest(output, manifest)
    _remove_build_files(output, tasks)
    if summary := bad_records.summary():
        print(summary, file=sys.stderr, flush=True)
    return dataclasses.asdict(read_manifest(output))


def _is_empty_or_store(output: Path) -> bool:
    """Whether a path is an empty folder or a store, complete or not."""
    if not output.is_dir():
        return False
    visible = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    return not visible or not {MANIFEST, _PLAN}.isdisjoint(visible)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Locks `output` against other builds; raises `UserError` if another build is running."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with hold_lock(output / _LOCK, f"packs into {output}"):
            yield
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        if error.filename is None or not str(error.filename).startswith(str(output)):
            raise
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output."
        ) from error


def _discard(output: Path, sources: list[Source]) -> None:
    """Removes what was built."""
    for source in sources:
        shutil.rmtree(output / Path(source.name).parts[0], ignore_errors=True)
    for file in (output / _PLAN, output / VOCABULARY_FILE, output / _LOCK):
        file.unlink(missing_ok=True)


def _remove_partial_files(output: Path) -> None:
    """Removes what a killed build left; its workers may write for a moment after it."""
    for partial in output.rglob("*.partial"):
        partial.unlink(missing_ok=True)


def _remove_build_files(output: Path, tasks: list[_ShardTask]) -> None:
    """Removes the files that only an incomplete store needs."""
    _remove_partial_files(output)
    for file in (output / _PLAN, output / _LOCK, *(task.summary_file for task in tasks)):
        file.unlink(missing_ok=True)


def _plan(tasks: list[_ShardTask], vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the identity of a store: format, vocabulary and text."""
    text = [[t.source.name, t.source.fingerprint, t.split, t.shard.size] for t in tasks]
    digest = hashlib.blake2b(json.dumps(text).encode(), digest_size=16)
    return {"format": FORMAT, "vocabulary": vocabulary.fingerprint, "text": digest.hexdigest()}


def _is_complete(output: Path, plan: dict[str, Any]) -> bool:
    """Whether `output` is a complete store; if not, writes its plan.

    Raises `UserError` for a store, complete or not, with another plan.
    """
    if is_store(output):
        manifest = dataclasses.asdict(read_manifest(output))
        if plan | {"format": manifest["format"]} == {key: manifest[key] for key in plan}:
            return True
        raise UserError(f"{output} holds other packed text; choose another --output.")
    if (output / _PLAN).is_file():
        if _read_json(output / _PLAN) != plan:
            raise UserError(
                f"{output} holds an incomplete pack of other text or another vocabulary; delete it"
                " or choose another --output."
            )
    else:
        write_atomically(output / _PLAN, json.dumps(plan).encode())
    return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete {path.parent} and pack again.") from error


def _tokenise_all(tasks: list[_ShardTask], action: BadRecordAction, workers: int) -> None:
    """Tokenises the unfinished shards, with progress in bytes of text on stderr."""
    pending = [task for task in tasks if not task.summary_file.is_file()]
    size = max(1, sum(task.shard.size for task in tasks))
    finished = size - sum(task.shard.size for task in pending)
    tokens, start = 0, time.monotonic()
    next_line = start + _LOG_SECONDS
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("packing", total=size, completed=finished)
        for task, shard_tokens in _run_tasks(pending, action, workers):
            tokens += shard_tokens
            finished += task.shard.size
            now = time.monotonic()
            speed = f"packing, {tokens / max(now - start, 1e-3) / 1e6:.2f} M tokens/s"
            progress.update(bar, completed=finished, description=speed)
            if not console.is_terminal and now > next_line:
                next_line = now + _LOG_SECONDS
                print(f"{speed}, {finished / size:.0%}", file=sys.stderr, flush=True)


def _run_tasks(
    tasks: list[_ShardTask], action: BadRecordAction, workers: int
) -> Iterator[tuple[_ShardTask, int]]:
    """Tokenises all shards, in any order; yields each finished task and its number of tokens."""
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, _tokenise_shard(task, action)
        return
    # Not forked: the caller may have threads, JAX's or TensorFlow's.
    context = multiprocessing.get_context("spawn")
    # Of Python's resource tracker, which removes and reports what a Ctrl-C leaves.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _exit_with_parent) as pool:
        # The largest first, so that no worker is still busy with a large shard at the end.
        largest_first = sorted(tasks, key=lambda task: -task.shard.size)
        with _interrupts_blocked():
            running = {pool.submit(_tokenise_shard, task, action): task for task in largest_first}
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


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Starts processes without SIGINT: Ctrl-C is for their parent, with which they exit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    """Makes a worker exit when its parent is killed, since another build may start then."""
    parent = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _tokenise_shard(task: _ShardTask, action: BadRecordAction) -> int:
    """Writes a shard of tokens and its summary; returns the number of tokens."""
    vocabulary, bad_records = _vocabulary(task), BadRecords(action)
    dtype = _token_dtype(vocabulary)
    task.folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    offsets, unknown, examples_checksum = [0], 0, None
    if isinstance(task.source, TaskSource) and task.split != "train":
        examples = task.source.examples(task.split, bad_records)
        content = "".join(line + "\n" for line in examples_to_json(examples)).encode()
        write_atomically(examples_path(task.folder), content)
        examples_checksum = zlib.crc32(content)
        bad_records = BadRecords(action)  # the same records are counted again below
    tokens_file = tokens_path(task.folder, task.number)
    partial = tokens_file.with_suffix(".partial")
    with open(partial, "wb") as file:
        for text in task.source.texts(task.split, task.shard, bad_records):
            tokens = np.array(vocabulary.encode(text), dtype)
            unknown += int(np.count_nonzero(tokens == vocabulary.unk))
            file.write(tokens.tobytes())
            digest.update(tokens.tobytes())
            offsets.append(offsets[-1] + len(tokens))
    offsets_array = np.array(offsets, np.int64)
    digest.update(offsets_array.tobytes())
    write_checksums(
        checksums_path(task.folder, task.number), offsets_array, np.fromfile(partial, dtype)
    )
    np.save(offsets_path(task.folder, task.number), offsets_array)
    partial.replace(tokens_file)
    summary = {
        "documents": (len(offsets) - 1) // (2 if task.source.has_targets else 1),
        "tokens": offsets[-1],
        "fingerprint": digest.hexdigest(),
        "unknown": unknown,
        "examples": examples_checksum,
        "left_out": bad_records.counts,
        "first": bad_records.first,
    }
    write_atomically(task.summary_file, json.dumps(summary).encode())
    return offsets[-1]


def _vocabulary(task: _ShardTask) -> Vocabulary:
    return _read_vocabulary(task.store / VOCABULARY_FILE, task.vocabulary_size)


@functools.cache
def _read_vocabulary(path: Path, size: int) -> Vocabulary:
    return read_vocabulary(path, max_size=size)


def _token_dtype(vocabulary: Vocabulary) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)


def _contents(
    sources: list[Source],
    tasks: list[_ShardTask],
    vocabulary: Vocabulary,
    bad_records: BadRecords,
) -> dict[str, Any]:
    """Returns the manifest's entries on contents; adds the records left out to `bad_records`."""
    contents = {source.name: _empty_contents(source, vocabulary) for source in sources}
    for task in tasks:
        summary = json.loads(task.summary_file.read_text())
        bad_records.merge(summary["left_out"], summary["first"])
        split = contents[task.source.name][task.split]
        split["documents"] += summary["documents"]
        split["tokens"] += summary["tokens"]
        split["unknown"] += summary["unknown"]
        if summary["examples"] is not None:  # a task has one shard
            split["examples"] = summary["examples"]
        for kind, count in summary["left_out"].items():
            split["left_out"][kind] = split["left_out"].get(kind, 0) + count
        split["shards"].append([summary["documents"], summary["tokens"]])
        fingerprints = split["fingerprint"] + summary["fingerprint"]
        split["fingerprint"] = hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest()
    return {
        "vocabulary_size": vocabulary.size,
        "dtype": _token_dtype(vocabulary).name,
        "left_out": bad_records.counts,
        "first_left_out": bad_records.first,
        "sources": contents,
    }


def _empty_contents(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the manifest's entry of a source without documents."""
    empty: dict[str, Any] = {"documents": 0, "tokens": 0, "unknown": 0}
    empty["fingerprint"] = vocabulary.fingerprint
    splits: dict[str, Any] = {split: {**empty, "left_out": {}, "shards": []} for split in SPLITS}
    return {"spec": source.spec, "pairs": source.has_targets, **splits}
