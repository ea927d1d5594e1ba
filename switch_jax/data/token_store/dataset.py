"""Training rows from packed records: pure functions of their numbers.

    row of the run → source, by the mixture's rates → row of the source → epoch and place in it
                   → pieces of documents → corrupted, side by side

Every step is arithmetic on the number, so a batch depends on (`data.seed`, step) and on nothing
that came before: any process can make any part of it, and resuming is free.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from switch_jax.config import Config, DataConfig
from switch_jax.data.batch import (
    ALL_ROWS,
    Batch,
    ProcessRows,
    RowIterator,
    padded_batch,
    shift_right,
)
from switch_jax.data.counter_rng import derived_seed, permute
from switch_jax.data.mixture import mixture_rates, select_sources
from switch_jax.data.sources.source import Split
from switch_jax.data.span_corruption import corrupt_spans, span_lengths
from switch_jax.data.token_store.open import open_store
from switch_jax.data.token_store.sequence_packing import plan_pairs, plan_rows, planned
from switch_jax.data.token_store.store import TokenStore
from switch_jax.data.vocabulary import EOS, Vocabulary
from switch_jax.data.vocabulary_builder import check_sentinels, open_vocabulary
from switch_jax.errors import UserError

_ROUND = 2**20  # rows in which every source comes as often as its share says


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> "StoreIterator":
    """Rows of all sources, in their shares; raises `UserError`."""
    store, vocabulary = _opened(config)
    shares = mixture_rates(config.data, store.documents(), store.specs())
    return StoreIterator(config.data, split, process_rows, store, vocabulary, shares)


def open_batches_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> dict[str, "StoreIterator"]:
    """Rows of each source on its own; raises `UserError`."""
    store, vocabulary = _opened(config)
    documents = store.documents(split)
    names = [
        name for _, names in select_sources(config.data, documents, store.specs()) for name in names
    ]
    some = [name for name in names if documents[name]] or names
    return {
        name: StoreIterator(config.data, split, process_rows, store, vocabulary, {name: 1.0})
        for name in some
    }


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Validation examples of the mixture's pairs, by source; raises `UserError`."""
    store, _ = _opened(config)
    documents = store.documents("validation")
    selected = select_sources(config.data, documents, store.specs())
    pairs = [name for _, names in selected for name in names if store.pairs(name)]
    return {name: examples for name in pairs if (examples := store.examples(name))}


def _opened(config: Config) -> tuple[TokenStore, Vocabulary]:
    vocabulary = open_vocabulary(config)
    store = open_store(config.data, vocabulary)
    if not all(map(store.pairs, store.documents())):
        check_sentinels(config.data, vocabulary)
    return store, vocabulary


class StoreIterator(RowIterator):
    """Span-corrupted rows of a store, those of a source shuffled globally, each once per epoch.

    Without packing, documents are joined and cut to the length that fills a row, as T5
    does; the last, incomplete cut is left out. With packing, documents are kept apart: each
    is cut where it is too long, each piece is corrupted on its own, and pieces share rows
    as segments. Pairs of inputs and targets are rows, or segments, as they are.

    Args:
      shares: of the sources among the rows.

    Raises `UserError` where the lengths do not fit each other, or a source has no text.
    """

    def __init__(
        self,
        data: DataConfig,
        split: Split,
        process_rows: ProcessRows,
        store: TokenStore,
        vocabulary: Vocabulary,
        shares: Mapping[str, float],
    ):
        made_of = [(name, share, store.fingerprint(name, split)) for name, share in shares.items()]
        shape = (data.inputs_length, data.targets_length, data.pack, data.seed)
        digest = hashlib.blake2b(repr((made_of, shape)).encode(), digest_size=16)
        super().__init__(data.batch_size, process_rows, digest.hexdigest())
        self._data = data
        self._first_sentinel = vocabulary.sentinel(0)
        self._sources = [_Source(data, store, name, split) for name in shares]
        self._quotas = _quotas(np.array(list(shares.values())))
        if len(self._sources) == 1:
            self.rows_per_epoch = self._sources[0].size

    def make_rows(self, numbers: np.ndarray) -> Batch:
        source, within = self._drawn(numbers)
        parts = []
        for i in np.unique(source):
            rows = np.flatnonzero(source == i)
            pieces = self._sources[i].pieces(within[rows])
            parts.append(pieces._replace(row=rows[pieces.row], source=np.full(len(pieces.row), i)))
        pieces = parts[0]
        if len(parts) > 1:
            pieces = _Pieces(*map(np.concatenate, zip(*parts)))
        return self._packed(pieces) if self._data.pack else self._joined(pieces)

    def _drawn(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each row is of, and which of that source's rows it is.

        A round is an urn with as many lots of a source as its quota, drawn without putting back:
        the order is random, and the lot itself says how many of its source came before.
        """
        if len(self._sources) == 1:
            return np.zeros_like(numbers), numbers
        rounds, draws = np.divmod(numbers, _ROUND)
        lots = np.empty_like(numbers)
        for number in np.unique(rounds):
            now = rounds == number
            seed = derived_seed(self._data.seed, "mixture")
            lots[now] = permute(draws[now], _ROUND, seed, int(number))
        ends = np.cumsum(self._quotas)
        source = np.searchsorted(ends, lots, side="right")
        first = ends - self._quotas
        return source, rounds * self._quotas[source] + lots - first[source]

    def _joined(self, pieces: "_Pieces") -> Batch:
        batch: Batch = {}
        for same, inputs, targets in self._sequences(pieces):
            for name, values in padded_batch(inputs, targets, self._data).items():
                if name not in batch:
                    batch[name] = np.empty((len(pieces.row), values.shape[1]), values.dtype)
                batch[name][pieces.row[same]] = values
        return batch

    def _packed(self, pieces: "_Pieces") -> Batch:
        inputs: list[np.ndarray] = [np.zeros(0)] * len(pieces.row)
        targets = inputs.copy()
        for same, of_inputs, of_targets in self._sequences(pieces):
            for i, x, y in zip(same, of_inputs, of_targets):
                inputs[i], targets[i] = x, y
        order = np.lexsort((pieces.segment, pieces.row))
        row, segment = pieces.row[order], pieces.segment[order]
        batch: Batch = {}
        for stack, texts, length in (
            ("encoder", inputs, self._data.inputs_length),
            ("decoder", targets, self._data.targets_length),
        ):
            batch |= _segments(stack, [texts[i] for i in order], row, segment, length)
        batch["encoder_input_tokens"] = batch.pop("encoder_tokens")
        batch["decoder_target_tokens"] = batch.pop("decoder_tokens")
        batch["decoder_input_tokens"] = shift_right(
            batch["decoder_target_tokens"], batch["decoder_positions"]
        )
        batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] > 0).astype(np.float32)
        return batch

    def _sequences(self, pieces: "_Pieces") -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Pieces of one length at a time: which they are, [P]; inputs [P, I]; targets [P, T]."""
        paired = np.array([source.paired for source in self._sources])[pieces.source]
        for i in np.flatnonzero(paired):
            inputs, targets = self._sources[pieces.source[i]].pair(int(pieces.start[i]))
            yield np.array([i]), inputs[None], targets[None]
        for length in np.unique(pieces.length[~paired]):
            same = np.flatnonzero((pieces.length == length) & ~paired)
            tokens = np.empty((len(same), length), np.int32)
            for i in np.unique(pieces.source[same]):
                here = pieces.source[same] == i
                tokens[here] = self._sources[i].tokens.take(pieces.start[same][here], int(length))
            examples = pieces.example[same]
            yield same, *corrupt_spans(tokens, self._data.seed, examples, self._first_sentinel)


def _quotas(shares: np.ndarray) -> np.ndarray:
    """[sources] int64 rows of a round, at least one each, that sum to `_ROUND`."""
    ends = np.round(np.cumsum(shares) / shares.sum() * _ROUND).astype(np.int64)
    quotas = np.maximum(1, np.diff(ends, prepend=0))
    quotas[np.argmax(quotas)] -= quotas.sum() - _ROUND
    return quotas


class _Pieces(NamedTuple):
    """Stretches of documents that make up rows, [P] each."""

    row: np.ndarray  # its place among the rows asked for
    segment: np.ndarray  # 1, 2, … within the row
    source: np.ndarray
    start: np.ndarray  # within the source's tokens; of pairs, which one
    length: np.ndarray
    example: np.ndarray  # uint64; what random numbers depend on: another in every epoch


class _Source:
    """The rows of one source, numbered for ever: all of an epoch, then all of the next."""

    def __init__(self, data: DataConfig, store: TokenStore, name: str, split: Split):
        self._seed = derived_seed(data.seed, name)
        self.tokens = store.tokens(name, split)
        self.paired = store.pairs(name)
        self._lengths = (data.inputs_length, data.targets_length)
        if not len(self.tokens):
            if self.paired:
                raise UserError(
                    f"The {split} split of {name} has no example with an answer; name another task"
                    " or mixture in data.mixture."
                )
            raise UserError(
                f"The {split} split of {name} has no text; name files for it with {{split}} in"
                f" data.mixture, or leave {name} out."
            )
        self._plan = None
        if data.pack:
            key = f"{store.fingerprint(name, split)}-{data.inputs_length}-{data.targets_length}"
            make = plan_pairs if self.paired else plan_rows
            self._plan = planned(key, make, self.tokens.offsets, *self._lengths)
            self.size = len(self._plan.row_offsets) - 1
        elif self.paired:
            self._length, self.size = 1, len(self.tokens.offsets) // 2
        else:
            # A split shorter than a row is one short row.
            self._length = min(span_lengths(*self._lengths).tokens, len(self.tokens))
            self.size = len(self.tokens) // self._length

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32, each cut where it is too long and with an EOS."""
        sides = []
        for length, document in zip(self._lengths, (2 * number, 2 * number + 1)):
            begin, end = self.tokens.offsets[document : document + 2]
            tokens = self.tokens.take(np.array([begin]), int(min(end - begin, length - 1)))[0]
            sides.append(np.append(tokens.astype(np.int32), EOS))
        return sides[0], sides[1]

    def pieces(self, numbers: np.ndarray) -> _Pieces:
        """What the rows with the given numbers, [R] int64, are made of; `source` is not set."""
        epochs, within = np.divmod(numbers, self.size)
        rows = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = permute(within[now], self.size, self._seed, int(epoch))
        plan = self._plan
        if plan is None:
            row, segment = np.arange(len(rows)), np.ones(len(rows), np.int64)
            start, length = rows * self._length, np.full(len(rows), self._length)
            number = epochs * self.size + rows
        else:
            counts = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
            row = np.repeat(np.arange(len(rows)), counts)
            segment = np.concatenate([np.arange(1, n + 1) for n in counts])
            members = plan.members[plan.row_offsets[rows][row] + segment - 1]
            start, length = plan.starts[members], plan.lengths[members]
            number = epochs[row] * len(plan.starts) + members
        example = number.astype(np.uint64) + np.uint64(self._seed)  # may wrap around
        return _Pieces(row, segment, np.empty(0), start, length, example)


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
