"""complete_texts: to be written."""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from switch_jax.data import EOS, NUM_SENTINELS, Vocabulary
from switch_jax.errors import UserError
from switch_jax.inference.decoding import SamplingOptions
from switch_jax.inference.generation import find_sequences
from switch_jax.model import SwitchTransformer

FILL_BATCH_SIZE = 32  # texts that are decoded at once


def complete_texts(
    model: SwitchTransformer,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    options: SamplingOptions | None = None,
) -> Iterator[str]:
    """Texts with their blanks filled: `___`, or sentinels such as `<extra_id_0>`, in order.

    Of a text without blanks, what the model writes. A blank that it says nothing about stays
    `___`. Of several results, the first counts.
    Raises `UserError` for a text with more blanks than there are sentinels.
    """
    options = SamplingOptions() if options is None else options
    texts = [_with_sentinels(text) for text in texts]
    tokens = [[*vocabulary.encode(text), EOS] for text in texts]
    for first in range(0, len(texts), FILL_BATCH_SIZE):
        rows = tokens[first : first + FILL_BATCH_SIZE]
        # Filled up, so that few programs are compiled: with zeros to a length that many have,
        # and in the last batch with rows that end when their equals do.
        length = -(-max(map(len, rows)) // 64) * 64
        rows += rows[-1:] * (min(FILL_BATCH_SIZE, len(texts)) - len(rows))
        source = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
        found = find_sequences(model, source, max_length, options, first_row=first)
        outputs = np.asarray(found.token_BxKxL[:, 0])
        for text, output in zip(texts[first : first + FILL_BATCH_SIZE], outputs):
            yield _filled(text, vocabulary.decode([int(t) for t in output if t > EOS]))


def _with_sentinels(text: str) -> str:
    """`text` with `___` numbered."""
    numbers = itertools.count()
    text = re.sub(r"_{3,}", lambda _: f"<extra_id_{next(numbers)}>", text)
    if next(numbers) > NUM_SENTINELS:
        raise UserError(f"A text has more than {NUM_SENTINELS} blanks; split it.")
    return text


def _filled(text: str, output: str) -> str:
    """`text` with its sentinels replaced by what follows them in `output`; or that, without any."""
    if not re.search(r"<extra_id_\d+>", text):
        return output.strip()
    pieces = re.split(r"<extra_id_(\d+)>", output)
    answers = dict(zip(pieces[1::2], pieces[2::2]))

    def fill(blank: re.Match) -> str:
        return answers.get(blank[1], "").strip() or "___"

    return re.sub(r"<extra_id_(\d+)>", fill, text)
