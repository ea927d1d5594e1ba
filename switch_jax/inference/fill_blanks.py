"""Filling blanks: completes texts that have blanks or sentinels, with a model's output."""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from switch_jax.data import Vocabulary
from switch_jax.errors import UserError
from switch_jax.inference.decoding import SamplingOptions
from switch_jax.inference.generation import generate_with_scores
from switch_jax.model import SwitchTransformer

FILL_BATCH_SIZE = 32  # texts decoded at once
_LENGTH_MULTIPLE = 64  # to which inputs are padded


def complete_texts(
    model: SwitchTransformer,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    options: SamplingOptions | None = None,
) -> Iterator[str]:
    """Yields each text with its blanks filled, in order.

    A blank is `___` or a sentinel such as `<extra_id_0>`. For a text without blanks, yields the
    model's output. A blank for which the output has no text becomes `___`. Of several results, the
    first is used.

    Args:
      model: from `switch_jax.load`.
      vocabulary: the model's.
      texts: each has at most as many blanks as the vocabulary has sentinels.
      max_length: maximum number of generated tokens.
      options: of decoding; greedy by default.

    Raises `UserError` for a text with more blanks than there are sentinels.
    """
    options = SamplingOptions() if options is None else options
    ids = model.config.model
    texts = [_number_blanks(text, len(vocabulary.sentinels)) for text in texts]
    tokens = [[*vocabulary.encode(text), ids.eos_id] for text in texts]
    for first in range(0, len(texts), FILL_BATCH_SIZE):
        rows = tokens[first : first + FILL_BATCH_SIZE]
        # Padding keeps the number of compiled programs small: rows to a multiple of a length, and
        # the last batch with copies of its last row, which take no extra decoding steps.
        length = -(-max(map(len, rows)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        rows += rows[-1:] * (min(FILL_BATCH_SIZE, len(texts)) - len(rows))
        source = np.array([row + [ids.pad_id] * (length - len(row)) for row in rows], np.int32)
        sequences = generate_with_scores(model, source, max_length, options, first_row=first)
        outputs = np.asarray(sequences.token_BxKxL[:, 0])
        for text, output in zip(texts[first : first + FILL_BATCH_SIZE], outputs):
            yield _fill_sentinels(text, vocabulary.decode(output.tolist()))


def _number_blanks(text: str, limit: int) -> str:
    """Returns `text` with every `___` replaced by the next sentinel."""
    numbers = itertools.count()
    text = re.sub(r"_{3,}", lambda _: f"<extra_id_{next(numbers)}>", text)
    if next(numbers) > limit:
        raise UserError(
            f"A text has more blanks than the vocabulary has sentinels ({limit}); split it."
        )
    return text


def _fill_sentinels(text: str, output: str) -> str:
    """Replaces the sentinels of `text` by the text behind them in `output`.

    Returns `output` if `text` has no sentinels.
    """
    if not re.search(r"<extra_id_\d+>", text):
        return output.strip()
    pieces = re.split(r"<extra_id_(\d+)>", output)
    answers = dict(zip(pieces[1::2], pieces[2::2]))

    def fill(blank: re.Match) -> str:
        return answers.get(blank[1], "").strip() or "___"

    return re.sub(r"<extra_id_(\d+)>", fill, text)
