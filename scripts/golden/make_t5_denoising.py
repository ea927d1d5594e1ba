"""Writes tests/golden/t5_denoising.npz: outputs of T5's code for known seeds.

    pip install seqio==0.0.20 tensorflow==2.21.0 tensorflow-datasets==4.9.10 \
        tensorflow-text==2.21.1 babel gin-config rouge-score sacrebleu scikit-learn
    pip install --no-deps t5==0.9.4
    python scripts/golden/make_t5_denoising.py tests/golden

in an environment of its own: with its dependencies, t5 replaces seqio by an older one. The
file there was made with these versions and numpy 2.4.6, on a CPU. Two runs give equal bytes.

A seed is a pair of int64. The same numbers as int32 would be another seed: T5 splits it into
seeds of its own type. seqio draws them: under `map_seed_manager(S)`, the first preprocessor
that takes a seed gets, for its i-th example, the i-th numbers of `tf.data.Dataset.random(S)`
and `random(S + 1)`; the second one gets those of S + 2 and S + 3, and so on. Rows of unequal
length lie end to end: `np.split(x, np.cumsum(x_lengths)[:-1])`. No row has an EOS. The
vocabulary has 32100 ids; 32099 is the first sentinel.

    span_counts [3000, 2]   noise tokens and noise spans in texts of 1, 2, … 3000 tokens
    helper [H, 3]           random_spans_helper: inputs_length, tokens_length, targets_length
    spans/…                 N texts through `denoise`, under map_seed_manager(0):
      seeds [N, 2]          its seeds
      mask_seeds [N, 2, 2]  the noise mask's: the first two of stateless_split(seed, 6)
      tokens, masks, inputs, targets    rows
    iid/…, prefix/…, prefix_quarter/…   inputs and targets of the same texts under the same seeds
                            with i.i.d. noise, and with prefixes at noise densities 0.5 and 0.25
    chunks/…                C texts 0, 1, 2, … through `select_random_chunk`:
      seeds [C, 2], taken [C, 4]  length, max_length; start and size of what it took
    chain/…                 `span_corruption` for 512 inputs, under map_seed_manager(3):
      documents             rows, some of them empty
      chunks                rows: up to 65536 tokens of each that is not; with 3 and 4
      segments              rows: 128 chunks, joined and cut into 568 tokens, then the others;
                            takes the seeds 5 and 6, which change nothing
      inputs, targets       rows: the segments corrupted with 7 and 8
"""

import sys
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf
from t5.data import preprocessors as t5

TEXTS = (1, 2, 3, 4, 5, 7, 10, 13, 20, 27, 30, 37, 50, 70, 90, 110, 130, 141, 150, 190, 250)
TEXTS = 2 * (*TEXTS, 284, 300, 350, 390, 568, 670, 700, 710, 1137, 2274)
INPUTS = (10, 16, 32, 48, 64, 96, 114, 128, 172, 256, 316, 384, 512, 640, 768, 1024, 1468, 2048)
CHUNKS = [(length, 100) for length in (1, 99, 100, 101, 150, 200, 201, 350, 999, 5000)] * 3
CHUNKS += [(n, 65_536) for n in (568, 65_536, 65_537, 131_072, 131_073, 500_000, 1_000_000)]
DOCUMENTS = [7 * d % 60 for d in range(138)]  # three of them empty
DOCUMENTS[19:119:20] = [65_537, 66_000, 65_536, 132_000, 197_100]  # with seed 3, few tokens
SIZES = {"inputs": 512, "targets": 114}
FEATURES = dict.fromkeys(SIZES, seqio.Feature(seqio.PassThroughVocabulary(32_100)))
SENTINELS = (t5.noise_span_to_unique_sentinel, t5.nonnoise_span_to_unique_sentinel)
DENOISE = (FEATURES, 0.15, t5.random_spans_noise_mask, *SENTINELS)
PREFIX = (t5.random_prefix_noise_mask, t5.drop_nonnoise_tokens, t5.drop_noise_tokens)
OTHERS = {
    "iid": (FEATURES, 0.15, t5.iid_noise_mask, *SENTINELS),
    "prefix": (FEATURES, 0.5, *PREFIX),
    "prefix_quarter": (FEATURES, 0.25, *PREFIX),
}


def dataset(rows: list[np.ndarray]) -> tf.data.Dataset:
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [len(row) for row in rows])
    return tf.data.Dataset.from_tensor_slices({"targets": ragged})


def columns(examples: tf.data.Dataset) -> dict[str, list[np.ndarray]]:
    examples = list(examples.as_numpy_iterator())
    return {name: [example[name] for example in examples] for name in examples[0]}


def flat(part: str, **named: list[np.ndarray]) -> dict[str, np.ndarray]:
    lengths = {f"{part}/{name}_lengths": [len(row) for row in x] for name, x in named.items()}
    return {f"{part}/{name}": np.concatenate(x) for name, x in named.items()} | lengths


def spans() -> dict[str, np.ndarray]:
    tokens = [np.arange(3, 3 + length, dtype=np.int32) for length in TEXTS]
    with seqio.map_seed_manager(0):
        corrupted = columns(t5.denoise(dataset(tokens), *DENOISE))
    drawn = tf.data.Dataset.zip(tf.data.Dataset.random(0), tf.data.Dataset.random(1))
    seeds = np.array(list(drawn.take(len(TEXTS)).as_numpy_iterator()))
    pairs = [tf.random.experimental.stateless_split(seed, 6)[:2] for seed in seeds]
    masks = [t5.random_spans_noise_mask(n, 0.15, s).numpy() for n, s in zip(TEXTS, pairs)]
    for row, mask, inputs in zip(tokens, masks, corrupted["inputs"]):
        assert (np.isin(row, inputs) == ~mask).all()  # `denoise` was given these seeds
    rows = flat("spans", tokens=tokens, masks=masks, **corrupted)
    return {"spans/seeds": seeds, "spans/mask_seeds": pairs, **rows}


def others() -> dict[str, np.ndarray]:
    rows = {}
    for name, arguments in OTHERS.items():
        tokens = [np.arange(3, 3 + length, dtype=np.int32) for length in TEXTS]
        with seqio.map_seed_manager(0):
            rows |= flat(name, **columns(t5.denoise(dataset(tokens), *arguments)))
    return rows


def chunks() -> dict[str, np.ndarray]:
    seeds, taken = np.random.default_rng(0).integers(0, 2**32, (len(CHUNKS), 2)), []
    for (length, longest), seed in zip(CHUNKS, seeds):
        text = {"targets": tf.range(length)}
        chunk = t5.single_example_select_random_chunk(text, seed, FEATURES, longest)["targets"]
        taken.append((length, longest, chunk[0], len(chunk)))
    return {"chunks/seeds": seeds, "chunks/taken": taken}


def chain() -> dict[str, np.ndarray]:
    texts = [1 + np.arange(d, d + n, dtype=np.int32) % 250 for d, n in enumerate(DOCUMENTS)]
    with seqio.map_seed_manager(3):
        chosen = t5.select_random_chunk(dataset(texts), FEATURES, 65_536)
    segments = t5.split_tokens(t5.reduce_concat_tokens(chosen), max_tokens_per_segment=568)
    with seqio.map_seed_manager(3):
        corrupted = columns(t5.span_corruption(dataset(texts), SIZES, FEATURES))
    chosen, segments = (columns(steps)["targets"] for steps in (chosen, segments))
    return flat("chain", documents=texts, chunks=chosen, segments=segments, **corrupted)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden", "t5_denoising.npz")
    helper = [(n, *t5.random_spans_helper(n, 0.15, 3.0, 1, 1)) for n in INPUTS]
    masks = [t5.random_spans_noise_mask(n, 0.15, [[0, 1], [2, 3]]) for n in range(1, 3001)]
    counts = [(m.sum(), (m[1:] > m[:-1]).sum()) for m in (mask.numpy() for mask in masks)]
    np.savez_compressed(
        path,
        span_counts=counts,
        helper=helper,
        **spans(),
        **others(),
        **chunks(),
        **chain(),
    )
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
