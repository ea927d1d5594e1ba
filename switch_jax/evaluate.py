"""Evaluation: token-weighted sums over batches, divided once at the end."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax import losses, processes, sharding
from switch_jax.checkpoint import restore_params
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.data.batch import Batch, Feed
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.errors import UserError
from switch_jax.schema import Config
from switch_jax.step import Program
from switch_jax.workdir import Workdir


def evaluate(
    program: Program, params: Mapping[str, jax.Array], batches: Iterable[Batch]
) -> dict[str, float]:
    """Metrics over a finite number of batches, without dropout, at the evaluation capacity.

    Every target token counts once, wherever its batch ends. `cross_entropy` is in nats and
    holds neither auxiliary nor z-losses; `neg_log_perplexity` is its negative (the paper's
    measure of quality).
    """
    total = None
    for batch in batches:
        sums = program.eval_step(params, program.put(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("evaluate() needs at least one batch")
    sums, targets, stats = jax.device_get(total)
    metrics = {
        "cross_entropy": sums.cross_entropy / targets,
        "neg_log_perplexity": -sums.cross_entropy / targets,
        "accuracy": sums.correct / targets,
        **losses.router_metrics(stats, program.config),
    }
    return {name: float(value) for name, value in metrics.items()}


def evaluate_checkpoint(workdir: Workdir, folder: Path, config: Config) -> dict[str, float]:
    """Metrics of a checkpoint on `train.eval_batches` validation batches of `config`.

    With `unigram_entropy` of the same targets, to compare with. Raises `UserError`, also where
    the batches are not in the vocabulary that the run was trained with.
    """
    program = Program(config, sharding.make_mesh(config))
    feed = sharding.feed(program.mesh)
    batches = validation_batches(workdir, config, feed)
    params = restore_params(folder, program.abstract_state.params)
    metrics = evaluate(program, params, batches)
    counts_V = processes.total(_token_counts(batches if feed.saves else [], config))
    return metrics | {"unigram_entropy": unigram_entropy(counts_V)}


def validation_batches(workdir: Workdir, config: Config, feed: Feed) -> list[Batch]:
    """This process's rows of `train.eval_batches` validation batches.

    Raises `UserError` where they are not in the vocabulary that the run was trained with.
    """
    if config.data.reader != "synthetic" and workdir.vocabulary.exists():
        text, trained = open_vocabulary(config), Vocabulary(workdir.vocabulary)
        if text.fingerprint != trained.fingerprint:
            raise UserError(
                f"The validation text is in another vocabulary than {workdir.path}; set"
                f" data.vocabulary={workdir.vocabulary}."
            )
    stream = open_batches(config, "validation", feed)
    return list(itertools.islice(stream, config.train.eval_batches))


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
