"""Answers of a model to texts, decoded in batches of similar lengths."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from switch_jax.inference.decoding import SamplingOptions, length_penalty
from switch_jax.inference.generation import generate_with_scores
from switch_jax.inference.prompts import EncodedPrompt, Prompt, PromptCodec
from switch_jax.model import SwitchTransformer

_BATCH_SIZE = 32  # texts decoded at once
WINDOW = 4 * _BATCH_SIZE  # texts that are read at once, and batched by their lengths
_LENGTH_MULTIPLE = 64  # to which inputs and prefixes are padded


class Answer(NamedTuple):
    """An answer to a text.

    text: the output, or the text with its blanks filled.
    score: log probability, in nats, of the tokens behind the prefix, EOS included; of the model,
      whatever the temperature.
    normalized_score: what beam search ranks by, `score` divided by `length_penalty` of all tokens;
      None without beam search.
    ended: False: the answer was cut off at the maximum number of tokens.
    """

    text: str
    score: float
    normalized_score: float | None
    ended: bool


def answer_texts(
    model: SwitchTransformer,
    codec: PromptCodec,
    prompts: Iterable[Prompt],
    options: SamplingOptions | None = None,
    first_row: int = 0,
) -> Iterator[list[Answer]]:
    """Yields the answers to each text, in order: at most `options.num_return` of them.

    Beam search yields the best answers, first those that ended and then those that were cut off,
    each by descending `normalized_score`. Their tokens differ, their texts may be equal.

    `WINDOW` texts are read at once and decoded in batches of similar lengths. Which texts share a
    batch depends on the texts of the window alone, and a sample on the seed and its row number; so
    the answers from any window on are those of a call from the first text on.

    Args:
      model: from `switch_jax.load`.
      codec: of the model.
      prompts: read as the answers are.
      options: of decoding; greedy by default.
      first_row: number of the first text, a multiple of `WINDOW`.

    Raises `UserError` for a text that `codec` refuses.
    """
    options = SamplingOptions() if options is None else options
    prompts = iter(prompts)
    while window := [codec.encode(prompt) for prompt in islice(prompts, WINDOW)]:
        yield from _answer_window(model, codec, window, options, first_row)
        first_row += len(window)


def _answer_window(
    model: SwitchTransformer,
    codec: PromptCodec,
    window: Sequence[EncodedPrompt],
    options: SamplingOptions,
    first_row: int,
) -> list[list[Answer]]:
    ids = model.config.model
    order = sorted(range(len(window)), key=lambda i: len(window[i].source))
    # One program for all batches, except where there are few texts in all.
    num_rows = _BATCH_SIZE if first_row else min(_BATCH_SIZE, len(window))
    answers: list[list[Answer]] = [[] for _ in window]
    for begin in range(0, len(order), _BATCH_SIZE):
        numbers = order[begin : begin + _BATCH_SIZE]
        # Copies of the last row take no extra decoding steps.
        padded = numbers + numbers[-1:] * (num_rows - len(numbers))
        sequences = generate_with_scores(
            model,
            _pad([window[i].source for i in padded], ids.pad_id),
            codec.max_length,
            options,
            row_numbers=[first_row + i for i in padded],
            prefix_tokens=_pad([window[i].prefix for i in padded], ids.pad_id, codec.max_length),
        )
        tokens_BxKxL, score_BxK = map(np.asarray, sequences)
        for i, tokens_KxL, score_K in zip(numbers, tokens_BxKxL, score_BxK):
            answers[i] = [
                _make_answer(codec, window[i], tokens_L, float(score), options)
                for tokens_L, score in zip(tokens_KxL, score_K)
                if score > -np.inf
            ]
    return answers


def _make_answer(
    codec: PromptCodec,
    prompt: EncodedPrompt,
    tokens_L: np.ndarray,
    score: float,
    options: SamplingOptions,
) -> Answer:
    ends = np.flatnonzero(tokens_L == codec.eos_id)
    length = int(ends[0]) + 1 if len(ends) else len(tokens_L)
    text = codec.decode(prompt, tokens_L[:length].tolist())
    if options.beam_size == 1:
        return Answer(text, score, None, bool(len(ends)))
    log_probability = score * length_penalty(length, options.length_penalty)
    return Answer(text, float(log_probability), score, bool(len(ends)))


def _pad(rows: Sequence[list[int]], pad_id: int, max_length: int | None = None) -> np.ndarray:
    """Returns rows of ids as [B, L] int32, with L a multiple, or `max_length` where that is less.

    The multiple keeps the number of compiled programs small.
    """
    length = -(-max(map(len, rows)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    length = length if max_length is None else min(length, max_length)
    return np.array([row + [pad_id] * (length - len(row)) for row in rows], np.int32)
