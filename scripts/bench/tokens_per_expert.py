"""Benchmark of the train step of Switch against dense, by the tokens that an expert gets in a step.

    python scripts/bench/tokens_per_expert.py [--experts 8 32 128] [--rows 1 2 4 8 16 32]

The models are those of docs/benchmarks.md: d_model 256, 4 + 4 layers, every second with experts.
For each number of rows, the steps of all models alternate, so that a drift of the machine's speed
affects all. Prints a table and draws docs/images/tokens_per_expert.png.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from switch_jax.__main__ import keep_freed_memory
from switch_jax.analysis import new_figure
from switch_jax.cli.startup import start_jax
from switch_jax.config import Config, load_config
from switch_jax.distributed import make_mesh
from switch_jax.performance.benchmark import TIMED_PARTS, repeated_call, time_alternating
from switch_jax.training import TrainProgram

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "images" / "tokens_per_expert.png"
SHAPE = {
    "model.d_model": 256,
    "model.d_ff": 1024,
    "model.num_heads": 4,
    "model.head_dim": 64,
    "model.num_encoder_layers": 4,
    "model.num_decoder_layers": 4,
    "model.vocab_size": 8192,
    "moe.group_size": 2**20,  # the whole batch is one group
    "data.inputs_length": 512,
    "data.targets_length": 114,
}
ACCEPTABLE = 1.1  # times the dense model's step
RATIOS = (1, 1.5, 2, 3, 5, 10)  # labels of the axis


class Point(NamedTuple):
    """A sparse model's step at one number of rows.

    tokens: of the encoder for each expert, in the mean.
    ratio: median seconds / those of the dense model.
    """

    tokens: float
    ratio: float


def make_config(experts: int, rows: int, changes: dict[str, Any]) -> Config:
    values = SHAPE | changes | {"data.batch_size": rows}
    spec = f"{ROOT}/configs/switch_mini.py:num_experts={experts}"
    return load_config(spec, {key: str(value) for key, value in values.items()})


def compiled_step(config: Config) -> Callable[[], Any]:
    """Returns a function that trains one step more each time it is called."""
    program = TrainProgram(config, make_mesh(config))
    lower, call_again = TIMED_PARTS["train_step"](config, program)
    return repeated_call(lower().compile(), call_again)


def measure(
    experts: list[int], rows: list[int], repeats: int, changes: dict[str, Any] | None = None
) -> dict[int, list[Point]]:
    """Returns the points of each number of experts; `changes` replace values of `SHAPE`."""
    points: dict[int, list[Point]] = {E: [] for E in experts}
    for number in rows:
        configs = {E: make_config(E, number, changes or {}) for E in [0, *experts]}
        calls = {str(E): compiled_step(config) for E, config in configs.items()}
        timed = time_alternating(calls, repeats)
        seconds = {E: statistics.median(timed[str(E)]) for E in configs}
        for E in experts:
            tokens = number * configs[E].data.inputs_length / E
            points[E].append(Point(tokens, seconds[E] / seconds[0]))
        texts = ", ".join(f"{E}: {1e3 * value:.0f} ms" for E, value in seconds.items())
        print(f"{number} rows, by number of experts: {texts}", flush=True)
    return points


def render(points: dict[int, list[Point]], rows: list[int]) -> str:
    """Returns the ratios as a Markdown table, with the tokens of an expert."""
    lines = ["| | " + " | ".join(f"{number} rows" for number in rows) + " |"]
    lines.append("|---|" + "---|" * len(rows))
    for E, series in points.items():
        cells = (f"{point.ratio:.2f} ({point.tokens:.0f} tokens)" for point in series)
        lines.append(f"| {E} experts | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(points: dict[int, list[Point]], path: Path) -> None:
    figure = new_figure(1, 1, (6.4, 4.2))
    axes = figure.axes[0]
    for E, series in points.items():
        axes.plot(*zip(*series), "o-", label=f"{E} experts")
    axes.axhline(ACCEPTABLE, color="black", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the encoder for each expert")
    axes.set(ylabel=f"train step / dense (dotted: {ACCEPTABLE})")
    axes.set_yticks(RATIOS, [str(ratio) for ratio in RATIOS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    start_jax()
    points = measure(arguments.experts, arguments.rows, arguments.repeats)
    print(render(points, arguments.rows))
    draw(points, FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
