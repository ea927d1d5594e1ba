"""Random access to the documents of a shard, in numbered blocks.

The content of a block depends on its shard and number alone, so a pipeline that is restored in the
middle of a shard continues with the right block. The next block of a shard is read at once; any
other block costs reading the shard up to it.
"""

import itertools
import threading
from collections.abc import Iterator

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Source, Split
from switch_jax.errors import UserError

BLOCK_SIZE = 64  # texts; the inputs and targets of a pair are two texts


class BlockReader:
    """Reads the shards of a split, any number of them at the same time.

    Attributes:
      split: the split.
      num_shards: its number of shards.
      has_targets: whether the texts are inputs and targets in turn.
      failures: errors that ended the reading of a shard; callers must check the list, since an
        exception that passes through tf.data loses its type.
    """

    def __init__(self, source: Source, split: Split, bad: BadRecords):
        self.split, self.has_targets = split, source.has_targets
        self._source, self._bad = source, bad
        self._shards = source.shards(split)
        self.num_shards = len(self._shards)
        # Of each shard that is being read: the number of its next block, and the texts from there.
        self._open: dict[int, tuple[int, Iterator[str]]] = {}
        self._lock = threading.Lock()
        self.failures: list[UserError] = []

    def block(self, shard: int, number: int) -> list[bytes]:
        """Returns the texts of block `number` of a shard as UTF-8; an empty list past its end.

        Different shards may be read by different threads, one shard by one thread at a time.
        """
        with self._lock:
            next_block, texts = self._open.pop(shard, (-1, iter(())))
        if next_block != number:
            texts = self._source.texts(self.split, self._shards[shard], self._bad)
            texts = itertools.islice(texts, number * BLOCK_SIZE, None)
        try:
            block = [
                text.encode("utf-8", "replace") for text in itertools.islice(texts, BLOCK_SIZE)
            ]
        except UserError as failure:
            self.failures.append(failure)
            return []
        if block:
            with self._lock:
                self._open[shard] = number + 1, texts
        return block
