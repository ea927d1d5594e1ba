"""The seqio reader: batches of a mixture from a tf.data pipeline, tokenized while training.

Its examples have the same distribution as those of the token store. The saved position of a token
store is one number; the position of this reader is the pipeline's shuffle buffers: megabytes for
each group of processes, valid for the same number of groups only.
"""

import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from switch_jax.config import Config
from switch_jax.data.batch import ALL_ROWS, Batch, ProcessRows, add_padding_rows, shift_right
from switch_jax.data.finetuning.task_source import TaskSource, examples_to_json
from switch_jax.data.mixture import empty_split_note, find_sources, mixture_rates
from switch_jax.data.objectives import open_objective
from switch_jax.data.seqio_blocks import BLOCK_SIZE, BlockReader
from switch_jax.data.seqio_denoising import add_noise
from switch_jax.data.seqio_import import seqio, tf
from switch_jax.data.seqio_preprocessors import (
    concatenate_documents,
    exchange_padding,
    select_random_chunk,
    split_into_rows,
)
from switch_jax.data.seqio_vocabulary import seqio_vocabulary
from switch_jax.data.sources.bad_records import MISSING, BadRecords, ReportedBadRecords
from switch_jax.data.sources.source import Source, Split
from switch_jax.data.token_store.manifest import is_store
from switch_jax.data.vocabulary import Vocabulary, unknown_note
from switch_jax.data.vocabulary_builder import open_vocabulary
from switch_jax.errors import UserError

# Totals, divided among the sources of a mixture.
_BUFFERED_ROWS = 2048
_OPEN_SHARDS = 16


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> "SeqioIterator":
    """Returns an iterator over all sources, mixed at their rates; raises `UserError`."""
    sources, vocabulary = _open_sources(config)
    documents = {source.name: source.num_documents("train") for source in sources}
    specs = {source.name: source.spec for source in sources}
    rates = mixture_rates(config.data, documents, specs)
    used = [source for source in sources if source.name in rates]
    return SeqioIterator(config, split, process_rows, used, vocabulary, rates)


def open_epoch_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> dict[str, Iterator[Batch]]:
    """Returns one epoch of each source, by name; raises `UserError`.

    Every process reads all documents and keeps its rows, so that the rows do not depend on the
    number of processes.
    """
    sources, vocabulary = _open_sources(config)
    used = [source for source in sources if source.shards(split)] or sources
    epochs: dict[str, Iterator[Batch]] = {}
    for source in used:
        epoch = _epoch(config, split, process_rows, source, vocabulary)
        first = next(epoch, None)
        if first is not None:
            epochs[source.name] = itertools.chain([first], epoch)
        elif process_rows.is_first:
            print(empty_split_note(source.name, split), file=sys.stderr)
    if not epochs:
        raise UserError(
            f"No source of data.mixture={config.data.mixture} has text for {split}; name files for"
            " it with {split}."
        )
    return epochs


def _epoch(
    config: Config,
    split: Split,
    process_rows: ProcessRows,
    source: Source,
    vocabulary: Vocabulary,
) -> Iterator[Batch]:
    """Yields a process's rows of one epoch of a source; rows behind the last one are padding."""
    batch_size, rates = config.data.batch_size, {source.name: 1.0}
    indices = process_rows.indices(batch_size)
    for batch in SeqioIterator(config, split, ALL_ROWS, [source], vocabulary, rates, num_epochs=1):
        missing = batch_size - len(batch["encoder_input_tokens"])
        whole = add_padding_rows(batch, missing, config.model)
        yield {name: feature[indices] for name, feature in whole.items()}


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Returns the validation examples of the mixture's tasks, by task; raises `UserError`."""
    sources, _ = _open_sources(config)
    bad = BadRecords("skip")  # reported when the batches are read
    examples = {
        source.name: list(source.examples("validation", bad))
        for source in sources
        if isinstance(source, TaskSource)
    }
    return {
        name: list(map(json.loads, examples_to_json(of_task)))
        for name, of_task in examples.items()
        if of_task
    }


def _open_sources(config: Config) -> tuple[list[Source], Vocabulary]:
    """Returns the sources of the mixture and the vocabulary; raises `UserError`."""
    data = config.data
    if data.data_dir is not None and is_store(data.data_dir):
        raise UserError(
            f"data.data_dir={data.data_dir!r} is packed text; set data.reader=store to read it."
        )
    sources, vocabulary = find_sources(data), open_vocabulary(config)
    if not all(source.has_targets for source in sources):
        open_objective(config, vocabulary).text_length(data.inputs_length, data.targets_length)
    return sources, vocabulary


class SeqioIterator:
    """A `BatchIterator` over a seqio mixture; each group of processes reads its own documents.

    Training examples are shuffled with `data.seed`, differently in every epoch.

    Args:
      rates: of each source, its share of the rows, by name.
      num_epochs: the iterator ends behind so many epochs, with a batch of fewer rows; None: never.

    Raises `UserError` if there are more groups than documents.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        process_rows: ProcessRows,
        sources: list[Source],
        vocabulary: Vocabulary,
        rates: Mapping[str, float],
        num_epochs: int | None = None,
    ):
        data, self._ids = config.data, config.model
        self._num_epochs = num_epochs
        self._has_read_batch = False
        self._num_rows = len(process_rows.indices(data.batch_size))
        self._names = ", ".join(rates)
        self._folder = f"process_{process_rows.group}_of_{process_rows.num_groups}"
        self._saves = process_rows.first_in_group
        self._tells_unknown = split == "train" and process_rows.is_first
        self._unknown = -1 if vocabulary.unk is None else vocabulary.unk
        self._bad_records = ReportedBadRecords(data.on_bad_record)
        contents = [(source.name, source.fingerprint, rates[source.name]) for source in sources]
        shape: tuple[Any, ...] = (
            *(data.inputs_length, data.targets_length, self._num_rows, data.pack),
            # Positions from before there were other objectives hold.
            *([data.objective] if data.objective != "span_corruption" else []),
        )
        identity = repr((contents, vocabulary.fingerprint, shape, data.seed, split)).encode()
        self._identity = hashlib.blake2b(identity, digest_size=16).hexdigest()
        for source in sources:
            documents = source.num_documents(split)
            if documents is not None and documents < process_rows.num_groups:
                raise UserError(
                    f"The {split} split of {source.name} has fewer documents than there are"
                    f" processes to read them ({process_rows.num_groups}); set data.reader=store."
                )
            for path in source.missing_files(split):
                self._bad_records.add(MISSING, path)
            if split == "validation":
                for note in source.notes():
                    print(note, file=sys.stderr, flush=True)
        self._readers = [BlockReader(source, split, self._bad_records) for source in sources]
        self._iterator = iter(
            self._dataset(config, split, process_rows, vocabulary, list(rates.values()))
        )

    def _dataset(
        self,
        config: Config,
        split: Split,
        process_rows: ProcessRows,
        vocabulary: Vocabulary,
        rates: list[float],
    ) -> tf.data.Dataset:
        data = config.data
        buffered_rows = max(16, _BUFFERED_ROWS // len(rates))
        open_shards = max(1, _OPEN_SHARDS // len(rates))
        sources = [DocumentSource(reader, open_shards) for reader in self._readers]
        tasks = [
            _task(f"source_{number}", source, vocabulary, config, buffered_rows)
            for number, source in enumerate(sources)
        ]
        provider = tasks[0]
        if len(tasks) > 1:
            provider = seqio.Mixture("mixture", list(zip(tasks, rates)))
        verbosity = logging.get_verbosity()
        # seqio warns that a restart repeats data; here `save` and `restore` are exact.
        logging.set_verbosity(logging.ERROR)
        dataset = seqio.get_dataset(
            provider,
            {"inputs": data.inputs_length, "targets": data.targets_length},
            seqio.EncDecFeatureConverter(pack=data.pack),
            dataset_split=split,
            shuffle=split == "train",
            num_epochs=self._num_epochs,
            shard_info=seqio.ShardInfo(process_rows.group, process_rows.num_groups),
            seed=data.seed,
            verbose=False,
        )
        logging.set_verbosity(verbosity)
        options = tf.data.Options()
        options.autotune.enabled = False  # it halves the speed of a hundred pipelines
        batches = dataset.batch(self._num_rows, drop_remainder=self._num_epochs is None)
        return batches.prefetch(1).with_options(options)

    def __iter__(self) -> "SeqioIterator":
        return self

    def __next__(self) -> Batch:
        tensors = next(self._iterator, None)
        for reader in self._readers:
            if reader.failures:
                raise reader.failures[0]
        self._bad_records.print_once()
        if tensors is None and self._num_epochs is not None:
            raise StopIteration
        if tensors is None:
            raise UserError(
                f"A source of {self._names} has no text for {self._folder}; leave it out of"
                " data.mixture, name files for it with {split}, or set data.reader=store."
            )
        batch: Batch = {}
        for name, tensor in tensors.items():
            batch[name] = tensor.numpy().astype(np.float32 if "weights" in name else np.int32)
            if name.endswith("_tokens"):
                batch[name] = _exchange(batch[name], 0, self._ids.pad_id)
        batch["decoder_input_tokens"] = shift_right(
            batch["decoder_target_tokens"], self._ids.start_id, batch.get("decoder_positions")
        )
        if not self._has_read_batch and self._tells_unknown:
            self._print_unknown(batch)
        self._has_read_batch = True
        return batch

    def _print_unknown(self, batch: Batch) -> None:
        """Prints the share of unknown tokens in a batch on stderr, if there are any."""
        sides = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        tokens = np.concatenate(sides, axis=None)
        unknown = np.count_nonzero(tokens == self._unknown)
        if unknown:
            share = unknown / np.count_nonzero(tokens != self._ids.pad_id)
            print(unknown_note(f"First batch of {self._names}", share), file=sys.stderr)

    def save(self, directory: Path) -> None:
        """Writes the position of this group; only the group's first process does."""
        if not self._saves:
            return
        folder = directory / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        tf.train.Checkpoint(iterator=self._iterator).write(os.fspath(folder / "iterator"))
        (folder / "identity").write_text(self._identity)

    def restore(self, directory: Path) -> None:
        """Reads the position; raises `UserError` for other data or another number of groups."""
        folder = directory / self._folder
        if not (folder / "identity").is_file():
            raise UserError(
                f"{directory} holds no position of the seqio reader for {self._folder}; use the"
                " mesh and as many processes as wrote it, or train on packed text, which does not"
                " mind: `switch-jax data pack`, then data.reader=store."
            )
        if (folder / "identity").read_text() != self._identity:
            raise UserError(
                f"The position in {directory} belongs to other text, other rates, another"
                " vocabulary, or rows of another shape; set data.* to what it was made with."
            )
        checkpoint = tf.train.Checkpoint(iterator=self._iterator)
        checkpoint.read(os.fspath(folder / "iterator")).assert_consumed()


def _task(
    name: str,
    source: "DocumentSource",
    vocabulary: Vocabulary,
    config: Config,
    buffered_rows: int,
) -> seqio.Task:
    """Returns the seqio task of one source; the rows of a training split are shuffled.

    seqio takes every 0 for padding. So 0 and the id of padding are exchanged in its rows.
    """
    ids = config.model
    feature = seqio.Feature(seqio_vocabulary(vocabulary, ids.eos_id), add_eos=True)
    noise = [] if source.has_targets else _noise_preprocessors(config, vocabulary)
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            # Random choices after this point differ between epochs.
            seqio.CacheDatasetPlaceholder(),
            *noise,
            seqio.preprocessors.append_eos_after_trim,
            *([functools.partial(exchange_padding, pad_id=ids.pad_id)] if ids.pad_id else []),
        ],
        output_features={"inputs": feature, "targets": feature},
        shuffle_buffer_size=buffered_rows,
    )


def _noise_preprocessors(config: Config, vocabulary: Vocabulary) -> list[Callable[..., Any]]:
    """Returns the preprocessors from documents to inputs and targets under `data.objective`."""
    data, objective = config.data, open_objective(config, vocabulary)
    length = objective.text_length(data.inputs_length, data.targets_length)
    return [
        select_random_chunk,
        *([] if data.pack else [concatenate_documents]),
        functools.partial(split_into_rows, length=length),
        functools.partial(add_noise, objective=objective, sentinels=vocabulary.sentinels),
    ]


def _exchange(tokens: np.ndarray, a: int, b: int) -> np.ndarray:
    """Returns tokens with the ids `a` and `b` exchanged."""
    return tokens if a == b else np.where(tokens == a, b, np.where(tokens == b, a, tokens))


class DocumentSource(seqio.DataSource):
    """The documents of a split: features `targets`, or `inputs` and `targets` for pairs.

    In training, the order of shards depends on `seed` and the epoch, and `open_shards` shards are
    interleaved; in validation, shards are read one after the other.
    """

    def __init__(self, reader: BlockReader, open_shards: int):
        super().__init__(splits=[reader.split])
        self.has_targets = reader.has_targets
        self._reader = reader
        self._open_shards = open_shards

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: Split) -> list[str]:
        return [str(number) for number in range(self._reader.num_shards)]

    def get_dataset(
        self,
        split: Split = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns one group's share of the documents: whole shards if there are enough of them."""
        info = shard_info or seqio.ShardInfo(0, 1)
        numbers = range(self._reader.num_shards)
        by_shard = len(numbers) >= info.num_shards
        if by_shard:
            numbers = numbers[info.index :: info.num_shards]
        shards = tf.data.Dataset.from_tensor_slices(np.array(numbers, np.int64))
        if shuffle:
            shards = shards.shuffle(len(numbers), seed=seed)
        open_shards = self._open_shards if shuffle else 1
        texts = shards.interleave(self._shard, cycle_length=open_shards, block_length=BLOCK_SIZE)
        if self.has_targets:  # a block contains whole pairs, since its size is even
            texts = texts.batch(2, drop_remainder=True)
        if not by_shard:
            texts = texts.shard(info.num_shards, info.index)
        if self.has_targets:
            return texts.map(lambda pair: {"inputs": pair[0], "targets": pair[1]})
        return texts.map(lambda text: {"targets": text})

    def _shard(self, shard: tf.Tensor) -> tf.data.Dataset:
        """Returns the texts of a shard, read block by block."""

        def read_block(shard: np.int64, number: np.int64) -> np.ndarray:
            block = self._reader.block(int(shard), int(number))
            return np.array(block, object) if block else np.empty(0, "S1")

        def block_tensor(number: tf.Tensor) -> tf.Tensor:
            texts = tf.numpy_function(read_block, [shard, number], tf.string, stateful=False)
            return tf.ensure_shape(texts, [None])

        blocks = tf.data.Dataset.range(np.iinfo(np.int64).max).map(block_tensor)
        return blocks.take_while(lambda texts: tf.size(texts) > 0).unbatch()
