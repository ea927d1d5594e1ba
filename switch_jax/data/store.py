"""Tokenised text in files, and batches from it that are a pure function of the row number.

A packed mixture is a folder with the vocabulary and one store for each split:

    vocabulary.model
    train/       tokens.bin    all documents' tokens, one after the other, uint16 or uint32
                 offsets.npy   [documents + 1] int64, where each begins and ends
                 meta.json     counts, dtype, and what the tokens were made from
    validation/  the same
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np

from switch_jax.cache import cache_root, made_once
from switch_jax.data import corpus, packing
from switch_jax.data.batch import EVERYTHING, Batch, Feed, RowIterator, padded_batch, shifted_right
from switch_jax.data.corpus import Split
from switch_jax.data.counter import permuted
from switch_jax.data.spans import corrupt, span_lengths
from switch_jax.data.vocabulary import FILE_NAME, Vocabulary, open_vocabulary
from switch_jax.errors import UserError
from switch_jax.schema import Config


class TokenStore:
    """A split's tokens, memory-mapped.

    Attributes:
      tokens: [tokens] uint16 or uint32.
      offsets: [documents + 1] int64.
      vocabulary: fingerprint of the vocabulary.
      fingerprint: identifies text, split and vocabulary.

    Raises `UserError` for a folder that is missing or incomplete.
    """

    def __init__(self, directory: Path):
        if not directory.is_dir():
            raise UserError(
                f"There is no token store {str(directory)!r};"
                " set data.data_dir to a folder that has one, or to None for the cache."
            )
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.tokens = np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r")
            self.offsets = np.load(directory / "offsets.npy")
            complete = meta["tokens"] == len(self.tokens) == self.offsets[-1]
            self.vocabulary: str = meta["vocabulary"]
            self.fingerprint = f"{meta['corpus']}/{meta['split']}/{meta['vocabulary']}"
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            complete = False
        if not complete:
            raise UserError(
                f"Token store {str(directory)!r} is damaged; delete it and make it again."
            )


def pack(mixture: str, vocabulary: Vocabulary, directory: Path) -> None:
    """Writes a mixture's splits, tokenised, and the vocabulary into a new folder.

    Not atomic: call it through `cache.made_once`.
    """
    directory.mkdir()
    shutil.copyfile(vocabulary.path, directory / FILE_NAME)
    for split in corpus.SPLITS:
        _write(mixture, split, vocabulary, directory / split)


def _write(mixture: str, split: Split, vocabulary: Vocabulary, directory: Path) -> None:
    directory.mkdir()
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    offsets = [0]
    with open(directory / "tokens.bin", "wb") as file:
        for document in corpus.documents(mixture, split):
            ids = vocabulary.encode(document.text)
            file.write(np.array(ids, dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
    np.save(directory / "offsets.npy", np.array(offsets, np.int64))
    meta = {
        "mixture": mixture,
        "split": split,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "dtype": np.dtype(dtype).name,
        "corpus": corpus.fingerprint(mixture),
        "vocabulary": vocabulary.fingerprint,
        "vocabulary_size": vocabulary.size,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def open_store(config: Config, split: Split, vocabulary: Vocabulary) -> TokenStore:
    """The store that a config reads; in the cache, made on first use, unless it names one.

    Raises `UserError` where the named one is missing, damaged, or of another vocabulary.
    """
    mixture = config.data.mixture
    if config.data.data_dir is not None:
        directory = Path(config.data.data_dir)
    else:
        name = f"{mixture}-{corpus.fingerprint(mixture)[:16]}-{vocabulary.fingerprint[:16]}"
        build = functools.partial(pack, mixture, vocabulary)
        directory = made_once(cache_root() / "stores" / name, build)
    store = TokenStore(directory / split)
    if store.vocabulary != vocabulary.fingerprint:
        raise UserError(
            f"Token store {str(directory)!r} was made with another vocabulary than"
            f" {str(vocabulary.path)!r}; set data.vocabulary to None to use its own."
        )
    return store


class StoreIterator(RowIterator):
    """Span-corrupted rows of a token store, shuffled globally, each once per epoch.

    Without packing, documents are joined and cut to the length that fills a row, as T5
    does; the last, incomplete cut is left out. With packing, documents are kept apart: each
    is cut where it is too long, each piece is corrupted on its own, and pieces share rows
    as segments.

    Raises `UserError` where the lengths do not fit each other or the store.
    """

    def __init__(self, config: Config, split: Split, feed: Feed = EVERYTHING):
        data = config.data
        vocabulary = open_vocabulary(config)
        store = open_store(config, split, vocabulary)
        super().__init__(data.batch_size, feed, store.fingerprint)
        self._data = data
        self._tokens = store.tokens
        self._first_sentinel = vocabulary.sentinel(0)
        lengths = span_lengths(data.inputs_length, data.targets_length)
        self._length = lengths.tokens
        if data.pack:
            self._plan = packing.plan(store.offsets, lengths, data.targets_length)
            self._size = len(self._plan.row_offsets) - 1
        else:
            self._size = len(store.tokens) // lengths.tokens
        if self._size == 0:
            raise UserError(
                f"The {split} split of {data.mixture} has {len(store.tokens)} tokens, less than"
                f" one row of {lengths.tokens}; set data.inputs_length lower, or data.pack=True."
            )

    def rows(self, numbers: np.ndarray) -> Batch:
        epochs, within = np.divmod(numbers, self._size)
        rows = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = permuted(within[now], self._size, self._data.seed, int(epoch))
        return self._packed(rows, epochs) if self._data.pack else self._joined(rows, epochs)

    def _joined(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        tokens = self._tokens[rows[:, None] * self._length + np.arange(self._length)]
        corrupted = self._corrupt(tokens, epochs * self._size + rows)
        return padded_batch(*corrupted, self._data)

    def _packed(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        plan = self._plan
        counts = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
        row_of = np.repeat(np.arange(len(rows)), counts)
        segment = np.concatenate([np.arange(1, n + 1) for n in counts])
        pieces = plan.members[plan.row_offsets[rows][row_of] + segment - 1]
        examples = epochs[row_of] * len(plan.starts) + pieces
        inputs: list[np.ndarray] = [np.zeros(0)] * len(pieces)
        targets = inputs.copy()
        for length in np.unique(plan.lengths[pieces]):  # rows of one length at a time
            same = np.flatnonzero(plan.lengths[pieces] == length)
            tokens = self._tokens[plan.starts[pieces[same], None] + np.arange(length)]
            for i, x, y in zip(same, *self._corrupt(tokens, examples[same])):
                inputs[i], targets[i] = x, y
        batch = _segments("encoder", inputs, row_of, segment, self._data.inputs_length)
        batch |= _segments("decoder", targets, row_of, segment, self._data.targets_length)
        batch["encoder_input_tokens"] = batch.pop("encoder_tokens")
        batch["decoder_target_tokens"] = batch.pop("decoder_tokens")
        batch["decoder_input_tokens"] = shifted_right(
            batch["decoder_target_tokens"], batch["decoder_positions"]
        )
        batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] > 0).astype(np.float32)
        return batch

    def _corrupt(self, tokens: np.ndarray, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return corrupt(tokens, self._data.seed, examples, self._first_sentinel)


def _segments(
    stack: str, sequences: list[np.ndarray], row_of: np.ndarray, segment: np.ndarray, length: int
) -> Batch:
    """Lays sequences side by side; those of a row are neighbours in the list."""
    lengths = np.array([len(s) for s in sequences])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first = np.searchsorted(row_of, row_of)  # of each sequence's row
    positions = np.arange(ends[-1]) - np.repeat(starts, lengths)
    columns = np.repeat(starts - starts[first], lengths) + positions
    where = (np.repeat(row_of, lengths), columns)
    batch = {}
    for name, values in (
        ("tokens", np.concatenate(sequences)),
        ("segment_ids", np.repeat(segment, lengths)),
        ("positions", positions),
    ):
        batch[f"{stack}_{name}"] = np.zeros((row_of[-1] + 1, length), np.int32)
        batch[f"{stack}_{name}"][where] = values
    return batch
