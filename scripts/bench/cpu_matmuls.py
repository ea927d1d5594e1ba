"""Benchmark of the matmuls of a train step on a CPU: XLA against PyTorch.

    pip install torch
    python scripts/bench/cpu_matmuls.py [--repeats 9]

The matmuls are those of the model of hugging_face.py, forward and backward, each alone with random
factors in float32. All calls of one library follow each other: after a call, PyTorch's threads wait
for the next one at full load for some milliseconds. The second table has an expert layer's matmuls
by the number of rows of an expert: as one batched product of slots, and in the blocks of dropless
routing. Prints the tables of docs/performance.md.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from switch_jax.__main__ import keep_freed_memory
from switch_jax.cli.startup import start_jax
from switch_jax.model.moe.grouped_matmul import grouped_matmul, make_blocks
from switch_jax.performance.benchmark import time_alternating

ROWS, SOURCE, TARGET, LAYERS = 8, 256, 64, 4
D, F, H, K, V = 256, 1024, 4, 64, 8192  # model, hidden, heads, of a head, vocabulary
TOKENS, CAPACITY_FACTOR = 4096, 1.25  # of the expert layer


class Product(NamedTuple):
    """A product `einsum(equation, left, right)` and how often the forward pass computes it."""

    name: str
    count: int
    equation: str
    left: tuple[int, ...]
    right: tuple[int, ...]

    def gradients(self) -> list["Product"]:
        """Returns the products that the backward pass computes for each factor."""
        factors, result = self.equation.split("->")
        left, right = factors.split(",")
        return [
            self._replace(equation=f"{result},{right}->{left}", left=self.result),
            self._replace(equation=f"{left},{result}->{right}", right=self.result),
        ]

    @property
    def sizes(self) -> dict[str, int]:
        letters = self.equation.split("->")[0].replace(",", "")
        return dict(zip(letters, self.left + self.right))

    @property
    def result(self) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in self.equation.split("->")[1])

    @property
    def flops(self) -> float:
        return 2.0 * math.prod(self.sizes.values())


def dense_products() -> list[Product]:
    """Returns the products of the dense model's forward pass."""
    products = []
    for name, length in (("source", SOURCE), ("target", TARGET)):
        tokens = ROWS * length
        for what, count, inner, outer in (
            # Four of self-attention, and of cross-attention two on each side.
            ("projections", 6, D, H * K),
            ("feed-forward, up", 1, D, F),
            ("feed-forward, down", 1, F, D),
        ):
            shapes = (tokens, inner), (inner, outer)
            products.append(Product(f"{what}, {name}", LAYERS * count, "tx,xy->ty", *shapes))
    for name, queries, keys in (
        ("source", SOURCE, SOURCE),
        ("target", TARGET, TARGET),
        ("across", TARGET, SOURCE),
    ):
        q, k = (ROWS, queries, H, K), (ROWS, keys, H, K)
        scores = (ROWS, H, queries, keys)
        products.append(Product(f"scores, {name}", LAYERS, "bthk,bshk->bhts", q, k))
        products.append(Product(f"values, {name}", LAYERS, "bhts,bshk->bthk", scores, k))
    products.append(Product("logits", 1, "tx,yx->ty", (ROWS * TARGET, D), (V, D)))
    return products


def calls(product: Product) -> dict[str, Callable[[], Any]]:
    """Returns the product's call of each library, on the same random factors."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(s, np.float32) for s in (product.left, product.right))
    compiled = jax.jit(lambda x, y: jnp.einsum(product.equation, x, y))
    ours, theirs = [jnp.asarray(x) for x in (left, right)], [torch.tensor(x) for x in (left, right)]
    return {
        "XLA": lambda: compiled(*ours),
        "PyTorch": lambda: torch.einsum(product.equation, *theirs),
    }


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of a call, once the threads of other calls have gone to sleep."""
    time.sleep(0.05)
    return statistics.median(time_alternating({"": call}, repeats)[""])


def measure(product: Product, repeats: int) -> dict[str, float]:
    """Returns the median seconds of forward and backward pass, by library."""
    total = dict.fromkeys(("XLA", "PyTorch"), 0.0)
    for part in (product, *product.gradients()):
        for library, call in calls(part).items():
            total[library] += product.count * median_seconds(call, repeats)
    return total


def block_seconds(experts: int, rows: int, repeats: int) -> float:
    """Returns the median seconds of a dropless matmul [T, D] → [T, F], forward and backward."""
    rng = np.random.default_rng(0)
    expert_TxK = jnp.asarray(rng.integers(experts, size=(TOKENS, 1)), jnp.int32)
    blocks = make_blocks(expert_TxK, experts, rows)
    shape = blocks.assignment_M.shape
    x_MxD, g_MxF = (jnp.asarray(rng.standard_normal((*shape, n), np.float32)) for n in (D, F))
    w_ExDxF = jnp.asarray(rng.standard_normal((experts, D, F), np.float32))

    @jax.jit
    def run(x_MxD, w_ExDxF, g_MxF):
        def matmul(x_MxD, w_ExDxF):
            return grouped_matmul(x_MxD, w_ExDxF, blocks.expert_N, blocks.num_used)

        y_MxF, gradients = jax.vjp(matmul, x_MxD, w_ExDxF)
        return y_MxF, gradients(g_MxF)

    return median_seconds(lambda: run(x_MxD, w_ExDxF, g_MxF), repeats)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(repeats: int) -> str:
    """Returns the matmuls of a dense train step as a Markdown table."""
    measured = {product: measure(product, repeats) for product in dense_products()}
    rows = [line(p.name, 3 * p.count, 3 * p.count * p.flops, t) for p, t in measured.items()]
    total = {key: sum(t[key] for t in measured.values()) for key in ("XLA", "PyTorch")}
    count = sum(3 * p.count for p in measured)
    rows.append(line("all", count, sum(3 * p.count * p.flops for p in measured), total))
    return table(["matmuls of a step", "number", "XLA", "PyTorch", "times as fast"], rows)


def line(name: str, count: int, flops: float, seconds: dict[str, float]) -> list[str]:
    cells = [f"{1e3 * t:.0f} ms ({flops / t / 1e9:.0f} GFLOP/s)" for t in seconds.values()]
    return [name, str(count), *cells, f"{seconds['PyTorch'] / seconds['XLA']:.2f}"]


def expert_table(experts: list[int], block_rows: list[int], repeats: int) -> str:
    """Returns one matmul of an expert layer, forward and backward, by number of experts."""
    rows = []
    for E in experts:
        slots = math.ceil(TOKENS * CAPACITY_FACTOR / E)
        product = Product("", 1, "enx,exy->eny", (E, slots, D), (E, D, F))
        seconds = measure(product, repeats)
        cells = [f"{1e3 * t:.0f} ms" for t in seconds.values()]
        cells += [f"{1e3 * block_seconds(E, n, repeats):.0f} ms" for n in block_rows]
        weights = 4e-6 * E * D * F
        rows.append([f"{E} experts, {slots} slots each", f"{weights:.0f} MB", *cells])
    header = ["", "weights", "slots, XLA", "slots, PyTorch"]
    return table([*header, *(f"blocks of {n}" for n in block_rows)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    keep_freed_memory()
    start_jax()
    print(step_table(repeats), end="\n\n")
    print(expert_table([1, 8, 32, 128], [8, 32, 64, 128, 256], repeats))
    print(f"\n{torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
