"""Redoes the paper's Tables 1, 2, 3, 10 and 11 at mini scale, and writes them to docs/routing.md.

    python scripts/routing_tables.py [--runs runs/routing]

Every row is a smaller `configs/switch_mini.py` with a few keys changed, and is trained
with three seeds. A run that is finished is not trained again, one that was interrupted continues,
and rows that tables share are trained once. About 50 minutes on two CPU cores.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import time
from pathlib import Path

from switch_jax import backend, config
from switch_jax.bench import alternate, train_step_case
from switch_jax.plots import new_figure
from switch_jax.report import read_metrics
from switch_jax.sharding import make_mesh
from switch_jax.step import Program
from switch_jax.train import train
from switch_jax.workdir import Workdir

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "routing.md"
FIGURE = ROOT / "docs" / "images" / "routing_tables.png"
SEEDS = (0, 1, 2)
STEPS = 150

Overrides = dict[str, str]

BASE: Overrides = {
    "model.d_model": "64",
    "model.d_ff": "256",
    "model.head_dim": "16",
    "model.num_encoder_layers": "2",
    "model.num_decoder_layers": "2",
    "optimizer.warmup_steps": "60",
    "optimizer.cooldown_steps": "60",
    "train.steps": str(STEPS),
    "train.log_every": "10",
    "train.eval_every": "20",
    "train.eval_batches": "8",
    "train.checkpoint_every": str(STEPS),
    "train.keep_checkpoints": "1",
}
DENSE = {"moe.num_experts": "0"}
# Mesh TensorFlow's top-2, the paper's baseline.
MOE = {
    "moe.router": "top_k",
    "moe.top_k": "2",
    "moe.renormalize": "True",
    "moe.second_policy": "random",
    "moe.capacity_rounding": "floor",
}
LARGE = {"model.d_model": "128", "model.d_ff": "512", "model.num_heads": "8"}
PLUS = {"model.d_model": "75", "model.num_heads": "5"}  # 768 → 896, 12 → 14 heads in the paper
BFLOAT16 = {"model.dtype": "bfloat16"}
SWITCH: Overrides = {}


def capacity(factor: float) -> Overrides:
    return {"moe.capacity_factor": str(factor)}


@dataclasses.dataclass(frozen=True)
class Table:
    """One of the paper's tables: its rows' overrides, and its own figures to compare with."""

    number: int
    title: str
    rows: dict[str, Overrides]
    paper: dict[str, str]  # neg. log perplexity, as printed
    finding: str  # the paper's


TABLES = (
    Table(
        1,
        "Switch, mixture of two experts, and dense",
        {
            "T5-Base": DENSE,
            "T5-Large": DENSE | LARGE,
            "MoE-Base, CF 2.0": MOE | capacity(2.0),
            "Switch-Base, CF 2.0": capacity(2.0),
            "MoE-Base, CF 1.25": MOE | capacity(1.25),
            "Switch-Base, CF 1.25": SWITCH,
            "MoE-Base, CF 1.0": MOE | capacity(1.0),
            "Switch-Base, CF 1.0": capacity(1.0),
            "Switch-Base+, CF 1.0": PLUS | capacity(1.0),
        },
        {
            "T5-Base": "-1.731",
            "T5-Large": "-1.550",
            "MoE-Base, CF 2.0": "-1.547",
            "Switch-Base, CF 2.0": "-1.554",
            "MoE-Base, CF 1.25": "-1.559",
            "Switch-Base, CF 1.25": "-1.553",
            "MoE-Base, CF 1.0": "-1.572",
            "Switch-Base, CF 1.0": "-1.561",
            "Switch-Base+, CF 1.0": "-1.534",
        },
        "Switch is faster than MoE at equal quality, and better at low capacity factors.",
    ),
    Table(
        2,
        "Precision",
        {
            "float32": SWITCH,
            "bfloat16": BFLOAT16 | {"moe.router_dtype": "bfloat16"},
            "selective (bfloat16, router float32)": BFLOAT16,
        },
        {
            "float32": "-1.718",
            "bfloat16": "-3.780 (diverged)",
            "selective (bfloat16, router float32)": "-1.716",
        },
        "All bfloat16 diverges; selective precision is as good as float32 and as fast as bfloat16.",
    ),
    Table(
        3,
        "Scale of the initial weights",
        {"0.1": SWITCH, "1.0": {"model.init_scale": "1.0"}},
        {"0.1": "-2.72 ± 0.01", "1.0": "-3.60 ± 0.68"},
        "The smaller scale is better, and seeds differ less.",
    ),
    Table(
        10,
        "Experts in self-attention",
        {
            "Experts FF, float32": SWITCH,
            "Expert attention, float32": {"moe.sublayer": "attention"},
            "Expert attention, bfloat16": {"moe.sublayer": "attention"} | BFLOAT16,
            "Experts FF + attention, float32": {"moe.sublayer": "both"},
            "Experts FF + attention, bfloat16": {"moe.sublayer": "both"} | BFLOAT16,
        },
        {
            "Experts FF, float32": "-1.548",
            "Expert attention, float32": "-1.524",
            "Expert attention, bfloat16": "diverges",
            "Experts FF + attention, float32": "-1.513",
            "Experts FF + attention, bfloat16": "diverges",
        },
        "Experts in attention help a step's quality, cost speed, and diverge in bfloat16.",
    ),
    Table(
        11,
        "Exploration",
        {
            "Argmax": SWITCH,
            "Sample softmax": {"moe.sampling_temperature": "1.0"},
            "Input dropout": {"moe.input_dropout_rate": "0.1"},
            "Input jitter": {"moe.jitter": "0.01"},
        },
        {
            "Argmax": "-1.471",
            "Sample softmax": "-1.570",
            "Input dropout": "-1.480",
            "Input jitter": "-1.468",
        },
        "Input jitter is best by a little, sampling from the softmax clearly worst.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run came to."""

    quality: float  # final validation neg. log perplexity, nats
    curve: tuple[tuple[int, float], ...]  # the same by step
    dropped: float | None  # mean fraction over the last readings


def load(overrides: Overrides, seed: int) -> config.Config:
    seeds = {"train.seed": str(seed), "data.seed": str(seed)}
    return config.load(str(ROOT / "configs" / "switch_mini.py"), BASE | overrides | seeds)


def name_of(overrides: Overrides) -> str:
    """The name of what is trained, so that equal rows are one run and others never are."""
    text = json.dumps(config.to_dict(load(overrides, SEEDS[0])), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(workdir: Workdir, overrides: Overrides, seed: int) -> Run:
    """Trains a run where it is not finished, and reads what it came to."""
    lines = read_metrics(workdir)
    if not lines or lines[-1]["step"] < STEPS or lines[-1]["split"] != "eval":
        train(load(overrides, seed), workdir)
        lines = read_metrics(workdir)
    steps = [line for line in lines if line["split"] == "train"]
    evals = [line for line in lines if line["split"] == "eval"]
    # A loss that is not finite is null in the file.
    curve = tuple((e["step"], e["neg_log_perplexity"] or -math.inf) for e in evals)
    drops = [line["router/dropped_fraction"] for line in steps[-4:] if "router/z" in line]
    return Run(curve[-1][1], curve, statistics.mean(drops) if drops else None)


def measure_steps(path: Path) -> dict[str, float]:
    """Median seconds of a train step by `name_of`: all rows in one process, taking turns.

    What training itself took would hold the machine's moods. Kept in `path`, all rows or none;
    remove it to measure anew.
    """
    rows = {name_of(o): o for table in TABLES for o in table.rows.values()}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.keys() == rows.keys():
            return kept
    cases = {}
    for number, (name, overrides) in enumerate(rows.items(), 1):
        print(f"compiling train step {number} of {len(rows)} to time it", flush=True)
        resolved = load(overrides, SEEDS[0])
        cases[name] = train_step_case(resolved, Program(resolved, make_mesh(resolved)))
    seconds = {name: statistics.median(times) for name, times in alternate(cases, 10).items()}
    path.write_text(json.dumps(seconds))
    return seconds


def seconds_to(run: Run, quality: float, step_seconds: float) -> float | None:
    """Time of the train steps until the validation reaches a quality."""
    step = next((step for step, value in run.curve if value >= quality), None)
    return None if step is None else step * step_seconds


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def render(table: Table, results: dict[str, list[Run]], step_seconds: dict[str, float]) -> str:
    """A table in Markdown. Runs are compared with the first row's of the same seed."""
    first = results[next(iter(table.rows))]
    columns = ["", "neg. log perplexity", "against the first row", "paper's", "time to the first's"]
    columns += ["sequences/s"]
    lines = [f"### Table {table.number}: {table.title}", "", f"The paper: {table.finding}", ""]
    lines += [f"| {' | '.join([*columns, 'dropped'])} |", "|---|" + "---|" * len(columns)]
    for row, runs in results.items():
        seconds = step_seconds[name_of(table.rows[row])]
        times = [seconds_to(run, one.quality, seconds) for run, one in zip(runs, first)]
        reached = [t for t in times if t is not None]
        dropped = [run.dropped for run in runs if run.dropped is not None]
        cells = [
            row,
            spread([run.quality for run in runs], 3),
            spread([run.quality - one.quality for run, one in zip(runs, first)], 3)
            if runs is not first
            else "",
            table.paper[row],
            f"{statistics.mean(reached):.1f} s"
            + ("" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)})")
            if reached
            else "not reached",
            f"{load(table.rows[row], SEEDS[0]).data.batch_size / seconds:.0f}",
            f"{statistics.mean(dropped):.1%}" if dropped else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[int, dict[str, list[Run]]]) -> None:
    """Every run as a dot, by table and row; the bar is the mean."""
    heights = [len(rows) + 1 for rows in results.values()]
    size = (8, 0.35 * sum(heights) + 1)
    figure = new_figure(len(results), 1, size, height_ratios=heights)
    for axes, table in zip(figure.axes, TABLES):
        rows = results[table.number]
        for y, runs in enumerate(rows.values()):
            qualities = [run.quality for run in runs]
            axes.plot(qualities, [y] * len(runs), "o", ms=4, color=f"C{y}")
            axes.plot([statistics.mean(qualities)], [y], "|", ms=14, color=f"C{y}")
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_title(f"Table {table.number}: {table.title}", fontsize=9, loc="left")
    figure.axes[-1].set_xlabel("validation neg. log perplexity (nats; right is better)")
    figure.savefig(FIGURE, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/routing"), help="where runs lie")
    arguments = parser.parse_args()
    backend.start()
    # Seed by seed: a first look at every table comes after a third of the time.
    jobs = {
        (name_of(overrides), seed): (overrides, f"table {table.number}, {row}, seed {seed}")
        for seed in SEEDS
        for table in TABLES
        for row, overrides in table.rows.items()
    }
    done: dict[tuple[str, int], Run] = {}
    for number, ((name, seed), (overrides, what)) in enumerate(jobs.items(), 1):
        began = time.time()
        print(f"run {number} of {len(jobs)}: {what}", flush=True)
        done[name, seed] = make(Workdir(arguments.runs / f"{name}-{seed}"), overrides, seed)
        print(f"  {done[name, seed].quality:.3f} after {time.time() - began:.0f} s", flush=True)
    step_seconds = measure_steps(arguments.runs / "step_seconds.json")
    results = {
        table.number: {
            row: [done[name_of(overrides), seed] for seed in SEEDS]
            for row, overrides in table.rows.items()
        }
        for table in TABLES
    }
    text = "\n\n".join(render(table, results[table.number], step_seconds) for table in TABLES)
    before, begin, rest = DOCUMENT.read_text().partition("<!-- tables -->\n")
    _, end, after = rest.partition("<!-- end of tables -->")
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT} has no place for tables between <!-- tables --> marks.")
    DOCUMENT.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")
    draw(results)
    print(f"{DOCUMENT} and {FIGURE} are written")


if __name__ == "__main__":
    main()
