"""Rows of a token store: each training row is a function of its number.

    row number → source (by the mixture's rates) → row of the source → epoch and position in it
               → pieces of documents → the objective's noise → [B, S] and [B, T] arrays

Each step is arithmetic on the number. So a batch depends only on `data.seed` and the step: any
process can make any rows of it, and a run resumes without replaying earlier batches.
"""

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from switch_jax.config import Config, ModelConfig
from switch_jax.data.batch import (
    ALL_ROWS,
    Batch,
    ProcessRows,
    RowIterator,
    padded_batch,
    padding_value,
    shift_right,
)
from switch_jax.data.counter_rng import derived_seed, permute
from switch_jax.data.finetuning.tasks import get_task
from switch_jax.data.mixture import empty_split_note, mixture_rates, select_sources
from switch_jax.data.objectives import Objective, open_objective
from switch_jax.data.sources.source import Split
from switch_jax.data.token_store.open_store import open_store
from switch_jax.data.token_store.sequence_packing import cached_row_plan, plan_pairs, plan_rows
from switch_jax.data.token_store.store import TokenStore
from switch_jax.data.vocabulary import Vocabulary, unknown_note
from switch_jax.data.vocabulary_builder import open_vocabulary
from switch_jax.errors import UserError

_ROUND = 2**20  # rows, of which every source has exactly its share


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> "StoreIterator":
    """Returns an iterator over all sources, mixed at their rates; raises `UserError`."""
    store, vocabulary = _open_checked(config)
    rates = mixture_rates(config.data, store.num_documents(), store.specs())
    documents = store.num_documents(split)
    if any(documents[name] for name in rates):
        rates = {name: rate for name, rate in rates.items() if documents[name]}
    if split == "train" and process_rows.is_first:
        for name in rates:
            if share := store.unknown_share(name):
                print(unknown_note(name, share), file=sys.stderr)
    return StoreIterator(config, split, process_rows, store, vocabulary, rates)


def open_epoch_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> dict[str, Iterator[Batch]]:
    """Returns one epoch of each source, by name; raises `UserError`."""
    store, vocabulary = _open_checked(config)
    documents = store.num_documents(split)
    names = [
        name for _, names in select_sources(config.data, documents, store.specs()) for name in names
    ]
    used = [name for name in names if documents[name]] or names
    for name in names if process_rows.is_first else ():
        has_split = not store.has_targets(name) or split in get_task(name).splits
        if name not in used and has_split:
            print(empty_split_note(name, split), file=sys.stderr)
    return {
        name: StoreIterator(
            config, split, process_rows, store, vocabulary, {name: 1.0}
        ).first_epoch()
        for name in used
    }


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Returns the validation examples of the mixture's tasks, by task; raises `UserError`."""
    store, _ = _open_checked(config)
    documents = store.num_documents("validation")
    selected = select_sources(config.data, documents, store.specs())
    pairs = [name for _, names in selected for name in names if store.has_targets(name)]
    return {name: examples for name in pairs if (examples := store.examples(name))}


def _open_checked(config: Config) -> tuple[TokenStore, Vocabulary]:
    """Returns the store and the vocabulary; raises `UserError` if a row has no place for text."""
    vocabulary, data = open_vocabulary(config), config.data
    store = open_store(data, vocabulary)
    if not all(map(store.has_targets, store.num_documents())):
        open_objective(config, vocabulary).text_length(data.inputs_length, data.targets_length)
    return store, vocabulary


class StoreIterator(RowIterator):
    """Rows of a store under `data.objective`; in every epoch each row once, reshuffled.

    Without packing, documents are concatenated and cut into pieces that fill a row each, as in T5;
    the last, incomplete piece is left out. With packing, each document is cut if it is too long for
    a row, each piece takes noise separately, and pieces share rows as segments. Pairs of inputs
    and targets become rows or segments without noise.

    With packing, the numbers of noise tokens of a piece are the same in every epoch, so that rows
    can be planned. Their places differ, except those behind a prefix.

    Args:
      rates: of each source, its share of the rows, by name.

    Raises `UserError` if the lengths do not fit each other, or a source has no text.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        process_rows: ProcessRows,
        store: TokenStore,
        vocabulary: Vocabulary,
        rates: Mapping[str, float],
    ):
        data = config.data
        contents = [(name, rate, store.fingerprint(name, split)) for name, rate in rates.items()]
        shape: tuple[Any, ...] = (data.inputs_length, data.targets_length, data.pack, data.seed)
        self._objective = open_objective(config, vocabulary)
        if self._objective.has_random_sizes:  # positions from before there were others hold
            shape += (data.objective,)
        digest = hashlib.blake2b(repr((contents, shape)).encode(), digest_size=16)
        super().__init__(data.batch_size, process_rows, digest.hexdigest())
        self._config, self._data = config, data
        self._sources = [_SourceRows(config, store, name, split, self._objective) for name in rates]
        self._quotas = _quotas(np.array(list(rates.values())))

    def first_epoch(self) -> Iterator[Batch]:
        """Yields the batches of the first epoch of one source; rows behind it are padding."""
        [source] = self._sources
        for first_row in range(0, source.rows_per_epoch, self._batch_size):
            numbers = first_row + self._indices
            is_past_end_B = numbers >= source.rows_per_epoch
            yield {
                name: np.where(
                    is_past_end_B[:, None], padding_value(name, self._config.model), feature
                )
                for name, feature in self.make_rows(numbers).items()
            }

    def make_rows(self, numbers: np.ndarray) -> Batch:
        sources, source_rows = self._choose_sources(numbers)
        parts = []
        for i in np.unique(sources):
            rows = np.flatnonzero(sources == i)
            pieces = self._sources[i].pieces(source_rows[rows])
            source = np.full(len(pieces.row), i)
            parts.append(pieces._replace(row=rows[pieces.row], source=source))
        pieces = parts[0]
        if len(parts) > 1:
            pieces = _Pieces(*map(np.concatenate, zip(*parts)))
        return self._packed_batch(pieces) if self._data.pack else self._unpacked_batch(pieces)

    def _choose_sources(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each row's source, and its row number within the source; both [B].

        Rows come in rounds of `_ROUND`. A random permutation of range(_ROUND) gives each row of a
        round a place, and source i owns the next quotas[i] places after those of source i - 1. So
        the order of sources is random, a round has exactly quotas[i] rows of source i, and the
        place determines the row number within the source.
        """
        if len(self._sources) == 1:
            return np.zeros_like(numbers), numbers
        rounds, positions = np.divmod(numbers, _ROUND)
        places = np.empty_like(numbers)
        for number in np.unique(rounds):
            in_round = rounds == number
            seed = derived_seed(self._data.seed, "mixture")
            places[in_round] = permute(positions[in_round], _ROUND, seed, int(number))
        ends = np.cumsum(self._quotas)
        sources = np.searchsorted(ends, places, side="right")
        first_places = ends - self._quotas
        return sources, rounds * self._quotas[sources] + places - first_places[sources]

    def _unpacked_batch(self, pieces: "_Pieces") -> Batch:
        batch: Batch = {}
        for indices, inputs, targets in self._inputs_and_targets(pieces):
            for name, values in padded_batch(inputs, targets, self._config).items():
                if name not in batch:
                    batch[name] = np.empty((len(pieces.row), values.shape[1]), values.dtype)
                batch[name][pieces.row[indices]] = values
        return batch

    def _packed_batch(self, pieces: "_Pieces") -> Batch:
        inputs: list[np.ndarray] = [np.zeros(0)] * len(pieces.row)
        targets = inputs.copy()
        for group in self._inputs_and_targets(pieces):
            for i, piece_inputs, piece_targets in zip(*group):
                inputs[i], targets[i] = piece_inputs, piece_targets
        order = np.lexsort((pieces.segment, pieces.row))
        row, segment = pieces.row[order], pieces.segment[order]
        batch: Batch = {}
        for stack, sequences, length in (
            ("encoder", inputs, self._data.inputs_length),
            ("decoder", targets, self._data.targets_length),
        ):
            ordered = [sequences[i] for i in order]
            batch |= _place_segments(stack, ordered, row, segment, length, self._config.model)
        batch["encoder_input_tokens"] = batch.pop("encoder_tokens")
        batch["decoder_target_tokens"] = batch.pop("decoder_tokens")
        batch["decoder_input_tokens"] = shift_right(
            batch["decoder_target_tokens"],
            self._config.model.start_id,
            batch["decoder_positions"],
        )
        batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] > 0).astype(np.float32)
        return batch

    def _inputs_and_targets(
        self, pieces: "_Pieces"
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields pieces in groups of equal length: indices [P], inputs [P, I], targets [P, J]."""
        is_pair = np.array([source.has_targets for source in self._sources])[pieces.source]
        for i in np.flatnonzero(is_pair):
            inputs, targets = self._sources[pieces.source[i]].pair(int(pieces.start[i]))
            yield np.array([i]), inputs[None], targets[None]
        for length in np.unique(pieces.length[~is_pair]):
            indices = np.flatnonzero((pieces.length == length) & ~is_pair)
            starts, sources = pieces.start[indices], pieces.source[indices]
            tokens = np.empty((len(indices), length), np.int32)
            for i in np.unique(sources):
                mask = sources == i
                tokens[mask] = self._sources[i].tokens.take(starts[mask], int(length))
            numbers, examples = pieces.number[indices], pieces.example[indices]
            for group, inputs, targets in self._objective.apply(tokens, numbers, examples):
                yield indices[group], inputs, targets


def _quotas(rates: np.ndarray) -> np.ndarray:
    """[sources] int64 numbers of rows in a round, at least one each; they sum to `_ROUND`."""
    ends = np.round(np.cumsum(rates) / rates.sum() * _ROUND).astype(np.int64)
    quotas = np.maximum(1, np.diff(ends, prepend=0))
    quotas[np.argmax(quotas)] -= quotas.sum() - _ROUND
    return quotas


class _Pieces(NamedTuple):
    """Pieces of documents, or pairs, that make up the rows of a batch; all arrays are [P]."""

    row: np.ndarray  # index of the row in the batch
    segment: np.ndarray  # 1, 2, … within the row
    source: np.ndarray  # index of the source
    start: np.ndarray  # first token, within the source's tokens; of a pair, its number
    length: np.ndarray  # tokens
    number: np.ndarray  # uint64 number for the numbers of noise tokens
    example: np.ndarray  # uint64 number for the places of the noise; differs between epochs


class _SourceRows:
    """The numbered rows of one source, epoch after epoch.

    Attributes:
      tokens: the tokens of the split.
      has_targets: whether documents are inputs and targets in turn.
      rows_per_epoch: number of rows after which the source repeats.
    """

    def __init__(
        self, config: Config, store: TokenStore, name: str, split: Split, objective: Objective
    ):
        data = config.data
        self._eos_id = config.model.eos_id
        self._seed = derived_seed(data.seed, name)
        self.tokens = store.tokens(name, split)
        self.has_targets = store.has_targets(name)
        self._lengths = (data.inputs_length, data.targets_length)
        if not len(self.tokens):
            if self.has_targets:
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
            plan = plan_pairs
            if not self.has_targets:
                plan = functools.partial(plan_rows, objective=objective, first_number=self._seed)
                if objective.has_random_sizes:
                    key += f"-{data.objective}-{self._seed:x}"
            self._plan = cached_row_plan(key, plan, self.tokens.offsets, *self._lengths)
            self.rows_per_epoch = len(self._plan.row_offsets) - 1
        elif self.has_targets:
            self._piece_length, self.rows_per_epoch = 1, len(self.tokens.offsets) // 2
        else:
            # A split shorter than a row is one short row.
            self._piece_length = min(objective.text_length(*self._lengths), len(self.tokens))
            self.rows_per_epoch = len(self.tokens) // self._piece_length

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs [I] and targets [J], int32, each truncated to its length, with an EOS."""
        sides = []
        for length, document in zip(self._lengths, (2 * number, 2 * number + 1)):
            begin, end = self.tokens.offsets[document : document + 2]
            tokens = self.tokens.take(np.array([begin]), int(min(end - begin, length - 1)))[0]
            sides.append(np.append(tokens.astype(np.int32), self._eos_id))
        return sides[0], sides[1]

    def pieces(self, numbers: np.ndarray) -> _Pieces:
        """Returns the pieces of the rows with the given numbers, [R] int64; `source` is not set."""
        epochs, positions = np.divmod(numbers, self.rows_per_epoch)
        rows = np.empty_like(numbers)  # after shuffling
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            rows[in_epoch] = permute(
                positions[in_epoch], self.rows_per_epoch, self._seed, int(epoch)
            )
        plan = self._plan
        if plan is None:
            row, segment = np.arange(len(rows)), np.ones(len(rows), np.int64)
            start, length = rows * self._piece_length, np.full(len(rows), self._piece_length)
            example = number = self._numbered(epochs * self.rows_per_epoch + rows)
        else:
            counts = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
            row = np.repeat(np.arange(len(rows)), counts)
            segment = np.concatenate([np.arange(1, n + 1) for n in counts])
            members = plan.members[plan.row_offsets[rows][row] + segment - 1]
            start, length = plan.starts[members], plan.lengths[members]
            number = self._numbered(members)
            example = self._numbered(epochs[row] * len(plan.starts) + members)
        return _Pieces(row, segment, np.empty(0), start, length, number, example)

    def _numbered(self, index: np.ndarray) -> np.ndarray:
        """Returns uint64 numbers that differ between sources."""
        return index.astype(np.uint64) + np.uint64(self._seed)  # may wrap around


def _place_segments(
    stack: str,
    sequences: list[np.ndarray],
    row_of: np.ndarray,
    segment: np.ndarray,
    length: int,
    model: ModelConfig,
) -> Batch:
    """Places sequences side by side in their rows.

    Args:
      stack: encoder or decoder.
      sequences: tokens of P sequences, ordered by row.
      row_of: [P] row of each sequence, ascending from 0.
      segment: [P] segment id of each sequence.
      length: tokens of a row.

    Returns `STACK_tokens`, `STACK_segment_ids` and `STACK_positions`, [rows, length] int32.
    """
    lengths = np.array([len(s) for s in sequences])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first = np.searchsorted(row_of, row_of)  # the first sequence of each sequence's row
    positions = np.arange(ends[-1]) - np.repeat(starts, lengths)
    columns = np.repeat(starts - starts[first], lengths) + positions
    rows = np.repeat(row_of, lengths)
    batch = {}
    for name, values in (
        ("tokens", np.concatenate(sequences)),
        ("segment_ids", np.repeat(segment, lengths)),
        ("positions", positions),
    ):
        shape = row_of[-1] + 1, length
        feature = np.full(shape, padding_value(f"{stack}_{name}", model), np.int32)
        feature[rows, columns] = values
        batch[f"{stack}_{name}"] = feature
    return batch
