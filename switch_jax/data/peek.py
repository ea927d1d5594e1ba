"""Decoded examples of every source, with the share of padding and the speed of the reader."""

import textwrap
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from switch_jax.config import Config
from switch_jax.data.batch import Batch
from switch_jax.data.readers import open_batches, open_epoch_by_source
from switch_jax.data.sources.source import Split
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.data.vocabulary_builder import open_vocabulary
from switch_jax.errors import printable

_STACKS = {"inputs": "encoder", "targets": "decoder"}
_TOKENS = {"inputs": "encoder_input_tokens", "targets": "decoder_target_tokens"}
_TIMED_SECONDS = 1.0


def examples_text(config: Config, count: int, split: Split = "train") -> str:
    """Returns the first `count` rows of every source as text, then padding and reading speed.

    Raises `UserError` as `open_batches` does.
    """
    vocabulary = open_vocabulary(config)
    lines: list[str] = []
    for source, batches in open_epoch_by_source(config, split).items():
        for number, row in enumerate(islice(_split_rows(batches), count), start=1):
            lines += [f"{source}, example {number}", *_describe_row(row, vocabulary, config), ""]
    batches = open_batches(config, split)
    first = next(batches)  # not timed: it starts the pipeline
    pad_id = config.model.pad_id
    padding = {side: 1 - _token_mask(first, side, pad_id).mean() for side in _STACKS}
    tokens, seconds = 0, 0.0
    start = time.perf_counter()
    while seconds < _TIMED_SECONDS:
        batch = next(batches)
        tokens += sum(int(_token_mask(batch, side, pad_id).sum()) for side in _STACKS)
        seconds = time.perf_counter() - start
    lines += [
        f"Padding: {padding['inputs']:.1%} of the inputs, {padding['targets']:.1%} of the targets.",
        f"Speed: {tokens / seconds:,.0f} tokens per second (reader {config.data.reader}).",
    ]
    return "\n".join(lines)


def _split_rows(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yields single rows, without the batch axis; leaves out rows of padding."""
    for batch in batches:
        for i in np.flatnonzero(batch["decoder_loss_weights"].any(axis=1)):
            yield {name: values[i] for name, values in batch.items()}


def _token_mask(batch: Batch, side: str, pad_id: int) -> np.ndarray:
    """Bool of the shape of the tokens: True where a token is not padding."""
    segments = batch.get(f"{_STACKS[side]}_segment_ids")
    return batch[_TOKENS[side]] != pad_id if segments is None else segments > 0


def _describe_row(row: Batch, vocabulary: Vocabulary, config: Config) -> list[str]:
    """Returns the lines of a row: one or more for each segment of inputs and targets."""
    lines = []
    for side, stack in _STACKS.items():
        tokens, mask = row[_TOKENS[side]], _token_mask(row, side, config.model.pad_id)
        segments = row.get(f"{stack}_segment_ids", mask.astype(np.int32))
        for segment in range(1, segments.max(initial=0) + 1):
            name = f"{side} {segment}" if f"{stack}_segment_ids" in row else side
            ids = tokens[segments == segment]
            text = f"({len(ids)} tokens) {printable(' '.join(vocabulary.decode(ids).split()))}"
            lines.append(
                textwrap.fill(text, 100, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
            )
    return lines
