"""A text file as batches: all of it, in order, as training would see it."""

from pathlib import Path

import numpy as np

from switch_jax.config import Config
from switch_jax.data.batch import ALL_ROWS, Batch, ProcessRows, padded_batch
from switch_jax.data.span_corruption import corrupt_spans, span_lengths
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.errors import UserError


def text_file_batches(
    path: Path, vocabulary: Vocabulary, config: Config, process_rows: ProcessRows = ALL_ROWS
) -> list[Batch]:
    """One process's rows of the batches that a UTF-8 text makes, span-corrupted.

    The text is cut to the length that fills a row; what is left at its end is a shorter row, and
    rows of padding fill the last batch. Rows are not packed, whatever `data.pack` says: packed,
    they would be the same segments, alone in their rows.

    Raises `UserError` for a file that cannot be read, is empty, or is not UTF-8.
    """
    data, tokens = config.data, np.array(vocabulary.encode(_read(path)), np.int64)
    if not len(tokens):
        raise UserError(f"{path} is empty; name a file with text.")
    length = span_lengths(data.inputs_length, data.targets_length).tokens
    whole = len(tokens) // length
    parts = [tokens[: whole * length].reshape(whole, length), tokens[None, whole * length :]]
    rows = []
    for number, part in zip((0, whole), parts):
        if part.size:
            examples = number + np.arange(len(part))
            corrupted = corrupt_spans(part, data.seed, examples, vocabulary.sentinel(0))
            rows.append(padded_batch(*corrupted, data))
    B, offsets = data.batch_size, process_rows.indices(data.batch_size)
    joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    count = len(joined["encoder_input_tokens"])
    padded = {name: np.pad(x, ((0, -count % B), (0, 0))) for name, x in joined.items()}
    starts = range(0, count, B)
    return [{name: x[start + offsets] for name, x in padded.items()} for start in starts]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Input file {str(path)!r} cannot be read ({error.strerror}); name a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start:,} is not); convert it."
        ) from error
