"""The streaming reader: mixtures as seqio tasks. The only module that imports TensorFlow.

It makes the same examples as the token store, equal in distribution, but draws them from a
tf.data pipeline that tokenises as it goes. Where the store's position is a number, this
one's is a shuffle buffer: megabytes for each feed, tied to the number of feeds.
"""

import os
from pathlib import Path

import numpy as np
from absl import logging

from switch_jax.data import corpus
from switch_jax.data.batch import EVERYTHING, Batch, Feed
from switch_jax.data.corpus import Split
from switch_jax.data.spans import MEAN_SPAN, NOISE_DENSITY, span_lengths
from switch_jax.data.vocabulary import NUM_SENTINELS, Vocabulary, open_vocabulary
from switch_jax.errors import UserError
from switch_jax.schema import Config

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    import seqio
    import tensorflow as tf
except ImportError as error:
    raise UserError(
        'data.reader=seqio needs TensorFlow and seqio: pip install "switch_jax[data]", or set'
        " data.reader=store."
    ) from error

tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory that JAX needs

_JOINED_DOCUMENTS = 128  # joined before they are cut, as in T5


class SeqioIterator:
    """A `BatchIterator` over a seqio task; each feed reads its own share of the documents.

    Training examples are shuffled with `data.seed`, in every epoch differently. Raises
    `UserError` where lengths do not fit or feeds outnumber documents.
    """

    def __init__(self, config: Config, split: Split, feed: Feed = EVERYTHING):
        data = config.data
        rows = len(feed.rows(data.batch_size))
        span_lengths(data.inputs_length, data.targets_length)
        if sum(1 for _ in corpus.documents(data.mixture, split)) < feed.count:
            raise UserError(
                f"The {split} split of {data.mixture} has fewer documents than there are"
                f" processes to feed ({feed.count}); set data.reader=store."
            )
        self._task = _register(data.mixture, open_vocabulary(config), data.pack)
        self._folder = f"process_{feed.index}_of_{feed.count}"
        self._saves = feed.saves
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # seqio warns of restarts, but `save` is exact
        dataset = seqio.get_dataset(
            self._task,
            {"inputs": data.inputs_length, "targets": data.targets_length},
            seqio.EncDecFeatureConverter(pack=data.pack),
            dataset_split=split,
            shuffle=split == "train",
            num_epochs=None,
            shard_info=seqio.ShardInfo(feed.index, feed.count),
            seed=data.seed,
            verbose=False,
        )
        logging.set_verbosity(verbosity)
        self._iterator = iter(dataset.batch(rows, drop_remainder=True))

    def __iter__(self) -> "SeqioIterator":
        return self

    def __next__(self) -> Batch:
        return {
            name: tensor.numpy().astype(np.float32 if name.endswith("weights") else np.int32)
            for name, tensor in next(self._iterator).items()
        }

    def save(self, directory: Path) -> None:
        if not self._saves:
            return
        folder = directory / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        tf.train.Checkpoint(iterator=self._iterator).write(os.fspath(folder / "iterator"))
        (folder / "task").write_text(self._task)

    def restore(self, directory: Path) -> None:
        """Raises `UserError` for a position of other data or another number of feeds."""
        folder = directory / self._folder
        if not (folder / "task").is_file():
            raise UserError(
                f"{directory} holds no position of the seqio reader for {self._folder}; use the"
                " mesh and as many processes as wrote it, or train with data.reader=store, which"
                " does not mind."
            )
        if (folder / "task").read_text() != self._task:
            raise UserError(
                f"The position in {directory} belongs to other text, another vocabulary or other"
                " packing; set data.* to what it was made with."
            )
        checkpoint = tf.train.Checkpoint(iterator=self._iterator)
        checkpoint.read(os.fspath(folder / "iterator")).assert_consumed()


def _register(mixture: str, vocabulary: Vocabulary, pack: bool) -> str:
    """Registers the task unless it is there; its name says all that it depends on."""
    kind = "apart" if pack else "joined"
    name = (
        f"switch_jax_{mixture}_{corpus.fingerprint(mixture)[:16]}"
        f"_{vocabulary.fingerprint[:16]}_{kind}"
    )
    if name in seqio.TaskRegistry.names():
        return name

    def source(split: Split, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        texts = [document.text for document in corpus.documents(mixture, split)]
        dataset = tf.data.Dataset.from_tensor_slices({"targets": texts})
        return dataset.shuffle(len(texts), seed=seed) if shuffle_files else dataset

    pieces = seqio.SentencePieceVocabulary(os.fspath(vocabulary.path), extra_ids=NUM_SENTINELS)
    feature = seqio.Feature(pieces, add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, corpus.SPLITS),
        preprocessors=[
            seqio.preprocessors.tokenize,
            # What follows is drawn anew in every epoch.
            seqio.CacheDatasetPlaceholder(),
            _cut if pack else _join_and_cut,
            _corrupt,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
    )
    return name


def _cut(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    """Cuts token sequences into pieces no longer than a row holds; the last may be shorter."""
    length = span_lengths(sequence_length["inputs"], sequence_length["targets"]).tokens

    def pieces(example: dict[str, tf.Tensor]) -> tf.data.Dataset:
        tokens = example["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces)


def _join_and_cut(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    joined = dataset.map(lambda example: example["targets"]).ragged_batch(_JOINED_DOCUMENTS)
    return _cut(joined.map(lambda r: {"targets": r.flat_values}), sequence_length)


@seqio.map_over_dataset(num_seeds=2)
def _corrupt(
    example: dict[str, tf.Tensor],
    seeds: tf.Tensor,
    output_features: dict[str, seqio.Feature],
) -> dict[str, tf.Tensor]:
    """`spans.corrupt` in TensorFlow, for one sequence, without the EOS."""
    tokens = example["targets"]
    length = tf.maximum(tf.size(tokens), 2)
    # In float64, as Python rounds; in T5's float32 some halves go the other way.
    noise = tf.cast(tf.round(tf.cast(length, tf.float64) * NOISE_DENSITY), tf.int32)
    noise = tf.clip_by_value(noise, 1, length - 1)
    spans = tf.cast(tf.round(tf.cast(noise, tf.float64) / MEAN_SPAN), tf.int32)
    spans = tf.maximum(spans, 1)
    kept_spans = _partition(length - noise, spans, seeds[0])
    noise_spans = _partition(noise, spans, seeds[1])
    alternating = tf.reshape(tf.stack([kept_spans, noise_spans], axis=1), [-1])
    mask = tf.repeat(tf.range(2 * spans) % 2 == 1, alternating)[: tf.size(tokens)]
    first_sentinel = output_features["targets"].vocabulary.vocab_size - 1
    return {
        "inputs": _with_sentinels(tokens, mask, first_sentinel),
        "targets": _with_sentinels(tokens, ~mask, first_sentinel),
    }


def _partition(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """[parts] positive integers that sum to `total`, uniform over all such rows."""
    places = tf.random.experimental.stateless_shuffle(tf.range(1, total), seed)
    cuts = tf.concat([[0], tf.sort(places[: parts - 1]), [total]], axis=0)
    return cuts[1:] - cuts[:-1]


def _with_sentinels(tokens: tf.Tensor, mask: tf.Tensor, first_sentinel: int) -> tf.Tensor:
    """Puts one sentinel for each run in `mask`, counting down."""
    follows = mask & tf.pad(mask[:-1], [[1, 0]])
    starts = mask & ~follows
    sentinels = first_sentinel + 1 - tf.cumsum(tf.cast(starts, tokens.dtype))
    return tf.boolean_mask(tf.where(starts, sentinels, tokens), ~follows)
