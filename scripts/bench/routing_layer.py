"""Benchmark of routing: each router and dispatch alone, as a share of the expert layer's time.

    python scripts/bench/routing_layer.py [--experts 8 32 128] [--repeats 9] [--json]

The paper's formulation of the same layer, with one-hot tensors and einsums (Figs 15 and 16,
corrected), is timed as well; before timing, both must give the same results and gradients. Forward
and backward passes are compiled ahead and alternate, so that a drift of the machine's speed affects
all cases. Axis letters: `switch_jax/model/moe/expert_selection.py`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.__main__ import keep_freed_memory
from switch_jax.cli.startup import start_jax
from switch_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    expert_capacity,
    rows_per_group,
)
from switch_jax.model import Router, RouterOutput, RoutingSpec, SwitchMlp
from switch_jax.model.layers import gathered_weight
from switch_jax.model.moe.expert_selection import ROUTERS, Assignment, Scores
from switch_jax.model.moe.experts import FeedForwardExperts
from switch_jax.model.moe.router import router_stats
from switch_jax.model.moe.slot_dispatch import LocalDispatcher, SlotIndices

PARTS = {
    "layer": "whole layer, `switch`",
    "experts": "the experts' matmuls",
    "logits": "logits and softmax",
    "statistics": "statistics and balance loss",
    "switch": "router `switch`",
    "top_k": "router `top_k`, k = 2",
    "ntlb": "router `ntlb`, k = 4",
    "batch_prioritized": "router `batch_prioritized`",
    "expert_choice": "router `expert_choice`",
    "hash": "router `hash`, from token ids",
    "dispatch": "dispatch and combine, `switch`",
    "dispatch_top_k": "dispatch and combine, `top_k`",
    "dispatch_expert_choice": "dispatch and combine, `expert_choice`",
    "one_hot_layer": "one-hot: whole layer",
    "one_hot_switch": "one-hot: router `switch`",
    "one_hot_dispatch": "one-hot: dispatch and combine",
}
# What the one-hot formulation is compared with.
OURS = {"one_hot_layer": "layer", "one_hot_switch": "switch", "one_hot_dispatch": "dispatch"}


class Part:
    """A compiled function with its arguments, timed call by call."""

    def __init__(self, function: Callable, *arguments: Any):
        self._arguments = arguments
        self._compiled = jax.jit(function).lower(*arguments).compile()
        self._seconds: list[float] = []

    def once(self) -> Any:
        """Calls the function once more, and returns its results."""
        began = time.perf_counter()
        results = jax.block_until_ready(self._compiled(*self._arguments))
        self._seconds.append(time.perf_counter() - began)
        return results

    def report(self, repeats: int) -> dict[str, float]:
        """Returns the seconds of the last calls."""
        seconds = self._seconds[-repeats:]
        return {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
        }


def both_ways(function: Callable, arguments: tuple, rest: tuple = ()) -> Part:
    """`function(*arguments, *rest)` → (what has gradients, the rest), and its backward pass.

    All of it is a result, the cotangents are random, and nothing is a constant: XLA can leave
    no work out.
    """

    def run(arguments: tuple, rest: tuple, cotangents: Any) -> tuple:
        y, pull_back, others = jax.vjp(lambda *a: function(*a, *rest), *arguments, has_aux=True)
        return y, others, pull_back(cotangents)

    shapes, _ = jax.eval_shape(function, *arguments, *rest)
    rng = np.random.default_rng(1)
    return Part(run, arguments, rest, jax.tree.map(lambda y: normal(rng, *y.shape), shapes))


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))


class Layer:
    """An expert layer and its tokens; the methods are the timed cases, ours and one-hot.

    They return what has gradients, and the rest.
    """

    def __init__(self, config: Config):
        moe, data, D = config.moe, config.data, config.model.d_model
        B, L, E = data.batch_size, data.inputs_length, moe.num_experts
        rows = rows_per_group(moe, B, L)
        G, S = B // rows, rows * L
        self.moe, self.shape, self.rows = moe, (B, L, D), rows
        self.C = C = expert_capacity(moe, S, moe.capacity_factor)
        self.dispatcher = LocalDispatcher(E, C, dropout_rate=0.0)
        rng = np.random.default_rng(0)
        self.mlp = jax.jit(lambda key: SwitchMlp(config, key))(jax.random.key(0))
        self.x_GxSxD = normal(rng, G, S, D)
        self.slots_ExGxCxD = normal(rng, E, G, C, D)
        self.token_GxS = jnp.asarray(
            rng.integers(config.model.vocab_size, size=(G, S), dtype=np.int32)
        )
        self.mask_GxS = jnp.ones((G, S), bool)

    def parts(self) -> dict[str, Part]:
        """Returns all of `PARTS`, compiled."""
        x, slots, mask, mlp = self.x_GxSxD, self.slots_ExGxCxD, self.mask_GxS, self.mlp
        parts = {
            "layer": self.whole_part(),
            "experts": both_ways(run_experts, (mlp.experts, slots)),
            "logits": both_ways(self.logits, (mlp.router.kernel, x)),
            "hash": Part(self.hash, self.token_GxS, mask),
            "one_hot_layer": self.one_hot_whole_part(),
        }
        probs, logits, _ = parts["logits"].once()
        for router in ("switch", "top_k", "ntlb", "batch_prioritized", "expert_choice"):
            parts[router] = both_ways(self.route(router), (probs,), (logits, mask))
            gate, (_, indices), _ = parts[router].once()
            moved = f"dispatch_{router}".removesuffix("_switch")
            if moved in PARTS:
                parts[moved] = both_ways(self.move, (x, slots, gate), (indices,))
        parts["one_hot_switch"] = both_ways(self.one_hot_route, (probs,), (mask,))
        gate, (assignment, one_hot), _ = parts["one_hot_switch"].once()
        parts["one_hot_dispatch"] = both_ways(one_hot_move, (x, slots, gate), (one_hot,))
        parts["statistics"] = both_ways(self.stats, (probs,), (logits, mask, assignment))
        return {name: parts[name] for name in PARTS}

    def whole_part(self) -> Part:
        return both_ways(self.whole, (self.mlp, self.x_GxSxD), (self.token_GxS, self.mask_GxS))

    def one_hot_whole_part(self) -> Part:
        return both_ways(self.one_hot_whole, (self.mlp, self.x_GxSxD), (self.mask_GxS,))

    def whole(self, mlp: SwitchMlp, x_GxSxD, token_GxS, mask_GxS):
        spec = self._spec(token_GxS, mask_GxS)
        y_BxLxD, routing = mlp(x_GxSxD.reshape(self.shape), spec, None)
        return (y_BxLxD.reshape(x_GxSxD.shape), routing.stats.balance_loss), routing.stats

    def one_hot_whole(self, mlp: SwitchMlp, x_GxSxD, mask_GxS):
        """Returns the results of `whole`, computed with one-hot tensors."""
        probs_GxSxE, logits_GxSxE = self.logits(mlp.router.kernel, x_GxSxD)
        gate_GxSxK, (assignment, one_hot_GxSxExC) = self.one_hot_route(probs_GxSxE, mask_GxS)
        balance_loss, stats = self.stats(probs_GxSxE, logits_GxSxE, mask_GxS, assignment)
        slots_ExGxCxD, _ = run_experts(mlp.experts, one_hot_dispatch(x_GxSxD, one_hot_GxSxExC))
        y_GxSxD = one_hot_combine(slots_ExGxCxD, gate_GxSxK, one_hot_GxSxExC)
        return (y_GxSxD, balance_loss), stats

    def logits(self, kernel, x_GxSxD):
        """Returns probabilities, and logits (their only gradient would be that of the z-loss)."""
        logits_GxSxE = jnp.dot(x_GxSxD, gathered_weight(kernel, x_GxSxD.dtype), precision="highest")
        return jax.nn.softmax(logits_GxSxE), logits_GxSxE

    def stats(self, probs_GxSxE, logits_GxSxE, mask_GxS, assignment: Assignment):
        scores = Scores(probs_GxSxE, logits_GxSxE, mask_GxS)
        stats = router_stats(RouterOutput(logits_GxSxE, scores, assignment), self.C)
        return stats.balance_loss, stats

    def route(self, router: str) -> Callable:
        """Returns gates, assignments and indices from probabilities."""
        moe = dataclasses.replace(self.moe, router=router)

        def route(probs_GxSxE, logits_GxSxE, mask_GxS):
            scores = Scores(probs_GxSxE, logits_GxSxE, mask_GxS)
            assignment = jax.vmap(lambda s: ROUTERS[router](s, moe, self.C))(scores)
            return assignment.gate_SxK, (assignment, self._indices(assignment))

        return route

    def one_hot_route(self, probs_GxSxE, mask_GxS):
        """Switch router; the dispatch tensor [G, S, E, C] is 1 where a token has a slot.

        The sum is exclusive; with the inclusive sum of the paper's Fig 15, slot 0 would stay empty.
        """
        E = probs_GxSxE.shape[-1]
        expert_GxS = probs_GxSxE.argmax(-1)
        chosen_GxSxE = jax.nn.one_hot(expert_GxS, E) * mask_GxS[..., None]
        before_GxSxE = jnp.cumsum(chosen_GxSxE, axis=1) - chosen_GxSxE
        slot_GxS = jnp.sum(before_GxSxE * chosen_GxSxE, axis=-1).astype(jnp.int32)
        place_GxSxC = jax.nn.one_hot(slot_GxS, self.C)  # zeros from C on, for dropped tokens
        one_hot_GxSxExC = chosen_GxSxE[..., None] * place_GxSxC[..., None, :]
        gate_GxSxK = probs_GxSxE.max(-1, keepdims=True)
        expert_GxSxK = jnp.where(mask_GxS, expert_GxS, E)[..., None]
        assignment = Assignment(expert_GxSxK, gate_GxSxK, slot_GxS[..., None])
        return gate_GxSxK, (assignment, one_hot_GxSxExC)

    def move(self, x_GxSxD, slots_ExGxCxD, gate_GxSxK, indices: SlotIndices):
        """Dispatch of tokens, and combine of other slots: with the same slots, and without the
        experts between the two, XLA would merge both into one gather.
        """
        return (
            self.dispatcher.dispatch(x_GxSxD, indices),
            self.dispatcher.combine(slots_ExGxCxD, gate_GxSxK, indices),
        ), ()

    def hash(self, token_GxS, mask_GxS):
        """Returns assignments and indices of the hash router, which has no gradients."""
        router = Router(dataclasses.replace(self.moe, router="hash"), 1, jax.random.key(0))
        x_BxLxD = jnp.zeros(self.shape)  # which it does not look at
        spec = self._spec(token_GxS, mask_GxS)
        assignment = router(x_BxLxD, spec, self.C, None).assignment
        return assignment, self._indices(assignment)

    def _spec(self, token_GxS, mask_GxS) -> RoutingSpec:
        B, L, _ = self.shape
        token_BxL, mask_BxL = token_GxS.reshape(B, L), mask_GxS.reshape(B, L)
        return RoutingSpec(token_BxL, mask_BxL, self.rows, self.moe.capacity_factor)

    def _indices(self, assignment: Assignment) -> SlotIndices:
        return self.dispatcher.assign_slots(assignment)[1]


def run_experts(experts: FeedForwardExperts, slots_ExGxCxD):
    def matmul(x_ExGxCxX, stacked, last):
        del last
        return jnp.einsum("EGCX,EXY->EGCY", x_ExGxCxX, gathered_weight(stacked, x_ExGxCxX.dtype))

    (y_ExGxCxD,) = experts(slots_ExGxCxD, matmul, lambda hidden: hidden)
    return y_ExGxCxD, ()


def one_hot_move(x_GxSxD, slots_ExGxCxD, gate_GxSxK, one_hot_GxSxExC):
    there_ExGxCxD = one_hot_dispatch(x_GxSxD, one_hot_GxSxExC)
    return (there_ExGxCxD, one_hot_combine(slots_ExGxCxD, gate_GxSxK, one_hot_GxSxExC)), ()


def one_hot_dispatch(x_GxSxD, one_hot_GxSxExC):
    return jnp.einsum("GSD,GSEC->EGCD", x_GxSxD, one_hot_GxSxExC)


def one_hot_combine(slots_ExGxCxD, gate_GxSxK, one_hot_GxSxExC):
    """Combines with the paper's combine tensor: the dispatch tensor with gates in place of ones."""
    return jnp.einsum("EGCD,GSEC->GSD", slots_ExGxCxD, gate_GxSxK[..., None] * one_hot_GxSxExC)


def make_config(
    num_experts: int, *, d_model: int, d_ff: int, rows: int, length: int, group_size: int
) -> Config:
    """Returns the config of one layer in float32 with capacity factor 1.25."""
    return Config(
        model=ModelConfig(d_model=d_model, d_ff=d_ff, dtype="float32"),
        moe=MoEConfig(num_experts=num_experts, group_size=group_size),
        data=DataConfig(batch_size=rows, inputs_length=length),
    )


def check() -> None:
    """Raises `AssertionError` unless both layers are the same function, on a small problem."""
    layer = Layer(make_config(8, d_model=16, d_ff=32, rows=4, length=32, group_size=64))
    layer.mlp.router.kernel[...] *= 50  # opinions
    layer.mask_GxS = jnp.arange(128).reshape(2, 64) % 7 > 0
    ours, theirs = layer.whole_part().once(), layer.one_hot_whole_part().once()
    (_, stats, _) = ours
    assert stats.dropped > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def measure(experts: list[int], repeats: int, **shape: int) -> dict[str, Any]:
    """Returns seconds (median, min, max) of all parts for each number of experts.

    `share` is of our whole layer's time; `ratio`, of the one-hot parts, to the same part of ours.
    """
    check()
    parts = {E: Layer(make_config(E, **shape)).parts() for E in experts}
    for _ in range(repeats + 1):
        for E in experts:
            for part in parts[E].values():
                part.once()
    result: dict[str, Any] = {
        "device_kind": jax.devices()[0].device_kind,
        "repeats": repeats,
        "shape": shape,
        "experts": {},
    }
    for E in experts:
        reports: dict[str, dict[str, float]] = {n: p.report(repeats) for n, p in parts[E].items()}
        for report in reports.values():
            report["share"] = report["seconds"] / reports["layer"]["seconds"]
        for name, ours in OURS.items():
            reports[name]["ratio"] = reports[name]["seconds"] / reports[ours]["seconds"]
        result["experts"][str(E)] = reports
    return result


def render(result: dict[str, Any]) -> str:
    """Returns the figures of `measure` as a Markdown table."""
    columns = result["experts"]
    lines = [
        "| | " + " | ".join(f"{E} experts" for E in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, label in PARTS.items():
        cells = []
        for reports in columns.values():
            r = reports[name]
            low, mid, high = (1e3 * r[k] for k in ("seconds_min", "seconds", "seconds_max"))
            ratio = f", × {r['ratio']:.1f}" if "ratio" in r else ""
            cells.append(f"{mid:.1f} ms ({low:.1f} – {high:.1f}), {r['share']:.1%}{ratio}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--d_ff", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--group_size", type=int, default=8192, help="tokens, at the most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    keep_freed_memory()
    start_jax()
    result = measure(**arguments)
    print(json.dumps(result) if as_json else render(result))


if __name__ == "__main__":
    main()
