"""Batches of a whole text file under `data.objective`, in order."""

from pathlib import Path

import numpy as np

from switch_jax.config import Config
from switch_jax.data.batch import ALL_ROWS, Batch, ProcessRows, add_padding_rows, padded_batch
from switch_jax.data.objectives import open_objective
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.errors import UserError


def text_file_batches(
    path: Path, vocabulary: Vocabulary, config: Config, process_rows: ProcessRows = ALL_ROWS
) -> list[Batch]:
    """Returns one process's rows of the batches of a UTF-8 text file, with noise.

    The text is cut into pieces that fill a row each; the remainder is a shorter row, and rows of
    padding fill the last batch. Rows are never packed, whatever `data.pack` is: every piece but the
    last fills its row, so packing would change nothing but the features.

    Raises `UserError` for a file that cannot be read, is empty, or is not UTF-8, and for a
    vocabulary with fewer sentinels than a row needs.
    """
    data, tokens = config.data, np.array(vocabulary.encode(read_text_file(path)), np.int64)
    if not len(tokens):
        raise UserError(f"{path} is empty; name a file with text.")
    objective = open_objective(config, vocabulary)
    length = objective.text_length(data.inputs_length, data.targets_length)
    full_rows = len(tokens) // length
    end = full_rows * length
    full, rest = tokens[:end].reshape(full_rows, length), tokens[None, end:]
    groups = []  # of texts whose inputs, and whose targets, are equally long
    for first, texts in ((0, full), (full_rows, rest)):
        if texts.size:
            numbers = first + np.arange(len(texts))
            for group, inputs, targets in objective.apply(texts, numbers, numbers):
                groups.append((numbers[group], padded_batch(inputs, targets, config)))
    order = np.argsort(np.concatenate([numbers for numbers, _ in groups]))
    rows = {
        name: np.concatenate([batch[name] for _, batch in groups])[order] for name in groups[0][1]
    }
    count, B = len(rows["encoder_input_tokens"]), data.batch_size
    padded = add_padding_rows(rows, -count % B, config.model)
    indices = process_rows.indices(B)
    return [
        {name: x[start + indices] for name, x in padded.items()} for start in range(0, count, B)
    ]


def read_text_file(path: Path) -> str:
    """Returns the text of a UTF-8 file; raises `UserError` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"Input file {str(path)!r} cannot be read ({error.strerror}); name a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start:,} is not); convert it."
        ) from error
