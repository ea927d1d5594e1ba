"""Documents in blocks that are asked for by number.

What a block holds depends on its shard and number alone, so a pipeline that was restored in the
middle of a shard gets the right one. Only the block that comes next is there at once; any other
is read up to.
"""

import itertools
import threading
from collections.abc import Iterator

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Source, Split
from switch_jax.errors import UserError

BLOCK = 64  # documents; inputs and targets are two


class BlockReader:
    """Reads the shards of a split, any number of them at the same time.

    Attributes:
      split, shards: which one, and how many it has.
      pairs: as the source's.
      failures: what ended the reading of a shard early; whoever reads must look.
    """

    def __init__(self, source: Source, split: Split, bad: BadRecords):
        self.split, self.pairs = split, source.has_targets
        self._source, self._bad = source, bad
        self._shards = source.shards(split)
        self.shards = len(self._shards)
        self._open: dict[int, tuple[int, Iterator[str]]] = {}  # shard → its next block
        self._lock = threading.Lock()
        self.failures: list[UserError] = []

    def block(self, shard: int, number: int) -> list[bytes]:
        """UTF-8 of the texts of block `number` of a shard; empty past its end.

        A shard may be read by one thread at a time.
        """
        with self._lock:
            next_block, texts = self._open.pop(shard, (-1, iter(())))
        if next_block != number:
            texts = self._source.texts(self.split, self._shards[shard], self._bad)
            texts = itertools.islice(texts, number * BLOCK, None)
        try:
            block = [text.encode("utf-8", "replace") for text in itertools.islice(texts, BLOCK)]
        except UserError as failure:
            self.failures.append(failure)
            return []
        if block:
            with self._lock:
                self._open[shard] = number + 1, texts
        return block
