"""Blanks of a text: numbered as sentinels for a model, and filled with its output."""

import re
from collections.abc import Iterator

from switch_jax.config import Config
from switch_jax.data import has_plain_text, uses_sentinels

_BLANK = re.compile(r"_{3,}")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def is_trained_on_blanks(config: Config) -> bool:
    """Whether a model was pretrained on filling blanks.

    It was if `data.mixture` of its config has text, and `data.objective` uses sentinels.
    """
    return has_plain_text(config.data.mixture) and uses_sentinels(config.data.objective)


def has_blanks(text: str) -> bool:
    """Whether a text has a blank: `___` or a sentinel such as `<extra_id_0>`."""
    return bool(_BLANK.search(text) or _SENTINEL.search(text))


def number_blanks(text: str, num_sentinels: int) -> str | None:
    """Returns `text` with every `___` replaced by the next sentinel that it does not have yet.

    Returns None where it has more blanks than there are sentinels.
    """
    unused: Iterator[str] = (
        sentinel
        for sentinel in map("<extra_id_{}>".format, range(num_sentinels))
        if sentinel not in text
    )
    parts = _BLANK.split(text)
    numbered = parts[0]
    for part in parts[1:]:
        sentinel = next(unused, None)
        if sentinel is None:
            return None
        numbered += sentinel + part
    return numbered


def fill_sentinels(text: str, output: str) -> str:
    """Replaces the sentinels of `text` by the text behind them in `output`.

    A sentinel without a text in `output` becomes `___`. Returns `output` if it has a text for none
    of them.
    """
    pieces = _SENTINEL.split(output)
    answers = {blank: answer.strip() for blank, answer in zip(pieces[1::2], pieces[2::2])}
    if not any(answers.get(blank) for blank in _SENTINEL.findall(text)):
        return output.strip()
    return _SENTINEL.sub(lambda blank: answers.get(blank[1]) or "___", text)
