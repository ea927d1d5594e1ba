"""Benchmark of the input pipelines in one run; prints the table of docs/benchmarks.md.

    pip install -e ".[data]" grain
    taskset -c 0 python scripts/bench/input_pipelines.py

The text is that of Python's standard library, as one source and as 107 sources, like the languages
of mC4. All readers return batches of 64 rows of 512 inputs and 114 targets in a vocabulary of 4096.
Without `taskset` they use all cores. Every round opens and times every reader once; medians are
reported.
"""

import argparse
import functools
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from switch_jax.config import Config, DataConfig, ModelConfig
from switch_jax.data import Batch, build_token_store, open_batches, open_vocabulary, padded_batch
from switch_jax.data.objectives import Objective, open_objective
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.sources.source import SPLITS
from switch_jax.data.token_store.store import TokenStore

ROWS, SOURCES, SHARDS = 64, 107, 8
TURN, WARM = 2.0, 15.0  # seconds that count, and in which tf.data fills its buffers


def config(**data) -> Config:
    settings = {"inputs_length": 512, "targets_length": 114, "batch_size": ROWS} | data
    return Config(model=ModelConfig(vocab_size=4096), data=DataConfig(**settings))


def write(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def documents() -> list[str]:
    """Returns texts of about 2,200 characters, the mean of C4."""
    whole = (document.text for document in python_documents())
    return [text[i : i + 2200] for text in whole for i in range(0, len(text), 2200)]


def grain_batches(folder: Path, config: Config, objective: Objective) -> Iterator[Batch]:
    """Returns the rows of a store from ArrayRecord, read by Grain, with noise of the same kind."""
    import grain
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def batch(rows: list[bytes], numbers: np.random.Generator) -> Batch:
        tokens = np.stack([np.frombuffer(row, np.uint16) for row in rows])
        examples = numbers.integers(0, 2**62, len(rows))
        [(_, inputs, targets)] = objective.apply(tokens, examples, examples)
        return padded_batch(inputs, targets, config)

    rows = grain.MapDataset.source(ArrayRecordDataSource(sorted(map(str, folder.iterdir()))))
    rows = rows.seed(config.data.seed).shuffle().repeat()
    batches = rows.batch(ROWS, batch_fn=list).random_map(batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def write_array_records(folder: Path, store: TokenStore, name: str, length: int) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    tokens = store.tokens(name, "train")
    for shard in range(SHARDS):
        writer = ArrayRecordWriter(str(folder / f"{shard:05d}.array_record"), "group_size:1")
        for row in range(shard, len(tokens) // length, SHARDS):
            writer.write(tokens.take(np.array([row * length]), length)[0].tobytes())
        writer.close()


def speed(batches: Iterator[Batch], duration: float) -> float:
    """Returns tokens per second without padding, measured over some seconds."""
    tokens, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < duration:
        batch = next(batches)
        tokens += np.count_nonzero(batch["encoder_input_tokens"])
        tokens += np.count_nonzero(batch["decoder_target_tokens"])
    return tokens / seconds


def readers(folder: Path) -> dict[str, Callable[[], Iterator[Batch]]]:
    """Returns a function that opens each reader, by its name in the table."""
    texts = documents()
    for shard in range(SHARDS):
        write(folder / f"one-{shard:05d}-of-{SHARDS:05d}.jsonl.gz", texts[shard::SHARDS])
    for source in range(SOURCES):
        write(folder / f"part{source}.jsonl.gz", texts[source::SOURCES])
    one = f"{folder}/one-*"
    many = ",".join(f"{folder}/part{i}.jsonl.gz={i + 1}" for i in range(SOURCES))
    vocabulary = open_vocabulary(config())
    began = time.perf_counter()
    manifest = build_token_store(DataConfig(mixture=one), vocabulary, folder / "one", workers=1)
    seconds = time.perf_counter() - began
    packed = sum(manifest["sources"]["one"][split]["tokens"] for split in SPLITS)
    print(f"data pack: {packed / seconds:,.0f} tokens/s by one worker", file=sys.stderr)
    build_token_store(DataConfig(mixture=many), vocabulary, folder / "many", workers=1)
    settings = config(mixture=one, data_dir=str(folder / "one"))
    objective = open_objective(settings, vocabulary)
    length = objective.text_length(settings.data.inputs_length, settings.data.targets_length)
    write_array_records(folder / "records", TokenStore(folder / "one"), "one", length)

    def store(mixture: str, name: str, **more) -> Callable[[], Iterator[Batch]]:
        return functools.partial(
            open_batches, config(mixture=mixture, data_dir=str(folder / name), **more), "train"
        )

    def seqio(**more) -> Callable[[], Iterator[Batch]]:
        settings = {"reader": "seqio", "vocabulary": vocabulary.name} | more
        return functools.partial(open_batches, config(**settings), "train")

    return {
        "packed records": store(one, "one"),
        "the same rows from ArrayRecord, by Grain": functools.partial(
            grain_batches, folder / "records", settings, objective
        ),
        "packed records, documents apart (`data.pack=True`)": store(one, "one", pack=True),
        f"packed records, {SOURCES} sources": store(many, "many"),
        "seqio, json.gz": seqio(mixture=one),
        "seqio, json.gz, documents apart": seqio(mixture=one, pack=True),
        f"seqio, json.gz, {SOURCES} sources": seqio(mixture=many),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opens = readers(Path(folder))
        speeds: dict[str, list[float]] = {name: [] for name in opens}
        waits: dict[str, list[float]] = {name: [] for name in opens}
        for _ in range(args.rounds):
            for name, open_reader in opens.items():
                began = time.perf_counter()
                batches = open_reader()
                next(batches)
                waits[name].append(time.perf_counter() - began)
                speed(batches, WARM if name.startswith("seqio") else TURN)
                speeds[name].append(speed(batches, TURN))
                del batches  # and what it reads ahead
                print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr)
    print("| reader | tokens/s | first batch |\n|---|---|---|")
    for name, values in speeds.items():
        median, low, high = (f(values) / 1e6 for f in (statistics.median, min, max))
        wait = statistics.median(waits[name])
        print(f"| {name} | {median:.2f} M ({low:.2f} – {high:.2f}) | {wait:.1f} s |")


if __name__ == "__main__":
    main()
