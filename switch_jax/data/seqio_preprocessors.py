"""T5's preprocessors for span corruption, in TensorFlow; equal to T5's own for equal seeds.

From one preprocessor to the next, the feature `targets` contains the tokens of a document or of a
row, without an EOS.
"""

from collections.abc import Sequence

from switch_jax.data.seqio_import import seqio, tf
from switch_jax.data.span_corruption import MEAN_SPAN, NOISE_DENSITY, span_lengths

# As in T5.
_CHUNK_LENGTH = 65_536  # tokens
_JOINED_DOCUMENTS = 128
Example = dict[str, tf.Tensor]


def select_random_chunk(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Selects a random chunk of 65,536 tokens of each longer document, another one in every epoch.

    Drops documents without tokens.
    """
    return _random_chunk(dataset.filter(lambda example: tf.size(example["targets"]) > 0))


@seqio.map_over_dataset(num_seeds=1)
def _random_chunk(example: Example, seed: tf.Tensor) -> Example:
    tokens = example["targets"]
    seed = tf.random.experimental.stateless_split(seed)[1]
    chunks = -(-tf.size(tokens) // _CHUNK_LENGTH)
    # The last chunk is as likely as any other, though shorter.
    start = _CHUNK_LENGTH * tf.random.stateless_uniform([], seed, 0, chunks, tf.int32)
    return {"targets": tokens[start : start + _CHUNK_LENGTH]}


def concatenate_documents(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Concatenates the tokens of every 128 documents."""
    joined = dataset.map(lambda example: example["targets"]).ragged_batch(_JOINED_DOCUMENTS)
    return joined.map(lambda documents: {"targets": documents.flat_values})


def split_into_rows(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    """Splits token sequences into pieces that fill a row; the last piece may be shorter."""
    length = span_lengths(sequence_length["inputs"], sequence_length["targets"]).tokens

    def pieces(example: Example) -> tf.data.Dataset:
        tokens = example["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces)


@seqio.map_over_dataset(num_seeds=1)
def corrupt_example(example: Example, seed: tf.Tensor, sentinels: Sequence[int]) -> Example:
    """Computes `span_corruption.corrupt_spans` in TensorFlow, for one sequence, without the EOS."""
    tokens = example["targets"]
    # T5 splits the seed six ways and uses the first two here.
    mask = noise_mask(tf.size(tokens), tf.random.experimental.stateless_split(seed, 6)[:2])
    ids = tf.constant(sentinels, tokens.dtype)
    return {
        "inputs": _replace_runs(tokens, mask, ids),
        "targets": _replace_runs(tokens, ~mask, ids),
    }


def exchange_padding(dataset: tf.data.Dataset, pad_id: int) -> tf.data.Dataset:
    """Exchanges the ids 0 and `pad_id` in the features `inputs` and `targets`."""

    def exchange(example: Example) -> Example:
        return {
            name: tf.where(tokens == 0, pad_id, tf.where(tokens == pad_id, 0, tokens))
            for name, tokens in example.items()
            if name in ("inputs", "targets")
        }

    return dataset.map(exchange)


def noise_mask(length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """[length] bool: True at noise tokens.

    Args:
      seeds: [2, 2] for the noise spans and the kept spans.
    """
    padded = tf.maximum(length, 2)
    noise = tf.cast(tf.round(tf.cast(padded, tf.float32) * NOISE_DENSITY), tf.int32)
    noise = tf.clip_by_value(noise, 1, padded - 1)
    spans = tf.cast(tf.round(tf.cast(noise, tf.float32) / MEAN_SPAN), tf.int32)
    spans = tf.maximum(spans, 1)
    kept_lengths = _partition(padded - noise, spans, seeds[1])
    noise_lengths = _partition(noise, spans, seeds[0])
    all_lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
    return tf.repeat(tf.range(2 * spans) % 2 == 1, all_lengths)[:length]


def _partition(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """[parts] positive integers that sum to `total`, uniform over all such rows."""
    # As in T5; tf.random's own shuffle would give other cuts for the same seed.
    order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
    inner_cuts = 1 + tf.cast(tf.where(order < parts - 1)[:, 0], tf.int32)
    cuts = tf.concat([[0], inner_cuts, [total]], axis=0)
    return cuts[1:] - cuts[:-1]


def _replace_runs(tokens: tf.Tensor, mask: tf.Tensor, sentinels: tf.Tensor) -> tf.Tensor:
    """Replaces each run of Trues in `mask` by the next sentinel."""
    continues = mask & tf.pad(mask[:-1], [[1, 0]])
    starts = mask & ~continues
    runs = tf.maximum(tf.cumsum(tf.cast(starts, tf.int32)) - 1, 0)
    return tf.boolean_mask(tf.where(starts, tf.gather(sentinels, runs), tokens), ~continues)
