"""Digests of what a verb writes, without what differs between two equal runs.

Of a WORKDIR, they are those of the newest checkpoint's arrays, of the metrics without times, and of
the config. Of any other folder, they are those of all its files.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TIMED = re.compile("second|time|mfu|data_wait")  # in keys
# index.html and summary.md show summary.json of a sweep, with its speeds.
_IGNORED = {"tensorboard", "jobs", "index.html", "summary.md", ".cache"}
_SPEEDS = re.compile("[0-9.,]+ (?:target )?tokens(?:/s| per second)")


def digests(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """Returns a digest of everything in `paths`, by its path in `folder`."""
    found: dict[str, str] = {}
    for path in paths:
        # Paths in it, as they are and as JSON has them.
        own = [str(folder / path), json.dumps(str(folder / path))[1:-1], str(folder)]
        for name, content in _contents(folder / path, folder):
            for text in own:
                content = content.replace(text.encode(), b"")
            found[name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found


def same_text(one: str, two: str) -> bool:
    """Whether two texts are equal but for measured times."""
    return _SPEEDS.sub("", one) == _SPEEDS.sub("", two)


def first_difference(results: dict[str, str] | None, right: dict[str, str] | None) -> str | None:
    """Returns the name of something that two runs have differently; None where all is equal."""
    one, two = results or {}, right or {}
    names: Sequence[str] = sorted(one.keys() | two.keys())
    return next((name for name in names if one.get(name) != two.get(name)), None)


def _contents(path: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    name = str(path.relative_to(folder))
    if (path / "checkpoints").is_dir():
        yield from _workdir_contents(path, name)
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if child.name not in _IGNORED and not child.name.endswith(".lock"):
                yield from _contents(child, folder)
    elif path.exists():
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(_without_times(json.loads(content))).encode()
        yield name, content


def _workdir_contents(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    steps = [int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit()]
    newest = path / "checkpoints" / str(max(steps))
    for item in ("params", "optimizer"):
        if (newest / item).is_dir():
            for key, array in _arrays(newest / item).items():
                yield f"{name}/{newest.name}/{item}/{key}", array.tobytes()
    config = json.loads((path / "config.json").read_text())["config"]
    yield f"{name}/config", json.dumps(config).encode()
    if (path / "metrics.jsonl").exists():
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        yield f"{name}/metrics", json.dumps(_without_times(list(lines))).encode()
    if (path / "vocabulary.model").exists():
        yield f"{name}/vocabulary.model", (path / "vocabulary.model").read_bytes()


def _without_times(value: Any) -> Any:
    """Returns a JSON value without the measured times and speeds in it."""
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not _TIMED.search(k)}
    return list(map(_without_times, value)) if isinstance(value, list) else value


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint's item by path, without the checks of the package."""
    import jax
    import orbax.checkpoint as ocp

    from switch_jax.checkpoint.checkpoint_reader import own_reader
    from switch_jax.files import plain_path

    # Of two processes, the first alone reads.
    folder = plain_path(folder)
    with own_reader(ocp.PyTreeCheckpointHandler()) as reader:
        tree: Any = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
