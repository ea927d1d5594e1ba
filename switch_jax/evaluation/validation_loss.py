"""Validation loss: token-weighted sums over batches, divided once at the end."""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switch_jax.checkpoint import Workdir, check_parameters_finite, restore_params
from switch_jax.config import Config
from switch_jax.data import (
    Batch,
    ProcessRows,
    open_epoch_by_source,
    open_vocabulary,
    read_vocabulary,
)
from switch_jax.distributed import make_mesh, sum_over_processes
from switch_jax.errors import UserError
from switch_jax.evaluation.metric_names import SOURCE_METRICS, TOKEN_METRICS
from switch_jax.evaluation.task_scores import TaskScorer
from switch_jax.model import ShardedModel, process_rows, router_metrics

ValidationBatches = Mapping[str, Sequence[Batch]]
"""Validation batches of each source, by its name."""


def evaluate(
    sharded: ShardedModel, params: Mapping[str, jax.Array], batches: ValidationBatches
) -> dict[str, float]:
    """Computes metrics over all batches, without dropout, at the evaluation capacity factor.

    Every target token has the same weight, whatever its batch. `cross_entropy` is in nats and
    includes neither auxiliary nor z-losses; `neg_log_perplexity` is its negative (the paper's
    measure of quality). With several sources, `<source>/cross_entropy` and
    `<source>/neg_log_perplexity` are those of one source.

    Args:
      sharded: the model on a mesh.
      params: parameters by path.
      batches: from `validation_batches`.
    """
    sums_by_source = {}
    for source, source_batches in batches.items():
        sums = (sharded.eval_step(params, sharded.shard_batch(batch)) for batch in source_batches)
        sums_by_source[source] = jax.device_get(functools.reduce(_add_trees, sums))
    total = functools.reduce(_add_trees, sums_by_source.values())
    metrics = _token_metrics(total) | router_metrics(total[2], sharded.config)
    if len(sums_by_source) > 1:
        for source, sums in sums_by_source.items():
            source_metrics = _token_metrics(sums)
            metrics |= {f"{source}/{name}": source_metrics[name] for name in SOURCE_METRICS}
    return {name: float(value) for name, value in metrics.items()}


def _add_trees(a: Any, b: Any) -> Any:
    return jax.tree.map(operator.add, a, b)


def _token_metrics(eval_step_result: Any) -> dict[str, Any]:
    """Divides the sums of evaluation steps by the number of target tokens."""
    sums, targets, _ = eval_step_result
    loss = sums.cross_entropy / targets
    return dict(zip(TOKEN_METRICS, (loss, -loss, sums.correct / targets)))


def evaluate_checkpoint(workdir: Workdir, folder: Path, config: Config) -> dict[str, float]:
    """Computes metrics of a checkpoint: validation loss and task scores.

    The loss is over the validation batches of `config`, the scores are over its tasks' examples;
    predictions go to WORKDIR/predictions/eval-STEP. `unigram_entropy` of the same targets is
    included, for comparison with `cross_entropy`.

    Args:
      workdir: of the run.
      folder: of the checkpoint.
      config: of the run, or with other data.

    Raises `UserError` where parameters or data cannot be read, and where the data's vocabulary
    differs from the run's.
    """
    check_vocabulary(workdir, config)
    sharded = ShardedModel(config, make_mesh(config))
    rows = process_rows(sharded.mesh)
    batches, task_scorer = validation_batches(config, rows), TaskScorer(sharded)
    task_scorer.check_examples_agree()
    params = restore_params(folder, sharded.abstract_params)
    check_parameters_finite(params, folder, together=True)
    metrics = evaluate(sharded, params, batches)
    # Processes of a group have the same rows.
    counted = itertools.chain(*batches.values()) if rows.first_in_group else []
    counts_V = sum_over_processes(_token_counts(counted, config))
    metrics["unigram_entropy"] = unigram_entropy(counts_V)
    metrics |= task_scorer(params, workdir.predictions / f"eval-{folder.name}")
    if jax.process_index() == 0:
        workdir.upload()
    return metrics


def check_vocabulary(workdir: Workdir, config: Config) -> None:
    """Raises `UserError` if the vocabulary of `config` differs from the run's, or is unknown."""
    if config.data.reader == "synthetic":
        return
    if not workdir.vocabulary.exists():
        if config.data.vocabulary is None:  # a newly trained one would be another
            raise UserError(
                f"{workdir.location} has no vocabulary; set data.vocabulary to the one that the"
                " model was trained with."
            )
        return
    if open_vocabulary(config).fingerprint != read_vocabulary(workdir.vocabulary).fingerprint:
        raise UserError(
            f"The validation text is in another vocabulary than {workdir.location}; set"
            f" data.vocabulary={workdir.vocabulary}."
        )


def validation_batches(config: Config, rows: ProcessRows) -> ValidationBatches:
    """Returns the validation batches of every source, with the rows of this process.

    A source has `train.eval_batches` batches, or fewer if these contain each of its rows once.
    """
    return {
        name: list(itertools.islice(epoch, config.train.eval_batches))
        for name, epoch in open_epoch_by_source(config, "validation", rows).items()
    }


def _token_counts(batches: Iterable[Batch], config: Config) -> np.ndarray:
    """[V] int64: number of occurrences of each token among the targets, sentinels included."""
    counts_V = np.zeros(config.model.vocab_size, np.int64)
    for batch in batches:
        tokens = batch["decoder_target_tokens"][batch["decoder_loss_weights"] > 0]
        counts_V += np.bincount(tokens, minlength=len(counts_V))
    return counts_V


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Returns the entropy, in nats, of the distribution of tokens with counts [V].

    It is the cross-entropy of the best model that ignores all context.
    """
    probs = counts_V[counts_V > 0] / counts_V.sum()
    return float(-np.sum(probs * np.log(probs)))
