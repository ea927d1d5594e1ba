"""Evaluation: token-weighted sums over batches, divided once at the end."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax import losses, sharding
from switch_jax.checkpoint import restore_params
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.data.batch import Batch
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
    batches = validation_batches(workdir, config)
    params = restore_params(folder, program.abstract_state.params)
    metrics = evaluate(program, params, batches)
    return metrics | {"unigram_entropy": unigram_entropy(batches)}


def validation_batches(workdir: Workdir, config: Config) -> list[Batch]:
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
    stream = open_batches(config, "validation", jax.process_index(), jax.process_count())
    return list(itertools.islice(stream, config.train.eval_batches))


def unigram_entropy(batches: Iterable[Batch]) -> float:
    """Entropy, in nats, of the target tokens of the batches, sentinels included.

    The cross-entropy of a model that knows how often each token occurs and nothing else.
    """
    tokens = [
        batch["decoder_target_tokens"][batch["decoder_loss_weights"] > 0] for batch in batches
    ]
    _, counts = np.unique(np.concatenate(tokens), return_counts=True)
    share = counts / counts.sum()
    return float(-np.sum(share * np.log(share)))
