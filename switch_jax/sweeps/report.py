"""Report of a sweep: `summary.json`, `summary.md`, figures, and `index.html`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from switch_jax.analysis import escape_markdown, html_page, markdown_to_html
from switch_jax.checkpoint import QUALITY
from switch_jax.errors import UserError
from switch_jax.files import write_atomically
from switch_jax.model import format_si
from switch_jax.sweeps.figures import draw_figures
from switch_jax.sweeps.results import RunResult, read_result
from switch_jax.sweeps.runner import Job
from switch_jax.sweeps.spec import Sweep
from switch_jax.sweeps.summary import Results, summarise_sweep

Cells = list[list[str]]  # plain text; the first line is the header
Summary = Mapping[str, Any]  # from `summarise_sweep`
SpreadJson = Mapping[str, Any]  # mean, deviation, known, of, values


def write_sweep_report(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Writes the report of a sweep's finished and diverged runs into its folder.

    Returns the files.

    Raises `UserError` for a folder that cannot be written, and without Matplotlib.
    """
    results: dict[str, list[RunResult | None]] = {name: [] for name in sweep.runs}
    for job in jobs:
        result = None
        if job.finished or job.diverged:
            result = read_result(job.workdir, job.step_flops, diverged=job.diverged)
        results[job.name].append(result)
    return write_results_report(sweep, results, folder)


def write_results_report(sweep: Sweep, results: Results, folder: Path) -> list[Path]:
    """Writes the report of these results into `folder`; returns the files.

    Raises `UserError` for a folder that cannot be written, and without Matplotlib.
    """
    summary = summarise_sweep(sweep, results)
    try:
        drawings = draw_figures(sweep, results, summary, folder / "figures")
        markdown = summary_to_markdown(summary, {path.stem for path in drawings})
        contents = {
            "summary.json": json.dumps(summary, indent=1, ensure_ascii=False) + "\n",
            "summary.md": markdown,
            "index.html": html_page(summary["title"], markdown_to_html(markdown, folder), _STYLE),
        }
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); make room for it, and run the same"
            " command again."
        ) from error
    return [*(folder / name for name in contents), *drawings]


def summary_to_markdown(summary: Summary, drawn: set[str]) -> str:
    """Returns the summary as Markdown, with links to the figures.

    Args:
      drawn: names of the tables and figures that have an image.
    """
    parts = [f"# {escape_markdown(summary['title'])}", escape_markdown(_conditions(summary))]
    for name, table in summary["tables"].items():
        parts += [*_heading(table), _markdown_table(table_cells(table))]
        if name not in summary["figures"]:  # a figure of that name has its own section
            parts += _image(name, table["title"], drawn)
    for name, figure in summary["figures"].items():
        parts += _heading(figure)
        if notes := figure_notes(figure):
            parts.append("\n".join(f"- {escape_markdown(note)}" for note in notes))
        parts += _image(name, figure["title"], drawn)
    parts += ["## Runs", _markdown_table(runs_cells(summary))]
    return "\n\n".join(parts) + "\n"


def table_cells(table: Mapping[str, Any]) -> Cells:
    """Returns a table of the summary, without the columns that are empty in all rows."""
    metric = table["metric"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "neg. log perplexity" if metric == QUALITY else metric: lambda r: format_quality(
            r["quality"]
        ),
        "against the first row": lambda r: format_spread(r.get("gain"), 3, sign=True),
        "the paper's": lambda r: r["paper"] or "",
        "share of the gain": lambda r: format_spread(r.get("share_of_gain"), 0, percent=True),
        "compression": lambda r: format_spread(r.get("compression"), 0, percent=True),
        "at equal FLOPs": lambda r: format_spread(r.get("at_equal_flops"), 3),
        "speed-up in steps": lambda r: format_speed_up(r.get("speed_up_steps")),
        "in time": lambda r: format_speed_up(r.get("speed_up_seconds")),
        "parameters": lambda r: "" if r["params"] is None else format_si(r["params"], ""),
        "sequences/s": lambda r: format_spread(r["sequences_per_second"], 0),
        "dropped": lambda r: format_spread(r["dropped"], 1, percent=True),
    }
    rows = table["rows"]
    texts = {name: [cell(row) for row in rows.values()] for name, cell in columns.items()}
    shown = {name: column for name, column in texts.items() if any(column)}
    body = [[label, *(column[n] for column in shown.values())] for n, label in enumerate(rows)]
    return [["", *shown], *body]


def runs_cells(summary: Summary) -> Cells:
    """Returns a table of the size and the cost of every run."""
    header = ["run", "seeds", "parameters", "FLOPs a sequence", "steps", "target tokens"]
    lines = [[*header, "FLOPs in training"]]
    for name, run in summary["runs"].items():
        diverged = sum(seed["diverged"] for seed in run["seeds"].values())
        seeds = f"{len(run['seeds'])} of {len(summary['seeds'])}"
        line = [name, f"{seeds}, {diverged} diverged" if diverged else seeds]
        if run["seeds"]:
            line += [
                f"{run['params']:,}",
                format_si(run["flops_per_sequence"], ""),
                f"{run['steps']:,}",
                format_si(run["tokens"], ""),
                format_si(run["train_flops"], ""),
            ]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    return lines


def figure_notes(figure: Mapping[str, Any]) -> list[str]:
    """Returns the numbers of a figure of the summary in words, a line each."""
    notes = [
        f"{label} against {figure['baseline']}, in {figure['x']}: {format_speed_up(ratios)}"
        for label, ratios in figure.get("speed_up", {}).items()
        if format_speed_up(ratios)
    ]
    if figure.get("sources"):
        improved = format_spread(figure["improved"], 1)
        notes += [
            f"Better in the end: {improved} of {figure['sources']} sources",
            f"Mean speed-up of those that get there: {format_speed_up(figure['speed_up_mean'])}",
            f"At least 4 × as fast: {format_spread(figure['share_at_least_4'], 0, percent=True)}",
        ]
    for label, pairs in figure.get("points", {}).items():
        if pairs:
            points = ", ".join(f"{before:.3f} → {after:.1f}" for before, after in sorted(pairs))
            notes.append(f"{label}, upstream → downstream: {points}")
    for label, law in figure.get("power_laws", {}).items():
        if law is not None:
            low, high = law["exponent_interval"]
            notes.append(
                f"{label}: loss ∝ {figure['x']}^{law['exponent']:.4f}"
                f" (95 % interval {low:.4f} … {high:.4f})"
            )
    return notes


def format_spread(
    spread: SpreadJson | None, digits: int, *, percent: bool = False, sign: bool = False
) -> str:
    """Returns mean ± standard deviation over seeds; empty if no seed has a value."""
    if spread is None or spread["mean"] is None:
        return ""
    scale, unit = (100.0, " %") if percent else (1.0, "")
    plus = "+" if sign else ""
    text = f"{scale * spread['mean']:{plus}.{digits}f}"
    if spread["deviation"] is not None:
        text += f" ± {scale * spread['deviation']:.{digits}f}"
    return text + unit + _seed_count(spread)


def format_quality(spread: SpreadJson) -> str:
    """Returns a final quality over seeds; "diverged" if no finished seed has a value."""
    diverged = spread["of"] and spread["mean"] is None
    return "diverged" if diverged else format_spread(spread, 3)


def format_speed_up(spread: SpreadJson | None) -> str:
    """Returns a speed-up over seeds.

    "not reached" if no seed reaches the baseline's quality, empty if no seed is finished.
    """
    if spread is None or not spread["of"]:
        return ""
    if spread["mean"] is None:
        return "not reached"
    return format_spread({**spread, "known": spread["of"]}, 2) + " ×" + _seed_count(spread)


def _seed_count(spread: SpreadJson) -> str:
    """Returns the number of seeds that have a value, empty if all have one."""
    known, count = spread["known"], spread["of"]
    return "" if known == count else f" ({known} of {count})"


def _conditions(summary: Summary) -> str:
    """Returns a sentence on devices, seeds and units, which hold for all tables and figures."""
    devices = " and ".join(summary["devices"]) or "nothing yet"
    seeds = ", ".join(map(str, summary["seeds"]))
    return (
        f"Trained on {devices}; seeds {seeds} (mean ± standard deviation, differences between runs"
        " of one seed). Times are median train steps, without compilation and evaluation; FLOPs are"
        f" by the convention «{summary['flops_convention']}», in training three times as many and"
        " those of a teacher."
    )


def _heading(section: Mapping[str, Any]) -> list[str]:
    """Returns the title of a table or figure as Markdown, and the paper's claim."""
    title, claim = escape_markdown(section["title"]), escape_markdown(section["claim"])
    return [f"## {title}", f"The paper: {claim}"]


def _image(name: str, title: str, drawn: set[str]) -> list[str]:
    """Returns a Markdown image, or nothing if there is none of that name."""
    if name not in drawn:
        return []
    return [f"![{escape_markdown(title)}](figures/{quote(name)}.png)"]


def _markdown_table(cells: Cells) -> str:
    header, *body = ([escape_markdown(cell) for cell in line] for line in cells)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_STYLE = """\
body { max-width: 72rem; }
p, ul { margin: .5rem 0; }
ul { padding: 0; list-style: none; color: var(--dim); }
li { margin: .5rem 0; }
img { display: block; width: 44rem; margin: 1rem 0; border-radius: .3rem; background: #fff; }
table { margin: 1rem 0; }
thead th { font-weight: normal; }
th, td { padding: .4rem .7rem; text-align: right; }
tbody td { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
td:first-child { font-weight: 600; }
"""
