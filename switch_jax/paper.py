"""Figures that the paper printed, to draw beside ours (arXiv 2101.03961v3).

Qualities are negative log perplexities on C4, in nats a target token. The paper's figures have no
numbers; where its tables state the same runs, those are used.
"""

from typing import NamedTuple


class Point(NamedTuple):
    """A model of the paper."""

    name: str
    experts: int  # 1: dense
    params: float
    quality: float

    @property
    def loss(self) -> float:
        return -self.quality


class Series(NamedTuple):
    """Points that belong together, and where they are printed."""

    source: str
    points: tuple[Point, ...]


SERIES = {
    # The teachers and the dense student of distillation: Switch-Base of Figures 1 and 4, whose own
    # curves end elsewhere but whose sizes these are.
    "table_7": Series(
        "the paper's Table 7",
        (
            Point("T5-Base", 1, 223e6, -1.636),
            Point("Switch-Base 16e", 16, 1.1e9, -1.505),
            Point("Switch-Base 32e", 32, 2.0e9, -1.474),
            Point("Switch-Base 64e", 64, 3.8e9, -1.444),
            Point("Switch-Base 128e", 128, 7.4e9, -1.432),
            Point("Switch-Base 256e", 256, 14.7e9, -1.427),
        ),
    ),
    "table_9_dense": Series(
        "the paper's Table 9, after 500k steps",
        (
            Point("T5-Base", 1, 0.2e9, -1.556),
            Point("T5-Large", 1, 0.7e9, -1.350),
            Point("T5-XXL", 1, 11e9, -1.095),
        ),
    ),
    "table_9_sparse": Series(
        "the paper's Table 9, after 500k steps",
        (
            Point("Switch-Base", 128, 7e9, -1.306),
            Point("Switch-Large", 128, 26e9, -1.177),
            Point("Switch-XXL", 128, 395e9, -1.008),
            Point("Switch-C", 2048, 1571e9, -1.043),
        ),
    ),
}
