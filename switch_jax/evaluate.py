"""Evaluation: token-weighted sums over batches, divided once at the end."""

import difflib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switch_jax import losses, processes, sharding
from switch_jax.checkpoint import restore_params
from switch_jax.data import open_each, open_vocabulary
from switch_jax.data.batch import Batch, Feed
from switch_jax.data.vocabulary import read
from switch_jax.errors import UserError
from switch_jax.predict import Scorer
from switch_jax.schema import Config
from switch_jax.step import Program
from switch_jax.workdir import Workdir

Validation = Mapping[str, Sequence[Batch]]  # by source

_OF_SOURCES = ("cross_entropy", "neg_log_perplexity")
_OF_ALL = (*_OF_SOURCES, "accuracy")  # of tokens; a task's own is of answers


def evaluate(
    program: Program, params: Mapping[str, jax.Array], batches: Validation
) -> dict[str, float]:
    """Metrics over finite numbers of batches, without dropout, at the evaluation capacity.

    Every target token counts once, wherever its batch ends. `cross_entropy` is in nats and
    holds neither auxiliary nor z-losses; `neg_log_perplexity` is its negative (the paper's
    measure of quality). Of several sources, each has its own as well, `<source>/cross_entropy`
    and so on.
    """
    sums = {}
    for source, of_source in batches.items():
        steps = (program.eval_step(params, program.put(batch)) for batch in of_source)
        sums[source] = jax.device_get(functools.reduce(_add, steps))
    total = functools.reduce(_add, sums.values())
    metrics = _quality(total) | losses.router_metrics(total[2], program.config)
    if len(sums) > 1:
        for source, of_source in sums.items():
            quality = _quality(of_source)
            metrics |= {f"{source}/{name}": quality[name] for name in _OF_SOURCES}
    return {name: float(value) for name, value in metrics.items()}


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(operator.add, a, b)


def _quality(result: Any) -> dict[str, Any]:
    sums, targets, _ = result
    loss = sums.cross_entropy / targets
    return dict(zip(_OF_ALL, (loss, -loss, sums.correct / targets)))


def goodness(
    metric: str, batches: Validation, scores: Sequence[str]
) -> Callable[[Mapping[str, float]], float]:
    """What is the higher the better an evaluation is by one of its metrics.

    Args:
      scores: names of metrics that `evaluate` does not give.

    Raises `UserError` where no metric has that name.
    """
    sources = batches if len(batches) > 1 else ()
    of_sources = (f"{source}/{name}" for source in sources for name in _OF_SOURCES)
    known = [*_OF_ALL, *of_sources, *scores]
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
        raise UserError(f"There is no metric {metric!r} for train.keep_best; {hint}")
    sign = -1 if metric.endswith(("cross_entropy", "invalid")) else 1
    return lambda metrics: sign * metrics.get(metric, -sign * math.inf)


def evaluate_checkpoint(workdir: Workdir, folder: Path, config: Config) -> dict[str, float]:
    """Metrics of a checkpoint on validation batches of `config`, and of its tasks' examples.

    With `unigram_entropy` of the same targets, to compare with. Raises `UserError`, also where
    the batches are not in the vocabulary that the run was trained with.
    """
    check_vocabulary(workdir, config)
    program = Program(config, sharding.make_mesh(config))
    feed = sharding.feed(program.mesh)
    batches, score = validation_batches(config, feed), Scorer(program, workdir)
    params = restore_params(folder, program.abstract_state.params)
    metrics = evaluate(program, params, batches)
    mine = itertools.chain(*batches.values()) if feed.saves else []
    counts_V = processes.total(_token_counts(mine, config))
    metrics["unigram_entropy"] = unigram_entropy(counts_V)
    return metrics | score(params, int(folder.name))


def check_vocabulary(workdir: Workdir, config: Config) -> None:
    """Raises `UserError` where a config's text is not in the vocabulary of a run."""
    if config.data.reader == "synthetic" or not workdir.vocabulary.exists():
        return
    if open_vocabulary(config).fingerprint != read(workdir.vocabulary).fingerprint:
        raise UserError(
            f"The validation text is in another vocabulary than {workdir.path}; set"
            f" data.vocabulary={workdir.vocabulary}."
        )


def validation_batches(config: Config, feed: Feed) -> Validation:
    """This process's rows of `train.eval_batches` validation batches of every source."""
    streams = open_each(config, "validation", feed)
    count = config.train.eval_batches
    return {name: list(itertools.islice(stream, count)) for name, stream in streams.items()}


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
