"""What each expert specialises in: the tokens it takes, the tokens before those, and how much a
token tells about its expert.

Counted are the assignments that the router makes in evaluation, before any is dropped for want
of a slot (ntlb, expert choice: those with a slot, for there routing looks at the room), of real
tokens only; where a token has several experts, each counts. A decoder's tokens are its inputs:
the start token, then the targets one place to the right.

    V vocabulary          N tokens of a batch     E experts    K experts a token may be in
    P pairs of token and expert that occur
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from switch_jax.checkpoint import Workdir, restore_params
from switch_jax.config import STACKS, Config
from switch_jax.data import (
    PAD,
    Batch,
    ProcessRows,
    open_vocabulary,
    read_vocabulary,
    text_file_batches,
)
from switch_jax.distributed import make_mesh, replicated
from switch_jax.errors import UserError
from switch_jax.evaluation import check_vocabulary, validation_batches
from switch_jax.model import MeshJit, ShardedModel, process_rows, token_masks

TOP = 10  # tokens of each kind that are named for an expert
NONE = -1  # in place of a preceding token, where there is none

# Name of a token, from its id.
Names = Callable[[int], str]
_SUBLAYERS = {"mlp": "ff", "self_attention": "attention"}


class RoutedTokens(NamedTuple):
    """The tokens of one stack of a batch, rows one after the other."""

    token_N: np.ndarray
    preceding_N: np.ndarray  # the token before, in the same row and segment; or `NONE`
    real_N: np.ndarray  # bool, false for padding


class TokenExpertPairs(NamedTuple):
    """The pairs that occur in a table of counts, by expert and then by token."""

    token_P: np.ndarray
    expert_P: np.ndarray
    count_P: np.ndarray
    lift_P: np.ndarray  # how many times as often as if experts did not depend on tokens
    nats_P: np.ndarray  # contribution to the mutual information: count / Σ count · log lift


class Counts:
    """What one expert layer did, added up over batches.

    Attributes:
      token_VxE: int32, how often each token went to each expert.
      preceding_VxE: int32, how often each token was the one before.
      gate_E: float64, sums of the gates.
    """

    def __init__(self, vocab_size: int, num_experts: int):
        self.token_VxE = np.zeros((vocab_size, num_experts), np.int32)
        self.preceding_VxE = np.zeros((vocab_size, num_experts), np.int32)
        self.gate_E = np.zeros(num_experts)

    def add(self, tokens: RoutedTokens, expert_NxK: np.ndarray, gate_NxK: np.ndarray) -> None:
        """Counts the assignments of a batch; expert E and above is none."""
        E = len(self.gate_E)
        token, choice = np.nonzero((expert_NxK < E) & tokens.real_N[:, None])
        expert, gate = expert_NxK[token, choice], gate_NxK[token, choice]
        _count(self.token_VxE, tokens.token_N[token], expert)
        before = tokens.preceding_N[token]
        _count(self.preceding_VxE, before[before != NONE], expert[before != NONE])
        self.gate_E += np.bincount(expert, gate, E)


def _count(counts_VxE: np.ndarray, token: np.ndarray, expert: np.ndarray) -> None:
    place = token.astype(np.intp)
    place *= counts_VxE.shape[1]
    place += expert
    # Flat, and in the counts' own type: a tenth of the time of two indices and a plain 1.
    np.add.at(counts_VxE.reshape(-1), place, np.int32(1))


def batch_tokens(batch: Batch) -> dict[str, RoutedTokens]:
    """The tokens that are routed, by stack."""
    result = {}
    for stack, mask_BxL in zip(STACKS, token_masks(batch)):
        token_BxL = batch[f"{stack}_input_tokens"]
        segment_BxL = batch.get(f"{stack}_segment_ids", mask_BxL.astype(np.int32))
        same_BxL = segment_BxL[:, 1:] == segment_BxL[:, :-1]
        before_BxL = np.where(same_BxL & mask_BxL[:, :-1], token_BxL[:, :-1], NONE)
        before_BxL = np.pad(before_BxL, ((0, 0), (1, 0)), constant_values=NONE)
        result[stack] = RoutedTokens(*(x.reshape(-1) for x in (token_BxL, before_BxL, mask_BxL)))
    return result


def count_assignments(
    sharded: ShardedModel, params: Mapping[str, jax.Array], batches: Iterable[Batch]
) -> dict[str, list[Counts]]:
    """The counts of every expert layer, by `Stats` key, at the evaluation capacity.

    A layer's two tables take 8 · V · E bytes, far less than its experts.
    """
    config = sharded.config
    names = [f"{stack}_{name}" for stack in STACKS for name in ("input_tokens", "segment_ids")]

    def run(params, batch):
        _, routes = sharded.model(params).route(
            batch, capacity_factor=config.moe.eval_capacity_factor
        )
        assignments = {
            f"{stack}/{sublayer}": (routed.assignment.expert_SxK, routed.assignment.gate_SxK)
            for stack, of_stack in routes.items()
            for sublayer, routed in of_stack.items()
        }
        # The batch comes back whole: of several processes each has fed a part of it.
        shown = {n: batch[n] for n in (*names, "decoder_loss_weights") if n in batch}
        return shown, assignments

    on_mesh = MeshJit(sharded.mesh, run, out_shardings=replicated(sharded.mesh))
    counts: dict[str, list[Counts]] = {}
    for batch in batches:
        shown, assignments = jax.device_get(on_mesh(params, sharded.shard_batch(batch)))
        tokens = batch_tokens(shown)
        for key, layers in assignments.items():
            stack, _ = key.split("/")
            if key not in counts:
                shape = config.model.vocab_size, config.moe.num_experts
                counts[key] = [Counts(*shape) for _ in config.sparse_layers(stack)]
            for layer, expert_GxSxK, gate_GxSxK in zip(counts[key], *layers):
                K = expert_GxSxK.shape[-1]
                layer.add(tokens[stack], expert_GxSxK.reshape(-1, K), gate_GxSxK.reshape(-1, K))
    return counts


def token_expert_pairs(counts_VxE: np.ndarray) -> TokenExpertPairs:
    """The pairs of a table of counts; the sum of their `nats_P` is the mutual information."""
    expert_P, token_P = np.nonzero(counts_VxE.T)
    count_P = counts_VxE[token_P, expert_P]
    token_V, expert_E = counts_VxE.sum(1, dtype=float), counts_VxE.sum(0, dtype=float)
    total = expert_E.sum()
    lift_P = count_P * total / (token_V[token_P] * expert_E[expert_P])
    return TokenExpertPairs(token_P, expert_P, count_P, lift_P, count_P / total * np.log(lift_P))


def shuffle_information(found: TokenExpertPairs, shape: tuple[int, int]) -> np.ndarray:
    """[V, E] counts after dealing out the same experts to the same tokens at random.

    Its mutual information is what a text of that length shows where there is none: a token that
    occurs once has one expert, whatever the router does.
    """
    token = np.repeat(found.token_P.astype(np.int32), found.count_P)
    expert = np.repeat(found.expert_P.astype(np.int32), found.count_P)
    np.random.default_rng(0).shuffle(expert)
    counts_VxE = np.zeros(shape, np.int32)
    _count(counts_VxE, token, expert)
    return counts_VxE


def describe_experts(counts: Counts, names: Names) -> dict[str, Any]:
    """One expert layer and each of its experts, as JSON values.

    Mutual information and entropy are in nats, of the tokens' experts; `share` of a token is
    among the assignments of the expert, and `lift` as in `Pairs`. Tokens are `characteristic`
    by their contribution to the mutual information. The loads of the layer are in units of a
    fair share, those of the experts shares of 1.
    """
    taken = token_expert_pairs(counts.token_VxE)
    information = _information(taken)
    by_chance = _information(token_expert_pairs(shuffle_information(taken, counts.token_VxE.shape)))
    before = token_expert_pairs(counts.preceding_VxE)
    count_E = counts.token_VxE.sum(0, dtype=np.int64)
    E, load_E = len(count_E), count_E / max(count_E.sum(), 1)
    entropy = float(-np.sum(load_E * np.log(load_E, where=load_E > 0, out=np.zeros(E))))
    with np.errstate(invalid="ignore"):
        gate_E = counts.gate_E / count_E
    experts = []
    for expert in range(E):
        mine, preceding = _of(expert, taken), _of(expert, before)
        experts.append(
            {
                "expert": expert,
                "assignments": int(count_E[expert]),
                "load": float(load_E[expert]),
                "mean_gate": float(gate_E[expert]) if math.isfinite(gate_E[expert]) else None,
                "tokens": _top(mine, mine.count_P, names),
                "characteristic": _top(mine, mine.nats_P, names),
                "preceding": _top(preceding, preceding.count_P, names),
            }
        )
    return {
        "assignments": int(count_E.sum()),
        "mutual_information": information,
        "mutual_information_by_chance": by_chance,
        "expert_entropy": entropy,
        "mutual_information_of_entropy": information / entropy if entropy else None,
        "load_max": float(load_E.max() * E),
        "load_min": float(load_E.min() * E),
        "load_cv": float((load_E * E).std()),
        "idle_experts": int(np.sum(count_E == 0)),
        "experts": experts,
    }


def _information(found: TokenExpertPairs) -> float:
    return max(0.0, float(found.nats_P.sum()))  # rounding may leave a bit less than nothing


def _of(expert: int, found: TokenExpertPairs) -> TokenExpertPairs:
    """The pairs of one expert."""
    first, end = np.searchsorted(found.expert_P, (expert, expert + 1))
    return TokenExpertPairs(*(x[first:end] for x in found))


def _top(found: TokenExpertPairs, value_P: np.ndarray, names: Names) -> list[dict[str, Any]]:
    """The tokens of one expert with the largest values above 0; of equals the smaller id first."""
    total = found.count_P.sum()
    order = np.argsort(-value_P, kind="stable")[:TOP]
    return [
        {
            "token": names(int(found.token_P[i])),
            "id": int(found.token_P[i]),
            "count": int(found.count_P[i]),
            "share": float(found.count_P[i] / total),
            "lift": float(found.lift_P[i]),
        }
        for i in order
        if value_P[i] > 0
    ]


def analyse_experts(
    workdir: Workdir, folder: Path, config: Config, text: Path | None = None
) -> dict[str, Any]:
    """The experts of a checkpoint, as JSON values: what there is to know, and `layers`.

    Args:
      folder: the checkpoint.
      text: a UTF-8 file, read with the run's vocabulary; None: `train.eval_batches` validation
        batches of `config`.

    Raises `UserError`, also for a model without experts.
    """
    if not any(map(config.sparse_layers, STACKS)):
        raise UserError(f"{workdir.path} has no experts; name the WORKDIR of a sparse model.")
    sharded = ShardedModel(config, make_mesh(config))
    names = _names(workdir, config)
    batches = _batches(workdir, config, process_rows(sharded.mesh), text)
    counts = count_assignments(sharded, restore_params(folder, sharded.abstract_params), batches)
    layers = []
    for key, of_key in counts.items():
        stack, sublayer = key.split("/")
        for layer, of_layer in zip(config.sparse_layers(stack), of_key):
            place = {"stack": stack, "layer": layer, "sublayer": _SUBLAYERS[sublayer]}
            layers.append(place | describe_experts(of_layer, names))
    layers.sort(key=lambda x: (STACKS.index(x["stack"]), x["layer"], x["sublayer"]))
    return {
        "checkpoint": str(folder),
        "text": "validation" if text is None else str(text),
        "batches": len(batches),
        "router": config.moe.router,
        "num_experts": config.moe.num_experts,
        "eval_capacity_factor": config.moe.eval_capacity_factor,
        "layers": layers,
    }


def _batches(workdir: Workdir, config: Config, feed: ProcessRows, text: Path | None) -> list[Batch]:
    if text is None:
        check_vocabulary(workdir, config)
        return list(itertools.chain(*validation_batches(config, feed).values()))
    if not workdir.vocabulary.is_file():
        raise UserError(
            f"{workdir.path} has no {workdir.vocabulary.name} to read a text with; leave --input"
            " out."
        )
    return text_file_batches(text, read_vocabulary(workdir.vocabulary), config, feed)


def _names(workdir: Workdir, config: Config) -> Names:
    """How tokens are written; without a vocabulary, as their numbers."""
    if workdir.vocabulary.is_file():
        vocabulary = read_vocabulary(workdir.vocabulary)
    elif config.data.reader != "synthetic":
        vocabulary = open_vocabulary(config)
    else:
        return lambda token: f"#{token}"
    # The id of padding is real in one place, at the start of the decoder's inputs.
    return lambda token: "<start>" if token == PAD else vocabulary.piece(token)
