"""Figures that the paper printed, to draw beside ours (arXiv 2101.03961v3).

Qualities are negative log perplexities on C4, in nats a target token. The paper's figures have no
numbers; where its tables state the same runs, those are used.
"""

from typing import NamedTuple


class PaperPoint(NamedTuple):
    """A model of the paper."""

    name: str
    experts: int  # 1: dense
    params: float
    quality: float

    @property
    def loss(self) -> float:
        return -self.quality


class PaperSeries(NamedTuple):
    """Points that belong together, and where they are printed."""

    source: str
    points: tuple[PaperPoint, ...]


PAPER_SERIES = {
    # The teachers and the dense student of distillation: Switch-Base of Figures 1 and 4, whose own
    # curves end elsewhere but whose sizes these are.
    "table_7": PaperSeries(
        "the paper's Table 7",
        (
            PaperPoint("T5-Base", 1, 223e6, -1.636),
            PaperPoint("Switch-Base 16e", 16, 1.1e9, -1.505),
            PaperPoint("Switch-Base 32e", 32, 2.0e9, -1.474),
            PaperPoint("Switch-Base 64e", 64, 3.8e9, -1.444),
            PaperPoint("Switch-Base 128e", 128, 7.4e9, -1.432),
            PaperPoint("Switch-Base 256e", 256, 14.7e9, -1.427),
        ),
    ),
    "table_9_dense": PaperSeries(
        "the paper's Table 9, after 500k steps",
        (
            PaperPoint("T5-Base", 1, 0.2e9, -1.556),
            PaperPoint("T5-Large", 1, 0.7e9, -1.350),
            PaperPoint("T5-XXL", 1, 11e9, -1.095),
        ),
    ),
    "table_9_sparse": PaperSeries(
        "the paper's Table 9, after 500k steps",
        (
            PaperPoint("Switch-Base", 128, 7e9, -1.306),
            PaperPoint("Switch-Large", 128, 26e9, -1.177),
            PaperPoint("Switch-XXL", 128, 395e9, -1.008),
            PaperPoint("Switch-C", 2048, 1571e9, -1.043),
        ),
    ),
}
