"""Building a token store: tokenises all documents of a mixture, in several processes or on Beam.

Every shard of text becomes one shard of tokens, in whichever process, so the same text gives the
same files. A JSON file beside each finished shard records that it is finished; an interrupted build
continues with the other shards.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from switch_jax.config import DataConfig
from switch_jax.data.mixture import find_sources
from switch_jax.data.sources.bad_records import MISSING, BadRecords
from switch_jax.data.sources.source import SPLITS, Source
from switch_jax.data.token_store.beam_pipeline import write_shards_on_beam
from switch_jax.data.token_store.manifest import (
    FORMAT,
    MANIFEST,
    is_store,
    read_manifest,
    write_manifest,
)
from switch_jax.data.token_store.shards import (
    ShardTask,
    read_summaries,
    split_by_finished,
    token_dtype,
)
from switch_jax.data.token_store.workers import write_shards
from switch_jax.data.vocabulary import VOCABULARY_FILE, Vocabulary
from switch_jax.errors import UserError
from switch_jax.files import (
    absolute_path,
    file_names,
    hold_bucket_lock,
    hold_lock,
    is_bucket,
    remove,
    write_atomically,
)

_PLAN = "plan.json"  # identity of an incomplete store
_LOCK = ".lock"
_LOG_SECONDS = 30.0  # between lines of progress where stderr is no terminal

# From tasks to each finished one and its number of tokens.
_WriteShards = Callable[[list[ShardTask]], Iterator[tuple[ShardTask, int]]]


def build_token_store(
    data: DataConfig,
    vocabulary: Vocabulary,
    output: Path,
    workers: int = 1,
    beam_options: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Builds a store of all sources of a mixture, with progress on stderr.

    A store that the same call left incomplete is completed; a complete one stays unchanged. Bad
    records are left out and reported in one sentence, or end the build, as `data.on_bad_record`
    says.

    Args:
      output: folder of the store, on a disk or in a bucket.
      workers: processes of this machine that tokenise.
      beam_options: flags of Apache Beam, by which a pipeline tokenises instead.

    Returns the manifest. Raises `UserError`, also if `output` contains anything else.
    """
    sources = find_sources(data)
    output = absolute_path(output)  # which other processes know as well
    tasks = [
        ShardTask(source, split, number, shard, output, vocabulary.size)
        for source in sources
        for split in SPLITS
        for number, shard in enumerate(source.shards(split))
    ]
    if output.exists() and not _is_empty_or_store(output):
        raise UserError(f"{output} exists and is no packed text; choose another --output.")
    write: _WriteShards
    if beam_options is None:
        write = functools.partial(write_shards, action=data.on_bad_record, workers=workers)
    else:
        write = functools.partial(
            write_shards_on_beam, action=data.on_bad_record, options=beam_options
        )
    with _locked(output):
        return _build(data, vocabulary, output, sources, tasks, write)


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
    sources: list[Source],
    tasks: list[ShardTask],
    write: _WriteShards,
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
    _write_all(tasks, write)
    manifest = plan | _contents(sources, tasks, vocabulary, bad_records)
    for source in sources:
        contents = manifest["sources"][source.name]
        if not contents["train"]["documents"] and source.shards("train"):
            _discard(output, sources)
            reason = f" ({summary.rstrip('.')})" if (summary := bad_records.summary()) else ""
            raise UserError(
                f"{source.name} has no text to train on{reason}; name files for it that have text,"
                " or leave it out of data.mixture."
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
        hold = hold_bucket_lock if is_bucket(output) else hold_lock
        with hold(output / _LOCK, f"packs into {output}"):
            yield
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        if error.filename is None or not str(error.filename).startswith(str(output)):
            raise
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output."
        ) from error


def _discard(output: Path, sources: list[Source]) -> None:
    """Removes what was built."""
    folders = {Path(source.name).parts[0] for source in sources}
    built = {_PLAN, VOCABULARY_FILE, _LOCK}
    if is_bucket(output):
        remove(output, built | {n for n in file_names(output) if Path(n).parts[0] in folders})
        return
    remove(output, built)
    for folder in folders:
        shutil.rmtree(output / folder, ignore_errors=True)


def _remove_partial_files(output: Path) -> None:
    """Removes what a killed build left on a disk; its workers may write for a moment after it."""
    if is_bucket(output):
        return
    for partial in output.rglob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _remove_build_files(output: Path, tasks: list[ShardTask]) -> None:
    """Removes the files that only an incomplete store needs."""
    _remove_partial_files(output)
    needed = {_PLAN, *(task.summary_name for task in tasks)}
    remove(output, needed & file_names(output))
    if not is_bucket(output):
        remove(output, {_LOCK})  # in a bucket `_locked` does


def _plan(tasks: list[ShardTask], vocabulary: Vocabulary) -> dict[str, Any]:
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


def _write_all(tasks: list[ShardTask], write: _WriteShards) -> None:
    """Writes the unfinished shards, with progress in bytes of text on stderr."""
    _, pending = split_by_finished(tasks)
    size = max(1, sum(task.shard.size for task in tasks))
    finished = size - sum(task.shard.size for task in pending)
    tokens, start = 0, time.monotonic()
    next_line = start + _LOG_SECONDS
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("packing", total=size, completed=finished)
        for task, shard_tokens in write(pending):
            tokens += shard_tokens
            finished += task.shard.size
            now = time.monotonic()
            speed = f"packing, {tokens / max(now - start, 1e-3) / 1e6:.2f} M tokens/s"
            progress.update(bar, completed=finished, description=speed)
            if not console.is_terminal and now > next_line:
                next_line = now + _LOG_SECONDS
                print(f"{speed}, {finished / size:.0%}", file=sys.stderr, flush=True)


def _contents(
    sources: list[Source],
    tasks: list[ShardTask],
    vocabulary: Vocabulary,
    bad_records: BadRecords,
) -> dict[str, Any]:
    """Returns the manifest's entries on contents; adds the records left out to `bad_records`."""
    contents = {source.name: _empty_contents(source, vocabulary) for source in sources}
    for task, summary in zip(tasks, read_summaries(tasks)):
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
        "dtype": token_dtype(vocabulary).name,
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
