"""Results that the paper prints (arXiv 2101.03961v3), to draw beside ours.

Qualities are negative log perplexities on C4, in nats per target token. The paper's figures have no
numbers: where its tables state the same runs, the numbers of the tables are used.
"""

from switch_jax.sweeps import PaperPoint, PaperSeries

# The teachers and the dense student of distillation. These are the sizes of the models of Figures 1
# and 4; the curves of those figures end at other qualities.
TABLE_7 = PaperSeries(
    "the paper's Table 7",
    (
        PaperPoint("T5-Base", 1, 223e6, -1.636),
        PaperPoint("Switch-Base 16e", 16, 1.1e9, -1.505),
        PaperPoint("Switch-Base 32e", 32, 2.0e9, -1.474),
        PaperPoint("Switch-Base 64e", 64, 3.8e9, -1.444),
        PaperPoint("Switch-Base 128e", 128, 7.4e9, -1.432),
        PaperPoint("Switch-Base 256e", 256, 14.7e9, -1.427),
    ),
)
TABLE_9_DENSE = PaperSeries(
    "the paper's Table 9, after 500k steps",
    (
        PaperPoint("T5-Base", 1, 0.2e9, -1.556),
        PaperPoint("T5-Large", 1, 0.7e9, -1.350),
        PaperPoint("T5-XXL", 1, 11e9, -1.095),
    ),
)
TABLE_9_SPARSE = PaperSeries(
    "the paper's Table 9, after 500k steps",
    (
        PaperPoint("Switch-Base", 128, 7e9, -1.306),
        PaperPoint("Switch-Large", 128, 26e9, -1.177),
        PaperPoint("Switch-XXL", 128, 395e9, -1.008),
        PaperPoint("Switch-C", 2048, 1571e9, -1.043),
    ),
)
