"""The streaming reader: a mixture's sources as seqio tasks.

It makes the same examples as packed records, equal in distribution, but draws them from a
tf.data pipeline that tokenises as it goes. Where the position in packed records is a number,
this one's is shuffle buffers: megabytes for each feed, tied to the number of feeds.

The preprocessors are T5's own, seed for seed; between them, `targets` hold the tokens of a
document or of a row, without an EOS. No other module uses TensorFlow.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from switch_jax.config import Config, DataConfig
from switch_jax.data.batch import ALL_ROWS, Batch, ProcessRows
from switch_jax.data.finetuning.task_source import TaskSource, examples_to_json
from switch_jax.data.mixture import find_sources, mixture_rates
from switch_jax.data.seqio_blocks import BLOCK, BlockReader
from switch_jax.data.sources.bad_records import MISSING, BadRecords, ReportedBadRecords
from switch_jax.data.sources.source import Source, Split
from switch_jax.data.span_corruption import MEAN_SPAN, NOISE_DENSITY, span_lengths
from switch_jax.data.token_store.store import is_store
from switch_jax.data.vocabulary import NUM_SENTINELS, ByteVocabulary, Vocabulary
from switch_jax.data.vocabulary_builder import check_sentinels, open_vocabulary
from switch_jax.errors import UserError


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """TensorFlow's libraries write to stderr before anybody can set their level of logging."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


try:
    with _silence():
        import seqio
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory that JAX needs
except ImportError as error:
    raise UserError(
        'data.reader=seqio needs TensorFlow and seqio: pip install "switch_jax[data]", or set'
        " data.reader=store."
    ) from error


# Over all sources of a mixture, as far as it goes round.
_BUFFERED_ROWS = 2048
_OPEN_SHARDS = 16

# As in T5.
_CHUNK = 65_536  # tokens of a document that are used at once
_JOINED_DOCUMENTS = 128
Example = dict[str, tf.Tensor]


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> "SeqioIterator":
    """Rows of all sources, in their shares; raises `UserError`."""
    sources, words = _opened(config)
    documents = {source.name: source.num_documents("train") for source in sources}
    specs = {source.name: source.spec for source in sources}
    shares = mixture_rates(config.data, documents, specs)
    drawn = [source for source in sources if source.name in shares]
    return SeqioIterator(config.data, split, process_rows, drawn, words, shares)


def open_batches_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> dict[str, "SeqioIterator"]:
    """Rows of each source on its own; raises `UserError`."""
    sources, words = _opened(config)
    some = [source for source in sources if source.shards(split)] or sources
    return {
        source.name: SeqioIterator(
            config.data, split, process_rows, [source], words, {source.name: 1.0}
        )
        for source in some
    }


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Validation examples of the mixture's pairs, by source; raises `UserError`."""
    sources, _ = _opened(config)
    bad = BadRecords("skip")  # whoever reads the batches is told
    found = {
        s.name: list(s.examples("validation", bad)) for s in sources if isinstance(s, TaskSource)
    }
    return {name: list(map(json.loads, examples_to_json(of))) for name, of in found.items() if of}


def _opened(config: Config) -> tuple[list[Source], Vocabulary]:
    data = config.data
    if data.data_dir is not None and is_store(data.data_dir):
        raise UserError(
            f"data.data_dir={data.data_dir!r} is packed text; set data.reader=store to read it."
        )
    sources, words = find_sources(data), open_vocabulary(config)
    if not all(source.has_targets for source in sources):
        span_lengths(data.inputs_length, data.targets_length)
        check_sentinels(data, words)
    return sources, words


class SeqioIterator:
    """A `BatchIterator` over a seqio mixture; each feed reads its own share of the documents.

    Training examples are shuffled with `data.seed`, in every epoch differently.

    Raises `UserError` where feeds outnumber documents.
    """

    def __init__(
        self,
        data: DataConfig,
        split: Split,
        process_rows: ProcessRows,
        sources: list[Source],
        words: Vocabulary,
        shares: Mapping[str, float],
    ):
        self.rows_per_epoch: int | None = None
        self._rows = len(process_rows.indices(data.batch_size))
        self._names = ", ".join(shares)
        self._folder = f"process_{process_rows.group}_of_{process_rows.num_groups}"
        self._saves = process_rows.first_in_group
        self._bad = ReportedBadRecords(data.on_bad_record)
        made_of = [(source.name, source.fingerprint, shares[source.name]) for source in sources]
        shape = (data.inputs_length, data.targets_length, self._rows, data.pack)
        identity = repr((made_of, words.fingerprint, shape, data.seed, split)).encode()
        self._identity = hashlib.blake2b(identity, digest_size=16).hexdigest()
        for source in sources:
            documents = source.num_documents(split)
            if documents is not None and documents < process_rows.num_groups:
                raise UserError(
                    f"The {split} split of {source.name} has fewer documents than there are"
                    f" processes to feed ({process_rows.num_groups}); set data.reader=store."
                )
            for path in source.missing_files(split):
                self._bad.add(MISSING, path)
        self._readers = [BlockReader(source, split, self._bad) for source in sources]
        self._iterator = iter(
            self._dataset(data, split, process_rows, words, list(shares.values()))
        )

    def _dataset(
        self,
        data: DataConfig,
        split: Split,
        process_rows: ProcessRows,
        words: Vocabulary,
        rates: list[float],
    ) -> tf.data.Dataset:
        buffered = max(16, _BUFFERED_ROWS // len(rates))
        open_shards = max(1, _OPEN_SHARDS // len(rates))
        tasks = [
            _task(f"source_{number}", Documents(reader, open_shards), words, data, buffered)
            for number, reader in enumerate(self._readers)
        ]
        provider = tasks[0]
        if len(tasks) > 1:
            provider = seqio.Mixture("mixture", list(zip(tasks, rates)))
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # seqio warns of restarts, but `save` is exact
        dataset = seqio.get_dataset(
            provider,
            {"inputs": data.inputs_length, "targets": data.targets_length},
            seqio.EncDecFeatureConverter(pack=data.pack),
            dataset_split=split,
            shuffle=split == "train",
            num_epochs=None,
            shard_info=seqio.ShardInfo(process_rows.group, process_rows.num_groups),
            seed=data.seed,
            verbose=False,
        )
        logging.set_verbosity(verbosity)
        options = tf.data.Options()
        options.autotune.enabled = False  # of a hundred pipelines it halves the speed
        batches = dataset.batch(self._rows, drop_remainder=True)
        return batches.prefetch(1).with_options(options)

    def __iter__(self) -> "SeqioIterator":
        return self

    def __next__(self) -> Batch:
        tensors = next(self._iterator, None)
        for reader in self._readers:
            if reader.failures:
                raise reader.failures[0]
        self._bad.print_once()
        if tensors is None:
            raise UserError(
                f"A source of {self._names} has no text for {self._folder}; leave it out of"
                " data.mixture, name files for it with {split}, or set data.reader=store."
            )
        return {
            name: tensor.numpy().astype(np.float32 if name.endswith("weights") else np.int32)
            for name, tensor in tensors.items()
        }

    def save(self, directory: Path) -> None:
        if not self._saves:
            return
        folder = directory / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        tf.train.Checkpoint(iterator=self._iterator).write(os.fspath(folder / "iterator"))
        (folder / "identity").write_text(self._identity)

    def restore(self, directory: Path) -> None:
        """Raises `UserError` for a position of other data or another number of feeds."""
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
    name: str, source: "Documents", words: Vocabulary, data: DataConfig, buffered: int
) -> seqio.Task:
    feature = seqio.Feature(_seqio_vocabulary(words), add_eos=True)
    corrupted = [select_random_chunk, *([] if data.pack else [join]), cut, corrupt]
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            # What follows is drawn anew in every epoch.
            seqio.CacheDatasetPlaceholder(),
            *([] if source.pairs else corrupted),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
        shuffle_buffer_size=buffered,
    )


def _seqio_vocabulary(words: Vocabulary) -> seqio.Vocabulary:
    if isinstance(words, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=NUM_SENTINELS)
    return seqio.SentencePieceVocabulary(words.name, extra_ids=NUM_SENTINELS)


class Documents(seqio.DataSource):
    """The texts of a split, as `targets`, or as `inputs` and `targets` where they are pairs.

    In training, shards come in an order that `seed` and the epoch decide, and `open_shards` of
    them are read in turns; in validation they come one after the other.
    """

    def __init__(self, reader: BlockReader, open_shards: int):
        super().__init__(splits=[reader.split])
        self.pairs = reader.pairs
        self._reader = reader
        self._open_shards = open_shards

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: Split) -> list[str]:
        return [str(number) for number in range(self._reader.shards)]

    def get_dataset(
        self,
        split: Split = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Whole shards for each of several feeds where there are enough, else documents."""
        count = self._reader.shards
        info = shard_info or seqio.ShardInfo(0, 1)
        whole = count >= info.num_shards
        mine = range(count)[info.index :: info.num_shards] if whole else range(count)
        shards = tf.data.Dataset.from_tensor_slices(np.array(mine, np.int64))
        if shuffle:
            shards = shards.shuffle(len(mine), seed=seed)
        open_shards = self._open_shards if shuffle else 1
        texts = shards.interleave(self._shard, cycle_length=open_shards, block_length=BLOCK)
        if self.pairs:  # a block has no half of one
            texts = texts.batch(2, drop_remainder=True)
        if not whole:
            texts = texts.shard(info.num_shards, info.index)
        if self.pairs:
            return texts.map(lambda pair: {"inputs": pair[0], "targets": pair[1]})
        return texts.map(lambda text: {"targets": text})

    def _shard(self, shard: tf.Tensor) -> tf.data.Dataset:
        def read(shard: np.int64, number: np.int64) -> np.ndarray:
            block = self._reader.block(int(shard), int(number))
            return np.array(block, object) if block else np.empty(0, "S1")

        def block(number: tf.Tensor) -> tf.Tensor:
            texts = tf.numpy_function(read, [shard, number], tf.string, stateful=False)
            return tf.ensure_shape(texts, [None])

        blocks = tf.data.Dataset.range(np.iinfo(np.int64).max).map(block)
        return blocks.take_while(lambda texts: tf.size(texts) > 0).unbatch()


def select_random_chunk(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Of a document of more than 65,536 tokens one part of as many, in every epoch another.

    Documents without tokens are left out.
    """
    return _chunk(dataset.filter(lambda example: tf.size(example["targets"]) > 0))


@seqio.map_over_dataset(num_seeds=1)
def _chunk(example: Example, seed: tf.Tensor) -> Example:
    tokens = example["targets"]
    seed = tf.random.experimental.stateless_split(seed)[1]
    chunks = -(-tf.size(tokens) // _CHUNK)
    # The last one is as likely as any other, and shorter.
    start = _CHUNK * tf.random.stateless_uniform([], seed, 0, chunks, tf.int32)
    return {"targets": tokens[start : start + _CHUNK]}


def join(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The tokens of 128 documents at a time, one after the other."""
    joined = dataset.map(lambda example: example["targets"]).ragged_batch(_JOINED_DOCUMENTS)
    return joined.map(lambda documents: {"targets": documents.flat_values})


def cut(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    """Pieces as long as a row holds; the last of a sequence may be shorter."""
    length = span_lengths(sequence_length["inputs"], sequence_length["targets"]).tokens

    def pieces(example: Example) -> tf.data.Dataset:
        tokens = example["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces)


@seqio.map_over_dataset(num_seeds=1)
def corrupt(
    example: Example, seed: tf.Tensor, output_features: dict[str, seqio.Feature]
) -> Example:
    """`spans.corrupt` in TensorFlow, for one sequence, without the EOS."""
    tokens = example["targets"]
    # Six, of which T5 uses two here.
    mask = noise_mask(tf.size(tokens), tf.random.experimental.stateless_split(seed, 6)[:2])
    first_sentinel = output_features["targets"].vocabulary.vocab_size - 1
    return {
        "inputs": _with_sentinels(tokens, mask, first_sentinel),
        "targets": _with_sentinels(tokens, ~mask, first_sentinel),
    }


def noise_mask(length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """Which tokens are cut out, [length] bool; `seeds` [2, 2] for noise and for kept spans."""
    padded = tf.maximum(length, 2)
    noise = tf.cast(tf.round(tf.cast(padded, tf.float32) * NOISE_DENSITY), tf.int32)
    noise = tf.clip_by_value(noise, 1, padded - 1)
    spans = tf.cast(tf.round(tf.cast(noise, tf.float32) / MEAN_SPAN), tf.int32)
    spans = tf.maximum(spans, 1)
    kept_spans = _partition(padded - noise, spans, seeds[1])
    noise_spans = _partition(noise, spans, seeds[0])
    alternating = tf.reshape(tf.stack([kept_spans, noise_spans], axis=1), [-1])
    return tf.repeat(tf.range(2 * spans) % 2 == 1, alternating)[:length]


def _partition(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """[parts] positive integers that sum to `total`, uniform over all such rows."""
    # T5's way to draw; tf.random's own shuffle would give other cuts for the same seed.
    order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
    places = 1 + tf.cast(tf.where(order < parts - 1)[:, 0], tf.int32)
    cuts = tf.concat([[0], places, [total]], axis=0)
    return cuts[1:] - cuts[:-1]


def _with_sentinels(tokens: tf.Tensor, mask: tf.Tensor, first_sentinel: int) -> tf.Tensor:
    """Puts one sentinel for each run in `mask`, counting down."""
    follows = mask & tf.pad(mask[:-1], [[1, 0]])
    starts = mask & ~follows
    sentinels = first_sentinel + 1 - tf.cumsum(tf.cast(starts, tokens.dtype))
    return tf.boolean_mask(tf.where(starts, sentinels, tokens), ~follows)
