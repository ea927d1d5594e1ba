"""What the parts of `data.mixture` stand for.

python_docs                     the text that comes with Python
c4                              English C4 in `data.data_dir`: of TFDS, or AllenAI's json.gz
mc4, mc4.sw                     multilingual C4, all languages or one, likewise
c4/en:2.2.0, lm1b               a TFDS data set in `data.data_dir` whose examples have a `text`
glue, squad, arc.easy           fine-tuning tasks in `data.data_dir`: see `downstream`
/books/{split}-*.jsonl.gz       files; `{split}` stands for train and validation
pairs:/mine/{split}.jsonl       files whose records have `inputs` and `targets`
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from switch_jax.data.finetuning.task_records import is_task_file
from switch_jax.data.finetuning.task_source import TaskSource, find_task_source
from switch_jax.data.finetuning.tasks import MIXTURES, TASKS, custom_task, find_task_or_mixture
from switch_jax.data.sources.python_docs import PythonDocsSource
from switch_jax.data.sources.source import (
    SPLITS,
    File,
    FileSource,
    Source,
    Split,
    glob_files,
    newest_version,
)
from switch_jax.data.sources.text_files import is_text_file
from switch_jax.errors import UserError

# mC4's 101 languages; six of them have a second code, for texts in Latin script.
_CODES = """
af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy
ga gd gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky
la lb lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl
sm sn so sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu
"""
MC4_LANGUAGES = tuple(_CODES.split())
_SPLITS: dict[Split, str] = {split: split for split in SPLITS}
_PAIRS = "pairs:"


def source_name(spec: str) -> str:
    """The name of the source, or of the group of sources, that `spec` stands for.

    Files are called by the last part of their path that is more than wildcards and suffixes.
    """
    if spec.startswith(_PAIRS):
        return f"pairs.{source_name(spec.removeprefix(_PAIRS))}"
    if not is_file_pattern(spec):
        return spec.partition(":")[0]
    for part in reversed(spec.split("/")):
        stem = re.sub(r"\{split\}|\[[^]]*\]", " ", part)
        words = re.split(r"[\W_]+", re.sub(r"\.[A-Za-z].*", "", stem))
        kept = [word for word in words if word and word != "of" and not word.isdigit()]
        if kept:
            return "_".join(kept)
    return "files"


def sources_for_spec(spec: str, data_dir: str | None) -> list[Source]:
    """The sources that a part of a mixture stands for; several for `mc4`.

    Raises `UserError` where there are none, with what to change.
    """
    if spec == "python_docs":
        return [PythonDocsSource()]
    if spec.startswith(_PAIRS):
        files = _named_files(spec, is_task_file, ".jsonl, .tsv, .csv, .parquet or .tfrecord")
        return [TaskSource(custom_task(source_name(spec)), files)]
    if is_file_pattern(spec):
        known = ".txt, .json, .jsonl (or these with .gz or .zst), .parquet or .tfrecord"
        return [FileSource(source_name(spec), _named_files(spec, is_text_file, known), {})]
    name, _, version = spec.partition(":")
    group, _, language = name.partition(".")
    multilingual = group == "mc4" and (not language or language in MC4_LANGUAGES)
    tasks = _tasks(name)
    if name != "c4" and not multilingual and not tasks:
        where = data_dir and epath.Path(data_dir, name)
        if not where or not where.is_dir():
            raise UserError(
                f"data.mixture: {name!r} is not known; use python_docs, c4, mc4, mc4.LANGUAGE,"
                " a TFDS data set that is in data.data_dir, or files such as '/text/*.jsonl.gz'."
            )
    if data_dir is None:
        raise UserError(
            f"data.mixture={name} needs data.data_dir, the folder or bucket that has it; for a"
            " first try, data.mixture=python_docs needs nothing."
        )
    root = epath.Path(data_dir)
    if multilingual:
        found = [_mc4(root, code, version) for code in ([language] if language else MC4_LANGUAGES)]
    elif tasks:
        return [find_task_source(root, TASKS[task]) for task in tasks]
    elif name == "c4":
        found = [_tfds(root, "c4/en", version, "c4", _SPLITS) or _c4_json(root, version)]
    else:
        found = [_tfds(root, name, version, name, _SPLITS)]
    sources = [source for source in found if source is not None]
    if not sources:
        raise UserError(
            f"There is no {spec} in {data_dir!r}, neither as TFDS writes it nor as json.gz; set"
            " data.data_dir to the folder or bucket that has it."
        )
    return sources


def needs_folder(spec: str) -> bool:
    """Whether a part of a mixture is looked for in `data.data_dir`."""
    return spec != "python_docs" and not is_file_pattern(spec)


def group_members(spec: str, names: Iterable[str]) -> list[str]:
    """Those of the sources called `names` that a part of a mixture, not of files, stands for."""
    name = source_name(spec)
    tasks = _tasks(name)
    return [n for n in names if n == name or n in tasks or (name == "mc4" and n.startswith("mc4."))]


def _tasks(name: str) -> tuple[str, ...]:
    """The fine-tuning tasks that a name stands for."""
    if name not in MIXTURES and name not in TASKS:
        return ()
    return tuple(task for task in find_task_or_mixture(name).rates if _readable(task))


def _readable(task: str) -> bool:
    """Whether a task has anything to train on or to evaluate."""
    return any(split in TASKS[task].splits for split in SPLITS)


def is_file_pattern(spec: str) -> bool:
    """Whether a part of a mixture names files."""
    begins = (_PAIRS, "/", "./", "../", "~")
    return spec.startswith(begins) or "*" in spec or is_text_file(spec)


def _named_files(spec: str, is_known: Callable[[str], bool], known: str) -> dict[Split, list[File]]:
    pattern = os.path.expanduser(spec.removeprefix(_PAIRS))
    if "**" in pattern:
        raise UserError(
            f"data.mixture={spec}: ** is not understood; write a * for every folder between."
        )
    patterns = {split: pattern.replace("{split}", split) for split in SPLITS}
    if "{split}" not in pattern:
        del patterns["validation"]
    files = {split: glob_files(pattern) for split, pattern in patterns.items()}
    for split, found in files.items():
        if not found:
            raise UserError(
                f"data.mixture: no file matches {patterns[split]!r}; name files that exist."
            )
        unknown = [file.path for file in found if not is_known(file.path)]
        if unknown:
            raise UserError(f"data.mixture: {unknown[0]!r} is of no known format; use {known}.")
    return files


def _c4_json(root: epath.Path, version: str) -> Source | None:
    return _json("c4", root, version, "en", {split: f"c4-{split}.*.json.gz" for split in SPLITS})


def _mc4(root: epath.Path, code: str, version: str) -> Source | None:
    name = f"mc4.{code}"
    splits: dict[Split, str] = {"train": code, "validation": f"{code}-validation"}
    patterns = {split: f"c4-{stem}.tfrecord-*.json.gz" for split, stem in splits.items()}
    return _tfds(root, "c4/multilingual", version, name, splits) or _json(
        name, root, version, "multilingual", patterns
    )


def _json(
    name: str, root: epath.Path, version: str, folder: str, patterns: Mapping[Split, str]
) -> Source | None:
    """A source as AllenAI hands it out, in `root` itself or in a folder called as there."""
    for place in (root, root / folder, root / "c4" / folder):
        files = {split: glob_files(os.fspath(place / text)) for split, text in patterns.items()}
        if files["train"] and not version:
            return FileSource(name, files, {})
    return None


def _tfds(
    root: epath.Path, dataset: str, version: str, name: str, splits: Mapping[Split, str]
) -> Source | None:
    """A source as TFDS prepared it; the newest version there is, unless one is named."""
    place = newest_version(root / dataset, version)
    if place is None:
        return None
    try:
        info = json.loads((place / "dataset_info.json").read_text())
        lengths = {
            split["name"]: sum(map(int, split.get("shardLengths", []))) for split in info["splits"]
        }
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(f"its files are {info['fileFormat']}, and only tfrecord can be read")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{os.fspath(place)!r} is not as TFDS prepares it ({error}); prepare it again."
        ) from error
    stem = dataset.partition("/")[0]
    files = {
        split: glob_files(os.fspath(place / f"{stem}-{theirs}.tfrecord*"))
        for split, theirs in splits.items()
    }
    if not files["train"]:
        return None
    counts = {split: lengths[theirs] for split, theirs in splits.items() if lengths.get(theirs)}
    return FileSource(name, files, counts)
