"""Expert specialization: tokens of each expert, preceding tokens, and mutual information.

The counts are of the router's assignments in evaluation, before any is dropped for want of a slot
(ntlb and expert choice, whose routing depends on the capacity: only assignments with a slot). They
are of real tokens only; each of a token's several experts counts. The decoder's tokens are its
inputs: the start token, then the targets shifted right by one.

    V vocabulary          N tokens of a batch     E experts    K experts per token, at the most
    P pairs of token and expert with a count      G groups     S tokens per group
    B rows of a batch     L length of a row
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from switch_jax.checkpoint import Workdir, check_parameters_finite, restore_params
from switch_jax.config import STACKS, Config
from switch_jax.data import (
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

TOP_TOKENS = 10  # tokens of each kind in the report of an expert
NO_TOKEN = -1  # id in place of a preceding token if there is none

TokenNames = Callable[[int], str]  # token id → text
_SUBLAYERS = {"mlp": "ff", "self_attention": "attention"}


class RoutedTokens(NamedTuple):
    """Tokens of one stack of a batch, row after row."""

    token_N: np.ndarray  # int32 ids
    preceding_N: np.ndarray  # int32, the token before in the same row and segment, or `NO_TOKEN`
    real_N: np.ndarray  # bool, false for padding


class TokenExpertPairs(NamedTuple):
    """Pairs with a count above 0, sorted by expert and then by token."""

    token_P: np.ndarray
    expert_P: np.ndarray
    count_P: np.ndarray
    lift_P: np.ndarray  # count / count expected if experts did not depend on tokens
    nats_P: np.ndarray  # contribution to the mutual information: count / Σ count · log lift


class AssignmentCounts:
    """Assignments of one expert layer, summed over batches.

    Attributes:
      token_VxE: int32, assignments of each token to each expert.
      preceding_VxE: int32, assignments to each expert by the token before the assigned one.
      gate_E: float64, sums of the gates.
      routed_tokens: number of tokens.
      confidence, entropy: sums over tokens of the router's largest probability and entropy, nats.
    """

    def __init__(self, vocab_size: int, num_experts: int):
        self.token_VxE = np.zeros((vocab_size, num_experts), np.int32)
        self.preceding_VxE = np.zeros((vocab_size, num_experts), np.int32)
        self.gate_E = np.zeros(num_experts)
        self.routed_tokens = self.confidence = self.entropy = 0.0

    def add(self, tokens: RoutedTokens, expert_NxK: np.ndarray, gate_NxK: np.ndarray) -> None:
        """Adds the assignments of a batch; expert indices of E and above mean no expert."""
        E = len(self.gate_E)
        n, k = np.nonzero((expert_NxK < E) & tokens.real_N[:, None])
        expert, gate = expert_NxK[n, k], gate_NxK[n, k]
        _add_counts(self.token_VxE, tokens.token_N[n], expert)
        preceding = tokens.preceding_N[n]
        exists = preceding != NO_TOKEN
        _add_counts(self.preceding_VxE, preceding[exists], expert[exists])
        self.gate_E += np.bincount(expert, gate, E)

    def add_stats(self, tokens: float, confidence: float, entropy: float) -> None:
        """Adds the number of tokens of a batch, and sums over them as in the attributes."""
        self.routed_tokens += float(tokens)
        self.confidence += float(confidence)
        self.entropy += float(entropy)


def _add_counts(counts_VxE: np.ndarray, token: np.ndarray, expert: np.ndarray) -> None:
    """Adds 1 for every pair of token and expert, in place."""
    index = token.astype(np.intp)
    index *= counts_VxE.shape[1]
    index += expert
    # A flat index and an int32 1 take a tenth of the time of two indices and a Python 1.
    np.add.at(counts_VxE.reshape(-1), index, np.int32(1))


def batch_tokens(batch: Batch, config: Config) -> dict[str, RoutedTokens]:
    """Returns the routed tokens of a batch, by stack."""
    result = {}
    for stack, mask_BxL in zip(STACKS, token_masks(batch, config)):
        token_BxL = batch[f"{stack}_input_tokens"]
        segment_BxL = batch.get(f"{stack}_segment_ids", mask_BxL.astype(np.int32))
        same_BxL = segment_BxL[:, 1:] == segment_BxL[:, :-1]
        preceding_BxL = np.where(same_BxL & mask_BxL[:, :-1], token_BxL[:, :-1], NO_TOKEN)
        preceding_BxL = np.pad(preceding_BxL, ((0, 0), (1, 0)), constant_values=NO_TOKEN)
        arrays = (token_BxL, preceding_BxL, mask_BxL)
        result[stack] = RoutedTokens(*(array.reshape(-1) for array in arrays))
    return result


def count_assignments(
    sharded: ShardedModel, params: Mapping[str, jax.Array], batches: Iterable[Batch]
) -> dict[str, list[AssignmentCounts]]:
    """Returns the counts of every expert layer at the evaluation capacity.

    They are by `STACK/SUBLAYER`, as router statistics are: `encoder/mlp`, `encoder/self_attention`.
    The two tables of a layer take 8 · V · E bytes, far less than its experts.
    """
    config = sharded.config
    features = [f"{stack}_{name}" for stack in STACKS for name in ("input_tokens", "segment_ids")]
    features.append("decoder_loss_weights")

    def route_batch(params, batch):
        _, routes = sharded.model(params).route(
            batch, capacity_factor=config.moe.eval_capacity_factor
        )
        routing = {
            f"{stack}/{sublayer}": (
                (routed.assignment.expert_SxK, routed.assignment.gate_SxK),
                (routed.stats.tokens, routed.stats.confidence, routed.stats.entropy),
            )
            for stack, sublayers in routes.items()
            for sublayer, routed in sublayers.items()
        }
        # Returned because a process has only its own rows of the batch, and counts all rows.
        global_batch = {name: batch[name] for name in features if name in batch}
        return global_batch, routing

    jitted = MeshJit(sharded.mesh, route_batch, out_shardings=replicated(sharded.mesh))
    counts: dict[str, list[AssignmentCounts]] = {}
    for batch in batches:
        global_batch, routing = jax.device_get(jitted(params, sharded.shard_batch(batch)))
        tokens = batch_tokens(global_batch, config)
        for key, (layers, stats) in routing.items():
            stack, _ = key.split("/")
            if key not in counts:
                shape = config.model.vocab_size, config.moe.num_experts
                counts[key] = [AssignmentCounts(*shape) for _ in config.sparse_layers(stack)]
            for layer_counts, expert_GxSxK, gate_GxSxK in zip(counts[key], *layers):
                K = expert_GxSxK.shape[-1]
                expert_NxK, gate_NxK = expert_GxSxK.reshape(-1, K), gate_GxSxK.reshape(-1, K)
                layer_counts.add(tokens[stack], expert_NxK, gate_NxK)
            for layer_counts, *sums in zip(counts[key], *stats):
                layer_counts.add_stats(*sums)
    return counts


def token_expert_pairs(counts_VxE: np.ndarray) -> TokenExpertPairs:
    """Returns the pairs of a table of counts; the sum of `nats_P` is the mutual information."""
    expert_P, token_P = np.nonzero(counts_VxE.T)
    count_P = counts_VxE[token_P, expert_P]
    token_V, expert_E = counts_VxE.sum(1, dtype=float), counts_VxE.sum(0, dtype=float)
    total = expert_E.sum()
    lift_P = count_P * total / (token_V[token_P] * expert_E[expert_P])
    return TokenExpertPairs(token_P, expert_P, count_P, lift_P, count_P / total * np.log(lift_P))


def shuffle_experts(pairs: TokenExpertPairs, shape: tuple[int, int]) -> np.ndarray:
    """Returns [V, E] int32 counts of the same tokens and experts, paired at random.

    Their mutual information is that of a text of this length if experts do not depend on tokens. It
    is above 0: a token that occurs once has one expert, whatever the router does.
    """
    token = np.repeat(pairs.token_P.astype(np.int32), pairs.count_P)
    expert = np.repeat(pairs.expert_P.astype(np.int32), pairs.count_P)
    np.random.default_rng(0).shuffle(expert)
    counts_VxE = np.zeros(shape, np.int32)
    _add_counts(counts_VxE, token, expert)
    return counts_VxE


def describe_experts(counts: AssignmentCounts, names: TokenNames) -> dict[str, Any]:
    """Returns one expert layer and each of its experts, as JSON values.

    Mutual information and entropy are in nats, of the experts of assigned tokens. The `share` of a
    token is its part of the expert's assignments, and `lift` as in `TokenExpertPairs`. Tokens are
    `characteristic` by their contribution to the mutual information. The loads of the layer are in
    units of a fair share; the loads of experts sum to 1. `router_confidence` and `router_entropy`
    are means over tokens; those of a uniform router are `uniform_confidence` and `uniform_entropy`.
    """
    pairs = token_expert_pairs(counts.token_VxE)
    preceding_pairs = token_expert_pairs(counts.preceding_VxE)
    information = _mutual_information(pairs)
    shuffled_VxE = shuffle_experts(pairs, counts.token_VxE.shape)
    by_chance = _mutual_information(token_expert_pairs(shuffled_VxE))
    count_E = counts.token_VxE.sum(0, dtype=np.int64)
    E, load_E = len(count_E), count_E / max(int(count_E.sum()), 1)
    entropy = float(-np.sum(load_E * np.log(load_E, where=load_E > 0, out=np.zeros(E))))
    with np.errstate(invalid="ignore"):
        gate_E = counts.gate_E / count_E
    experts = []
    for expert in range(E):
        tokens, preceding = _pairs_of(expert, pairs), _pairs_of(expert, preceding_pairs)
        experts.append(
            {
                "expert": expert,
                "assignments": int(count_E[expert]),
                "load": float(load_E[expert]),
                "mean_gate": float(gate_E[expert]) if math.isfinite(gate_E[expert]) else None,
                "tokens": _top_tokens(tokens, tokens.count_P, names),
                "characteristic": _top_tokens(tokens, tokens.nats_P, names),
                "preceding": _top_tokens(preceding, preceding.count_P, names),
            }
        )
    return {
        "assignments": int(count_E.sum()),
        "mutual_information": information,
        "mutual_information_by_chance": by_chance,
        "expert_entropy": entropy,
        "mutual_information_of_entropy": information / entropy if entropy else None,
        "router_confidence": counts.confidence / max(counts.routed_tokens, 1),
        "uniform_confidence": 1 / E,
        "router_entropy": counts.entropy / max(counts.routed_tokens, 1),
        "uniform_entropy": math.log(E),
        "load_max": float(load_E.max() * E),
        "load_min": float(load_E.min() * E),
        "load_cv": float((load_E * E).std()),
        "idle_experts": int(np.sum(count_E == 0)),
        "experts": experts,
    }


def _mutual_information(pairs: TokenExpertPairs) -> float:
    return max(0.0, float(pairs.nats_P.sum()))  # rounding may leave a little less than 0


def _pairs_of(expert: int, pairs: TokenExpertPairs) -> TokenExpertPairs:
    """Returns the pairs of one expert."""
    first, end = np.searchsorted(pairs.expert_P, (expert, expert + 1))
    return TokenExpertPairs(*(column[first:end] for column in pairs))


def _top_tokens(
    pairs: TokenExpertPairs, value_P: np.ndarray, names: TokenNames
) -> list[dict[str, Any]]:
    """Returns an expert's tokens with the largest values above 0; ties by the smaller id."""
    total = pairs.count_P.sum()
    order = np.argsort(-value_P, kind="stable")[:TOP_TOKENS]
    return [
        {
            "token": names(int(pairs.token_P[i])),
            "id": int(pairs.token_P[i]),
            "count": int(pairs.count_P[i]),
            "share": float(pairs.count_P[i] / total),
            "lift": float(pairs.lift_P[i]),
        }
        for i in order
        if value_P[i] > 0
    ]


def analyse_experts(
    workdir: Workdir, folder: Path, config: Config, text: Path | None = None
) -> dict[str, Any]:
    """Returns the analysis of a checkpoint's experts as JSON values: its settings, and `layers`.

    Args:
      folder: the checkpoint.
      text: a UTF-8 file, encoded with the run's vocabulary; None: `train.eval_batches` validation
        batches of `config`.

    Raises `UserError` for a model without experts, and for a text or vocabulary that is unusable.
    """
    if not any(map(config.sparse_layers, STACKS)):
        raise UserError(f"{workdir.location} has no experts; name the WORKDIR of a sparse model.")
    sharded = ShardedModel(config, make_mesh(config))
    names = _token_names(workdir, config)
    batches = _batches(workdir, config, process_rows(sharded.mesh), text)
    params = restore_params(folder, sharded.abstract_params)
    check_parameters_finite(params, folder, together=True)
    counts = count_assignments(sharded, params, batches)
    layers = []
    for key, counts_by_layer in counts.items():
        stack, sublayer = key.split("/")
        for layer, layer_counts in zip(config.sparse_layers(stack), counts_by_layer):
            name = {"stack": stack, "layer": layer, "sublayer": _SUBLAYERS[sublayer]}
            layers.append(name | describe_experts(layer_counts, names))
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


def _batches(workdir: Workdir, config: Config, rows: ProcessRows, text: Path | None) -> list[Batch]:
    """Returns this process's rows of the validation batches, or of the batches of a text file."""
    if text is None:
        check_vocabulary(workdir, config)
        return list(itertools.chain(*validation_batches(config, rows).values()))
    if not workdir.vocabulary.is_file():
        raise UserError(
            f"{workdir.location} has no {workdir.vocabulary.name} to read a text with; leave"
            " --input out."
        )
    vocabulary = read_vocabulary(workdir.vocabulary, config.model)
    return text_file_batches(text, vocabulary, config, rows)


def _token_names(workdir: Workdir, config: Config) -> TokenNames:
    """Returns the function from token ids to text; without a vocabulary, `#ID`."""
    if workdir.vocabulary.is_file():
        vocabulary = read_vocabulary(workdir.vocabulary, config.model)
    elif config.data.reader != "synthetic":
        vocabulary = open_vocabulary(config)
    else:
        return lambda token: f"#{token}"
    model = config.model
    # The only real token with the id of padding is the start token of the decoder's inputs.
    return lambda token: (
        "<start>" if token == model.pad_id == model.start_id else vocabulary.piece(token)
    )
