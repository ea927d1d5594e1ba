"""`data.mixture`: the sources of training, and the share of training rows of each.

A mixture is one source, or several separated by commas, all with a rate or none:

    c4
    c4=0.7, /books/*.jsonl.gz=0.3
    mc4

Rates are shares of the training rows; they need not sum to one. Sources without a rate have shares
in proportion to (number of documents) ** `data.rate_exponent`. The exponent is 0.3 for mT5 and
mSwitch; it is the inverse of seqio's temperature. The members of a group such as mc4 share the
group's rate in the same proportion. A comma or `=` of a path is written `\\,` or `\\=`.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from switch_jax.config import DataConfig, read_json
from switch_jax.data.catalog import (
    group_members,
    is_file_pattern,
    is_task_spec,
    needs_folder,
    sources_for_spec,
)
from switch_jax.data.sources.hub import HUB
from switch_jax.data.sources.source import Source, Split
from switch_jax.errors import UserError
from switch_jax.files import as_path, fetch


class MixturePart(NamedTuple):
    """A source or group of sources in `data.mixture`, and its rate if it has one."""

    spec: str
    rate: float | None


def parse_mixture(mixture: str) -> list[MixturePart]:
    """Parses `data.mixture`; raises `UserError` if it is empty or only some parts have a rate."""
    parts = []
    for item in filter(None, map(str.strip, re.split(r"(?<!\\),", mixture))):
        *spec, text = re.split(r"(?<!\\)=", item)
        try:
            part = MixturePart("=".join(spec).strip(), float(text))
        except ValueError:  # no rate, or an `=` within a path
            part = MixturePart(item, None)
        path = re.sub(r"\\([,=])", r"\1", part.spec)
        parts.append(part._replace(spec=re.sub(r"(?<=[^/:])/+$", "", path)))
    rates = [part.rate for part in parts if part.rate is not None]
    if not parts or not all(part.spec for part in parts):
        raise UserError(f"data.mixture={mixture!r} names no source; name one, as python_docs.")
    finite = all(0 < rate < math.inf for rate in rates) and sum(rates) < math.inf
    if rates and (len(rates) < len(parts) or not finite):
        raise UserError(
            f"data.mixture={mixture!r}: give every source a rate above 0, or none of them."
        )
    specs = [part.spec for part in parts]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise UserError(f"data.mixture names {twice} twice; name it once, with a higher rate.")
    return parts


def has_plain_text(mixture: str) -> bool:
    """Whether `data.mixture` has a source of text, for `data.objective`, and not only tasks."""
    return not all(is_task_spec(part.spec) for part in parse_mixture(mixture))


def find_sources(data: DataConfig) -> list[Source]:
    """Returns the sources of a config's mixture, no two with the same name.

    Raises `UserError` if one is not found.
    """
    parts = parse_mixture(data.mixture)
    _read_counts(data.counts)  # what is wrong with it is told before anything is read
    if data.data_dir is not None and not any(needs_folder(part.spec) for part in parts):
        raise UserError(
            f"data.data_dir={data.data_dir!r} is no packed text, and data.mixture={data.mixture}"
            " reads nothing else there; name what is there in data.mixture, or leave data_dir out."
        )
    if data.data_dir not in (None, HUB) and not as_path(data.data_dir).is_dir():
        raise UserError(
            f"data.data_dir={data.data_dir!r} does not exist; name the folder or bucket that has"
            " the text, or what `switch-jax data pack` wrote."
        )
    sources: dict[str, Source] = {}
    for part in parts:
        for source in sources_for_spec(part.spec, data):
            if source.name in sources and not is_file_pattern(part.spec):
                raise UserError(f"data.mixture names {source.name} twice; name it once.")
            source.name, source.spec = _unused_name(source.name, sources), part.spec
            sources[source.name] = source
    return list(sources.values())


def select_sources(
    data: DataConfig, names: Collection[str], specs: Mapping[str, str]
) -> list[tuple[MixturePart, list[str]]]:
    """Returns the parts of a config's mixture, each with the names of its sources.

    Args:
      names: of the sources that exist.
      specs: `Source.spec` by name; a part that names files matches the source with an equal spec.

    Raises `UserError` if a part matches no source, or two parts match the same.
    """
    selected: list[tuple[MixturePart, list[str]]] = []
    taken: list[str] = []
    for part in parse_mixture(data.mixture):
        if is_file_pattern(part.spec):
            chosen = [n for n in names if specs.get(n) == part.spec and n not in taken][:1]
        else:
            chosen = group_members(part.spec, names)
        if not chosen:
            raise UserError(
                f"data.mixture names {part.spec}, and there is only {', '.join(sorted(names))};"
                " name one of these, or pack it with `switch-jax data pack`."
            )
        twice = sorted(set(chosen) & set(taken))
        if twice:
            raise UserError(f"data.mixture names {twice[0]} twice; name it once.")
        selected.append((part, chosen))
        taken += chosen
    return selected


def mixture_rates(
    data: DataConfig, documents: Mapping[str, int | None], specs: Mapping[str, str]
) -> dict[str, float]:
    """Returns the share of the training rows of each source in a config's mixture; sums to one.

    Args:
      documents: number of training documents of each source that exists; None where it is unknown.
        Sources with 0 are left out.
      specs: as for `select_sources`.

    Raises `UserError` if a part of the mixture matches no source, and if a number of documents is
    needed and unknown.
    """
    weights: dict[str, float] = {}
    counts = _read_counts(data.counts)
    selected = select_sources(data, documents, specs)
    for part, names in selected:
        trained = [name for name in names if documents[name] != 0]
        if not trained and part.rate is not None:
            raise UserError(
                f"data.mixture gives {part.spec} a rate, and it has no text to train on; leave it"
                " out, or name files for it that have text."
            )
        is_alone = len(trained) == 1 and (part.rate is not None or len(selected) == 1)
        sizes = {
            name: 1.0 if is_alone else _size_weight(data, name, counts.get(name, documents[name]))
            for name in trained
        }
        rate = sum(sizes.values()) if part.rate is None else part.rate
        weights |= {name: rate * size / sum(sizes.values()) for name, size in sizes.items()}
    if not weights:
        raise UserError(f"data.mixture={data.mixture} has no text to train on; name another one.")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def empty_split_note(name: str, split: Split) -> str:
    """Returns the sentence on a source without text for a split that other sources have."""
    return f"{name} has no text for {split}, and is left out there."


def _size_weight(data: DataConfig, name: str, documents: int | None) -> float:
    """Returns (number of documents) ** `data.rate_exponent`."""
    if not documents:
        raise UserError(
            f"How many documents {name} has is not known, and its rate depends on it; give rates in"
            " data.mixture, or name a JSON file of the numbers, by source, as data.counts."
        )
    return documents**data.rate_exponent


def _read_counts(path: str | None) -> dict[str, int]:
    """Returns the numbers of documents in the JSON file `data.counts`, by source."""
    if path is None:
        return {}
    counts = read_json(fetch(path))
    if not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
        raise UserError(
            f"data.counts={path!r} is not an object of whole numbers above 0; name a JSON file such"
            ' as {"mc4.sw": 985654, "c4": 364868892}.'
        )
    return counts


def _unused_name(name: str, used: Collection[str]) -> str:
    """Returns `name`, with a number appended if it is used."""
    numbered = (f"{name}_{i}" for i in range(2, len(used) + 3))
    return next(n for n in (name, *numbered) if n not in used)
