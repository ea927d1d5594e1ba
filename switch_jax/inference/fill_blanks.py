"""Text generation for texts: blanks filled with a model's output, or the output itself."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from switch_jax.data import Vocabulary, has_plain_text, uses_sentinels
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
    fill_blanks: bool | None = None,
) -> Iterator[str]:
    """Yields each text with its blanks filled, or else the model's output for it, in order.

    A blank is `___` or a sentinel such as `<extra_id_0>`. A blank for which the output has no text
    becomes `___`. The output itself is yielded for a text without blanks, where it has a text for
    none of them, and where blanks are not filled. Of several results, the first is used.

    Args:
      model: from `switch_jax.load`.
      vocabulary: the model's.
      texts: each has at most as many blanks as the vocabulary has sentinels.
      max_length: maximum number of generated tokens.
      options: of decoding; greedy by default.
      fill_blanks: False: a `___` is part of the text, as in a question to a model for tasks. None:
        blanks are filled if the model was pretrained on filling them: if `data.mixture` of its
        config has text, and `data.objective` uses sentinels.

    Raises `UserError` for a text with more blanks than there are sentinels.
    """
    options = SamplingOptions() if options is None else options
    if fill_blanks is None:
        data = model.config.data
        fill_blanks = has_plain_text(data.mixture) and uses_sentinels(data.objective)
    if fill_blanks:
        texts = [_number_blanks(text, len(vocabulary.sentinels)) for text in texts]
    ids = model.config.model
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
            answer = vocabulary.decode(output.tolist())
            yield _fill_sentinels(text, answer) if fill_blanks else answer


def _number_blanks(text: str, num_sentinels: int) -> str:
    """Returns `text` with every `___` replaced by the next sentinel that it does not have yet."""
    unused = (
        sentinel
        for sentinel in map("<extra_id_{}>".format, range(num_sentinels))
        if sentinel not in text
    )

    def next_sentinel(blank: re.Match) -> str:
        sentinel = next(unused, None)
        if sentinel is None:
            raise UserError(
                f"A text has more blanks than the vocabulary has sentinels ({num_sentinels}); split"
                " it."
            )
        return sentinel

    return re.sub(r"_{3,}", next_sentinel, text)


def _fill_sentinels(text: str, output: str) -> str:
    """Replaces the sentinels of `text` by the text behind them in `output`.

    Returns `output` if it has a text for none of them.
    """
    pieces = re.split(r"<extra_id_(\d+)>", output)
    answers = {blank: answer.strip() for blank, answer in zip(pieces[1::2], pieces[2::2])}
    if not any(answers.get(blank) for blank in re.findall(r"<extra_id_(\d+)>", text)):
        return output.strip()
    return re.sub(r"<extra_id_(\d+)>", lambda blank: answers.get(blank[1]) or "___", text)
