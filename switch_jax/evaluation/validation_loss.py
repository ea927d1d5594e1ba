"""Evaluation: token-weighted sums over batches, divided once at the end."""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switch_jax.checkpoint import Workdir, restore_params
from switch_jax.config import Config
from switch_jax.data import (
    Batch,
    BatchIterator,
    ProcessRows,
    open_batches_by_source,
    open_vocabulary,
    read_vocabulary,
)
from switch_jax.distributed import make_mesh, sum_over_processes
from switch_jax.errors import UserError
from switch_jax.evaluation.metric_names import SOURCE_METRICS, TOKEN_METRICS
from switch_jax.evaluation.task_scores import TaskScorer
from switch_jax.model import ShardedModel, process_rows, router_metrics

Validation = Mapping[str, Sequence[Batch]]  # by source


def evaluate(
    sharded: ShardedModel, params: Mapping[str, jax.Array], batches: Validation
) -> dict[str, float]:
    """Metrics over finite numbers of batches, without dropout, at the evaluation capacity.

    Every target token counts once, wherever its batch ends. `cross_entropy` is in nats and
    holds neither auxiliary nor z-losses; `neg_log_perplexity` is its negative (the paper's
    measure of quality). Of several sources, each has its own as well, `<source>/cross_entropy`
    and so on.
    """
    sums = {}
    for source, of_source in batches.items():
        steps = (sharded.eval_step(params, sharded.shard_batch(batch)) for batch in of_source)
        sums[source] = jax.device_get(functools.reduce(_add, steps))
    total = functools.reduce(_add, sums.values())
    metrics = _quality(total) | router_metrics(total[2], sharded.config)
    if len(sums) > 1:
        for source, of_source in sums.items():
            quality = _quality(of_source)
            metrics |= {f"{source}/{name}": quality[name] for name in SOURCE_METRICS}
    return {name: float(value) for name, value in metrics.items()}


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(operator.add, a, b)


def _quality(result: Any) -> dict[str, Any]:
    sums, targets, _ = result
    loss = sums.cross_entropy / targets
    return dict(zip(TOKEN_METRICS, (loss, -loss, sums.correct / targets)))


def evaluate_checkpoint(workdir: Workdir, folder: Path, config: Config) -> dict[str, float]:
    """Metrics of a checkpoint on validation batches of `config`, and of its tasks' examples.

    With `unigram_entropy` of the same targets, to compare with. Raises `UserError`, also where
    the batches are not in the vocabulary that the run was trained with.
    """
    check_vocabulary(workdir, config)
    sharded = ShardedModel(config, make_mesh(config))
    feed = process_rows(sharded.mesh)
    batches, score = validation_batches(config, feed), TaskScorer(sharded)
    score.agree()
    params = restore_params(folder, sharded.abstract_params)
    metrics = evaluate(sharded, params, batches)
    mine = itertools.chain(*batches.values()) if feed.first_in_group else []
    counts_V = sum_over_processes(_token_counts(mine, config))
    metrics["unigram_entropy"] = unigram_entropy(counts_V)
    return metrics | score(params, workdir.predictions / f"eval-{folder.name}")


def check_vocabulary(workdir: Workdir, config: Config) -> None:
    """Raises `UserError` where a config's text is not in the vocabulary of a run."""
    if config.data.reader == "synthetic" or not workdir.vocabulary.exists():
        return
    if open_vocabulary(config).fingerprint != read_vocabulary(workdir.vocabulary).fingerprint:
        raise UserError(
            f"The validation text is in another vocabulary than {workdir.path}; set"
            f" data.vocabulary={workdir.vocabulary}."
        )


def validation_batches(config: Config, feed: ProcessRows) -> Validation:
    """This process's rows of validation batches of every source.

    They are `train.eval_batches`, or as many as have every row of the source once.
    """
    rows_B, count = feed.indices(config.data.batch_size), config.train.eval_batches
    return {
        name: list(itertools.islice(_once(stream, rows_B, config.data.batch_size), count))
        for name, stream in open_batches_by_source(config, "validation", feed).items()
    }


def _once(stream: BatchIterator, rows_B: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Batches until a source begins anew; rows of the last one that would be anew are padding."""
    for number, batch in enumerate(stream):
        left = (
            math.inf
            if stream.rows_per_epoch is None
            else stream.rows_per_epoch - number * batch_size
        )
        if left <= 0:
            return
        anew_B = rows_B >= left
        yield {
            name: np.where(anew_B[:, None], 0, of).astype(of.dtype) for name, of in batch.items()
        }


def _token_counts(batches: Iterable[Batch], config: Config) -> np.ndarray:
    """[V] how often each target token occurs, sentinels included."""
    counts_V = np.zeros(config.model.vocab_size, np.int64)
    for batch in batches:
        tokens = batch["decoder_target_tokens"][batch["decoder_loss_weights"] > 0]
        counts_V += np.bincount(tokens, minlength=len(counts_V))
    return counts_V


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy, in nats, of tokens that occur so often.

    The cross-entropy of a model that knows how often each token occurs and nothing else.
    """
    share = counts_V[counts_V > 0] / counts_V.sum()
    return float(-np.sum(share * np.log(share)))
