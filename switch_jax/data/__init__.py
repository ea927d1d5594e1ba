"""From a mixture of texts to batches.

    corpus → vocabulary → {store, tasks, text} → batches
             spans, packing, counter: pure functions under them

Only `tasks`, the streaming reader, imports TensorFlow; it is loaded when asked for.
"""

from switch_jax.data.batch import EVERYTHING, BatchIterator, Feed, SyntheticIterator
from switch_jax.data.corpus import Split
from switch_jax.data.store import StoreIterator
from switch_jax.data.vocabulary import open_vocabulary
from switch_jax.schema import Config

__all__ = ["open_batches", "open_vocabulary"]


def open_batches(config: Config, split: Split, feed: Feed = EVERYTHING) -> BatchIterator:
    """One process's endless stream of batches, as `data.reader` says.

    Together the feeds' rows make global batches of `data.batch_size`. What the reader
    needs and the config does not name is made on first use, in the cache.

    Raises `UserError` for anything missing or impossible.
    """
    match config.data.reader:
        case "store":
            return StoreIterator(config, split, feed)
        case "synthetic":
            return SyntheticIterator(config, feed)
        case "seqio":
            from switch_jax.data.tasks import SeqioIterator

            return SeqioIterator(config, split, feed)
