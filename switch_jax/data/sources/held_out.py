"""Documents that are held out for validation: a fixed 1 % by their hashes, and at least one."""

import hashlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

SMALL_BYTES = 4 * 2**20  # a larger source surely has documents among the 1 %


class HeldOut(NamedTuple):
    """The documents of a source that are for validation; the others are for training.

    Attributes:
      only: hash of the only text that is held out; None: all whose hash is a multiple of 100.
      is_shared: whether all documents are for both, since there is a single one.
    """

    only: int | None = None
    is_shared: bool = False

    def is_in(self, split: Literal["train", "validation"], text: str) -> bool:
        """Whether a document belongs to a split."""
        number = _hash(text)
        is_held_out = number % 100 == 0 if self.only is None else number == self.only
        return self.is_shared or is_held_out == (split == "validation")


def hold_out_of(texts: Iterable[str]) -> HeldOut:
    """Returns the documents to hold out of all texts of a small source."""
    hashes = {_hash(text) for text in texts}
    if any(number % 100 == 0 for number in hashes):
        return HeldOut()
    return HeldOut(min(hashes, default=None), len(hashes) == 1)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
