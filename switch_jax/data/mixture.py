"""`data.mixture`: which sources training draws from, and how often.

A mixture is one source, or several with commas between them, each with a rate or none:

    c4
    c4=0.7, /books/*.jsonl.gz=0.3
    mc4

Rates are shares of the training rows; they need not sum to one. Sources without a rate are drawn
in proportion to (number of documents) ** `data.rate_exponent`: 0.3 for mT5 and mSwitch; it is one
over what seqio calls the temperature. So are the members of a group such as mc4, whose rate they
share.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from etils import epath

from switch_jax.config import DataConfig
from switch_jax.data.catalog import group_members, is_file_pattern, needs_folder, sources_for_spec
from switch_jax.data.sources.source import Source
from switch_jax.errors import UserError


class MixturePart(NamedTuple):
    """A source or group of sources as the config names it."""

    spec: str
    rate: float | None


def parse_mixture(mixture: str) -> list[MixturePart]:
    """Raises `UserError` for a mixture without parts, and where only some have a rate."""
    parts = []
    for item in filter(None, map(str.strip, mixture.split(","))):
        spec, _, text = item.rpartition("=")
        try:
            parts.append(MixturePart(spec.strip(), float(text)))
        except ValueError:  # no rate, or an `=` within a path
            parts.append(MixturePart(item, None))
    rates = [part.rate for part in parts if part.rate is not None]
    if not parts or not all(part.spec for part in parts):
        raise UserError(f"data.mixture={mixture!r} names no source; name one, as python_docs.")
    finite = all(0 < rate < math.inf for rate in rates) and sum(rates) < math.inf
    if rates and (len(rates) < len(parts) or not finite):
        raise UserError(
            f"data.mixture={mixture!r}: give every source a rate above 0, or none of them."
        )
    return parts


def find_sources(data: DataConfig) -> list[Source]:
    """The sources of a config's mixture, where their text lies; no two have the same name.

    Raises `UserError` where one is not found.
    """
    parts = parse_mixture(data.mixture)
    if data.data_dir is not None and not any(needs_folder(part.spec) for part in parts):
        raise UserError(
            f"data.data_dir={data.data_dir!r} is no packed text, and data.mixture={data.mixture}"
            " reads nothing else there; name what is there in data.mixture, or leave data_dir out."
        )
    if data.data_dir is not None and not epath.Path(data.data_dir).is_dir():
        raise UserError(
            f"data.data_dir={data.data_dir!r} does not exist; name the folder or bucket that has"
            " the text, or what `switch-jax data pack` wrote."
        )
    sources: dict[str, Source] = {}
    for part in parts:
        for source in sources_for_spec(part.spec, data.data_dir):
            if source.name in sources and not is_file_pattern(part.spec):
                raise UserError(f"data.mixture names {source.name} twice; name it once.")
            source.name, source.spec = _unused(source.name, sources), part.spec
            sources[source.name] = source
    return list(sources.values())


def select_sources(
    data: DataConfig, names: Collection[str], specs: Mapping[str, str]
) -> list[tuple[MixturePart, list[str]]]:
    """Which of the sources called `names` each part of a config's mixture stands for.

    Args:
      specs: what each was found by; a part that names files stands for those found by the same.

    Raises `UserError` where a part stands for none, or two for the same.
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
    """Of each source in a config's mixture, the share of the training rows, which sum to one.

    Args:
      documents: of the sources there are, how many training documents each has, where known.
        Sources without any are left out.
      specs: see `select`.

    Raises `UserError` where the mixture names one that is not there, or where the number of
    documents matters and is not known.
    """
    weights: dict[str, float] = {}
    selected = select_sources(data, documents, specs)
    for part, names in selected:
        trained = [name for name in names if documents[name] != 0]
        alone = len(trained) == 1 and (part.rate is not None or len(selected) == 1)
        sizes = {name: 1.0 if alone else _size(data, name, documents[name]) for name in trained}
        rate = sum(sizes.values()) if part.rate is None else part.rate
        weights |= {name: rate * size / sum(sizes.values()) for name, size in sizes.items()}
    if not weights:
        raise UserError(f"data.mixture={data.mixture} has no text to train on; name another one.")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _size(data: DataConfig, name: str, documents: int | None) -> float:
    """What a source without a rate weighs."""
    documents = _counts(data.counts).get(name, documents)
    if not documents:
        raise UserError(
            f"How many documents {name} has is not known, and its rate depends on it; give rates in"
            " data.mixture, or name a JSON file of the numbers, by source, as data.counts."
        )
    return documents**data.rate_exponent


def _counts(path: str | None) -> dict[str, int]:
    if path is None:
        return {}
    try:
        counts = json.loads(Path(path).expanduser().read_text())
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise ValueError("it must be an object of whole numbers")
        if counts and min(counts.values()) < 1:
            raise ValueError("a number is below 1")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.counts={path!r} cannot be read ({error}); name a JSON file such as"
            ' {"mc4.sw": 985654, "c4": 364868892}.'
        ) from error
    return counts


def _unused(name: str, names: Collection[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    numbered = (f"{name}_{i}" for i in range(2, len(names) + 3))
    return next(n for n in (name, *numbered) if n not in names)
