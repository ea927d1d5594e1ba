"""T5's preprocessors of documents into rows, in TensorFlow; equal to T5's own for equal seeds.

From one preprocessor to the next, the feature `targets` contains the tokens of a document or of a
row, without an EOS.
"""

from switch_jax.data.seqio_import import seqio, tf

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


def split_into_rows(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    """Splits token sequences into pieces of `length` tokens; the last piece may be shorter."""

    def pieces(example: Example) -> tf.data.Dataset:
        tokens = example["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces)


def exchange_padding(dataset: tf.data.Dataset, pad_id: int) -> tf.data.Dataset:
    """Exchanges the ids 0 and `pad_id` in the features `inputs` and `targets`."""

    def exchange(example: Example) -> Example:
        return {
            name: tf.where(tokens == 0, pad_id, tf.where(tokens == pad_id, 0, tokens))
            for name, tokens in example.items()
            if name in ("inputs", "targets")
        }

    return dataset.map(exchange)
