"""Catalog of sources: from a part of `data.mixture` to its sources.

python_docs                     the text that comes with Python
python_docstrings               the docstrings of the installed packages
c4                              English C4 in `data.data_dir`: of TFDS, or AllenAI's json.gz
mc4, mc4.sw                     multilingual C4 there, all languages or one
c4/en:2.2.0, lm1b               a TFDS data set in `data.data_dir` whose examples have a `text`
glue, squad, arc.easy           fine-tuning tasks in `data.data_dir`: see `finetuning.tasks`
/books/{split}-*.jsonl.gz       files; `{split}` stands for train and validation
/books                          a folder: all files in it, and below, that can be read
hf:allenai/c4/en                a data set of the Hugging Face hub, or a folder: see `sources.hub`
pairs:/mine/{split}.jsonl       files whose records have `inputs` and `targets`; `pairs:hf:…` too
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from etils import epath

from switch_jax.config import DataConfig, parse_json
from switch_jax.data.finetuning.layouts import is_task_file
from switch_jax.data.finetuning.task import Task, custom_task
from switch_jax.data.finetuning.task_mixtures import MIXTURES, find_task_or_mixture
from switch_jax.data.finetuning.task_source import (
    MissingTask,
    TaskSource,
    find_task_in_hub,
    find_task_source,
)
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.sources.hub import (
    HUB,
    LOCAL_PREFIXES,
    STREAM,
    StreamedSource,
    hub_files,
    hub_name,
    is_hub_spec,
    training_splits,
)
from switch_jax.data.sources.python_text import PYTHON_TEXTS, PythonTextSource
from switch_jax.data.sources.source import (
    SPLITS,
    File,
    FileSource,
    Source,
    Split,
    files_below,
    files_in,
    glob_files,
    newest_version,
)
from switch_jax.data.sources.text_files import TextFormat, is_text_file
from switch_jax.errors import UserError
from switch_jax.files import as_path, is_bucket

# mC4's 101 languages; six of them have a second code, for texts in Latin script.
_CODES = """
af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy
ga gd gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky
la lb lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl
sm sn so sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu
"""
MC4_LANGUAGES = tuple(_CODES.split())
_SPLITS: dict[Split, str] = {split: split for split in SPLITS}
_PAIRS_GROUP = "pairs"  # begins the names of sources of custom pairs
_PAIRS = f"{_PAIRS_GROUP}:"


def source_name(spec: str) -> str:
    """Returns the name of the source, or of the group of sources, that `spec` stands for.

    Files are named after the last part of their path that has more than wildcards, numbers and
    suffixes.
    """
    if spec.startswith(_PAIRS):
        return f"{_PAIRS_GROUP}.{source_name(spec.removeprefix(_PAIRS))}"
    if is_hub_spec(spec):
        return hub_name(spec)
    if not is_file_pattern(spec):
        return spec.partition(":")[0]
    for part in reversed(spec.split("/")):
        stem = re.sub(r"\{split\}|\[[^]]*\]", " ", part)
        words = re.split(r"[\W_]+", re.sub(r"\.[A-Za-z].*", "", stem))
        kept = [word for word in words if word and word != "of" and not word.isdigit()]
        if kept:
            return "_".join(kept)
    return "files"


def sources_for_spec(spec: str, data: DataConfig) -> list[Source]:
    """Returns the sources that a part of a mixture stands for; several for `mc4` and `glue`.

    Tasks without files are left out with a sentence on stderr if `data.on_missing_task` is "skip".

    Raises `UserError` if there are none, and for tasks without files.
    """
    data_dir, text_format = data.data_dir, TextFormat(data.text_field, data.documents)
    if spec in PYTHON_TEXTS:
        return [PythonTextSource(spec)]
    if is_hub_spec(spec.removeprefix(_PAIRS)):
        return [_hub_source(spec, text_format)]
    if spec.startswith(_PAIRS):
        files = _named_files(
            spec, is_task_file, ".jsonl, .tsv, .csv, .parquet, .arrow or .tfrecord"
        )
        return [TaskSource(custom_task(source_name(spec)), files)]
    if is_file_pattern(spec):
        known = (
            ".txt, .json, .jsonl, .csv, .tsv (also with .gz or .zst), .parquet, .arrow or .tfrecord"
        )
        files = _named_files(spec, is_text_file, known)
        return [FileSource(source_name(spec), files, {}, text_format)]
    name, _, version = spec.partition(":")
    group, _, language = name.partition(".")
    multilingual = group == "mc4" and (not language or language in MC4_LANGUAGES)
    tasks = _task_names(name)
    if name != "c4" and not multilingual and not tasks:
        folder = data_dir and epath.Path(data_dir, name)
        if not folder or not folder.is_dir():
            raise UserError(
                f"data.mixture: {name!r} is not known; use {', '.join(PYTHON_TEXTS)}, c4, mc4,"
                " mc4.LANGUAGE, a TFDS data set that is in data.data_dir, or files such as"
                " '/text/*.jsonl.gz'."
            )
    if data_dir is None:
        raise UserError(
            f"data.mixture={name} needs data.data_dir, the folder or bucket that has it; for a"
            " first try, data.mixture=python_docs needs nothing."
        )
    root = epath.Path(data_dir)
    if multilingual:
        candidates = [
            _mc4(root, code, version) for code in ([language] if language else MC4_LANGUAGES)
        ]
    elif tasks and data_dir == HUB:
        return _task_sources(find_task_in_hub, "the hub", tasks, data.on_missing_task)
    elif tasks:
        find = functools.partial(find_task_source, root)
        return _task_sources(find, repr(data_dir), tasks, data.on_missing_task)
    elif name == "c4":
        candidates = [_tfds(root, "c4/en", version, "c4", _SPLITS) or _c4_json(root, version)]
    else:
        candidates = [_tfds(root, name, version, name, _SPLITS)]
    sources = [source for source in candidates if source is not None]
    if not sources:
        raise UserError(
            f"There is no {spec} in {data_dir!r}, neither as TFDS writes it nor as json.gz; set"
            " data.data_dir to the folder or bucket that has it."
        )
    return sources


def _task_sources(
    find: Callable[[Task], TaskSource],
    place: str,
    names: Iterable[str],
    on_missing: Literal["error", "skip"],
) -> list[Source]:
    """Returns the sources of tasks.

    Args:
      find: raises `MissingTask` for a task that has no files.
      place: where it searches, in words.
    """
    sources: list[Source] = []
    missing: list[MissingTask] = []
    for name in names:
        try:
            sources.append(find(TASKS[name]))
        except MissingTask as error:
            missing.append(error)
    left_out = ", ".join(error.task for error in missing)
    if missing and (on_missing == "error" or not sources):
        raise UserError(
            f"{left_out}: not in {place}; for {missing[0].task}, {missing[0]}, or set"
            " data.on_missing_task=skip to leave out what is missing."
        )
    if missing:
        print(f"Left out, since {place} lacks them: {left_out}.", file=sys.stderr)
    return sources


def _hub_source(spec: str, text_format: TextFormat) -> Source:
    """Returns the source of a part of a mixture that names a data set of the hub."""
    hub_spec = spec.removeprefix(_PAIRS)
    if hub_spec == spec and spec.startswith(STREAM):
        return StreamedSource(spec, text_format)
    if hub_spec.startswith(STREAM):
        raise UserError(f"data.mixture={spec}: pairs are not streamed; write pairs:hf: instead.")
    files = training_splits(hub_spec, hub_files(hub_spec))
    if hub_spec != spec:
        return TaskSource(custom_task(source_name(spec)), files)
    return FileSource(source_name(spec), files, {}, text_format)


def needs_folder(spec: str) -> bool:
    """Whether a part of a mixture is read from `data.data_dir`."""
    return spec not in PYTHON_TEXTS and not is_file_pattern(spec)


def is_task_spec(spec: str) -> bool:
    """Whether a part of a mixture stands for inputs and targets, and not for text."""
    if is_file_pattern(spec):
        return spec.startswith(_PAIRS)
    return spec.startswith(f"{_PAIRS_GROUP}.") or bool(_task_names(source_name(spec)))


def group_members(spec: str, names: Iterable[str]) -> list[str]:
    """Returns the names that belong to a part of a mixture which does not name files."""
    name = source_name(spec)
    tasks = _task_names(name)
    return [n for n in names if n == name or n in tasks or (name == "mc4" and n.startswith("mc4."))]


def _task_names(name: str) -> tuple[str, ...]:
    """Returns the tasks of a task or mixture that have a split for training or validation."""
    if name not in MIXTURES and name not in TASKS:
        return ()
    tasks = find_task_or_mixture(name).rates
    return tuple(task for task in tasks if any(split in TASKS[task].splits for split in SPLITS))


def is_file_pattern(spec: str) -> bool:
    """Whether a part of a mixture names files, or a data set of the hub."""
    prefixes = (_PAIRS, *LOCAL_PREFIXES)
    return spec.startswith(prefixes) or is_hub_spec(spec) or "*" in spec or is_text_file(spec)


def _named_files(spec: str, is_known: Callable[[str], bool], known: str) -> dict[Split, list[File]]:
    """Returns the files of a pattern; raises `UserError` if none match or one has no known name."""
    pattern = os.path.expanduser(spec.removeprefix(_PAIRS))
    if is_bucket(pattern):
        as_path(pattern)  # tells a missing package
    if "**" in pattern:
        raise UserError(
            f"data.mixture={spec}: ** is not understood; write a * for every folder between."
        )
    patterns = {split: pattern.replace("{split}", split) for split in SPLITS}
    if "{split}" not in pattern:
        del patterns["validation"]
    elif os.path.isfile(pattern):  # its name has these characters
        patterns = {"train": pattern}
    files_of_split = {
        split: [file for file in files_below(epath.Path(pattern)) if is_known(file.path)]
        if epath.Path(pattern).is_dir()
        else glob_files(pattern)
        for split, pattern in patterns.items()
    }
    for split, files in files_of_split.items():
        if not files:
            raise UserError(
                f"data.mixture: no file matches {patterns[split]!r}; name files that exist, or a"
                f" folder with {known} in it."
            )
        unknown = [file.path for file in files if not is_known(file.path)]
        if unknown:
            raise UserError(f"data.mixture: {unknown[0]!r} is of no known format; use {known}.")
    return files_of_split


def _c4_json(root: epath.Path, version: str) -> Source | None:
    return _allenai("c4", root, version, "en", {split: f"c4-{split}.*.json.gz" for split in SPLITS})


def _mc4(root: epath.Path, code: str, version: str) -> Source | None:
    name = f"mc4.{code}"
    splits: dict[Split, str] = {"train": code, "validation": f"{code}-validation"}
    patterns = {split: f"c4-{stem}.tfrecord-*.json.gz" for split, stem in splits.items()}
    return _tfds(root, "c4/multilingual", version, name, splits) or _allenai(
        name, root, version, "multilingual", patterns
    )


def _allenai(
    name: str, root: epath.Path, version: str, folder: str, patterns: Mapping[Split, str]
) -> Source | None:
    """Returns a source in AllenAI's json.gz, in `root` or in AllenAI's folders below it."""
    for parent in (root, root / folder, root / "c4" / folder):
        files = {split: files_in(parent, pattern) for split, pattern in patterns.items()}
        if files["train"] and not version:
            return FileSource(name, files, {})
    return None


def _tfds(
    root: epath.Path, dataset: str, version: str, name: str, splits: Mapping[Split, str]
) -> Source | None:
    """Returns a source that TFDS prepared, by default the newest version.

    Args:
      splits: names of the splits in the data set.
    """
    folder = newest_version(root / dataset, version)
    if folder is None:
        return None
    try:
        info = parse_json((folder / "dataset_info.json").read_bytes(), "dataset_info.json")
        lengths = {
            split["name"]: sum(map(int, split.get("shardLengths", []))) for split in info["splits"]
        }
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(f"its files are {info['fileFormat']}, and only tfrecord can be read")
        if min(lengths.values(), default=0) < 0:
            raise ValueError("a split has less than no examples")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{os.fspath(folder)!r} is not as TFDS prepares it ({error}); prepare it again."
        ) from error
    prefix = dataset.partition("/")[0]
    files = {
        split: files_in(folder, f"{prefix}-{tfds_split}.tfrecord*")
        for split, tfds_split in splits.items()
    }
    if not files["train"]:
        return None
    counts = {
        split: lengths[tfds_split]
        for split, tfds_split in splits.items()
        if lengths.get(tfds_split)
    }
    return FileSource(name, files, counts)
