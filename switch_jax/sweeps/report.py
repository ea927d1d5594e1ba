"""A sweep's results for people: `summary.json`, `summary.md`, figures, and `index.html`."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switch_jax.checkpoint import QUALITY
from switch_jax.errors import UserError
from switch_jax.files import write_atomically
from switch_jax.model import format_si
from switch_jax.sweeps.figures import draw_figures
from switch_jax.sweeps.results import RunResult, read_result
from switch_jax.sweeps.runner import Job
from switch_jax.sweeps.spec import Sweep
from switch_jax.sweeps.summary import Results, summarise

Cells = list[list[str]]  # the first line is the header
Summary = Mapping[str, Any]  # as from `summary.summarise`


def write_report(made: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Writes what the finished runs of a sweep show into its folder; returns the files.

    Raises `UserError` for a folder that cannot be written, and without Matplotlib.
    """
    results: dict[str, list[RunResult | None]] = {name: [] for name in made.runs}
    for job in jobs:
        found = read_result(job.workdir, job.step_flops) if job.finished else None
        results[job.name].append(found)
    return write_results(made, results, folder)


def write_results(made: Sweep, results: Results, folder: Path) -> list[Path]:
    """The same of results that are read."""
    numbers = summarise(made, results)
    try:
        drawn = draw_figures(made, results, numbers, folder / "figures")
        contents = {
            "summary.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
            "summary.md": render_markdown(numbers, drawn),
            "index.html": render_page(numbers, drawn),
        }
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); make room for it, and run the same"
            " command again."
        ) from error
    return [*(folder / name for name in contents), *drawn]


def render_markdown(numbers: Summary, drawn: Sequence[Path]) -> str:
    """The summary as Markdown, with links to the figures."""
    parts = [f"# {numbers['title']}", _facts(numbers)]
    for place, table in numbers["tables"].items():
        parts += [f"## {table['title']}", f"The paper: {table['claim']}", _markdown(cells(table))]
        parts += [f"![{table['title']}](figures/{place}.png)"] * _is_drawn(place, numbers, drawn)
    for place, figure in numbers["figures"].items():
        parts += [f"## {figure['title']}", f"The paper: {figure['claim']}"]
        if lines := notes(figure):
            parts.append("\n".join(f"- {line}" for line in lines))
        parts += [f"![{figure['title']}](figures/{place}.png)"] * _has_file(place, drawn)
    parts += ["## Runs", _markdown(run_cells(numbers))]
    return "\n\n".join(parts) + "\n"


def render_page(numbers: Summary, drawn: Sequence[Path]) -> str:
    """The summary as one HTML file that needs no other."""
    parts = [f"<h1>{_html(numbers['title'])}</h1>", f"<p>{_html(_facts(numbers))}"]
    pictures = {path.stem: path for path in drawn if path.suffix == ".png"}
    for place, table in numbers["tables"].items():
        parts += [f"<h2>{_html(table['title'])}</h2>", f"<p>The paper: {_html(table['claim'])}"]
        parts.append(_html_table(cells(table)))
        if _is_drawn(place, numbers, drawn):
            parts.append(_picture(pictures[place], table["title"]))
    for place, figure in numbers["figures"].items():
        parts += [f"<h2>{_html(figure['title'])}</h2>", f"<p>The paper: {_html(figure['claim'])}"]
        parts += [f"<p>{_html(line)}" for line in notes(figure)]
        if place in pictures:
            parts.append(_picture(pictures[place], figure["title"]))
    parts += ["<h2>Runs</h2>", _html_table(run_cells(numbers))]
    return _HEAD.format(title=_html(numbers["title"])) + "\n".join(parts) + "\n</html>\n"


def cells(table: Mapping[str, Any]) -> Cells:
    """A table of the summary; columns in which no row has anything are left out."""
    metric = table["metric"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "neg. log perplexity" if metric == QUALITY else metric: lambda r: quality(r["quality"]),
        "against the first row": lambda r: spread(r.get("gain"), 3, sign=True),
        "the paper's": lambda r: r["paper"] or "",
        "share of the gain": lambda r: spread(r.get("share_of_gain"), 0, percent=True),
        "compression": lambda r: spread(r.get("compression"), 0, percent=True),
        "at equal FLOPs": lambda r: spread(r.get("at_equal_flops"), 3),
        "speed-up in steps": lambda r: times(r.get("speed_up_steps")),
        "in time": lambda r: times(r.get("speed_up_seconds")),
        "parameters": lambda r: "" if r["params"] is None else format_si(r["params"], ""),
        "sequences/s": lambda r: spread(r["sequences_per_second"], 0),
        "dropped": lambda r: spread(r["dropped"], 1, percent=True),
    }
    rows = table["rows"]
    shown = {
        name: [cell(row) for row in rows.values()]
        for name, cell in columns.items()
        if any(cell(row) for row in rows.values())
    }
    body = [[label, *(shown[name][n] for name in shown)] for n, label in enumerate(rows)]
    return [["", *shown], *body]


def run_cells(numbers: Summary) -> Cells:
    """What every run took: the iso-FLOP table of a sweep."""
    header = ["run", "seeds", "parameters", "FLOPs a sequence", "steps", "target tokens"]
    lines = [[*header, "FLOPs in training"]]
    for name, run in numbers["runs"].items():
        line = [name, f"{len(run['seeds'])} of {len(numbers['seeds'])}"]
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


def notes(figure: Mapping[str, Any]) -> list[str]:
    """What a figure says in numbers, a line each."""
    lines = [
        f"{label} against {figure['baseline']}, in {figure['x']}: {times(found)}"
        for label, found in figure.get("speed_up", {}).items()
        if times(found)
    ]
    if figure.get("sources"):
        lines += [
            f"Better in the end: {spread(figure['improved'], 1)} of {figure['sources']} sources",
            f"Mean speed-up of those that get there: {times(figure['speed_up_mean'])}",
            f"At least 4 × as fast: {spread(figure['share_at_least_4'], 0, percent=True)}",
        ]
    for label, pairs in figure.get("points", {}).items():
        if pairs:
            shown = ", ".join(f"{before:.3f} → {after:.1f}" for before, after in sorted(pairs))
            lines.append(f"{label}, upstream → downstream: {shown}")
    for label, law in figure.get("power_laws", {}).items():
        if law is not None:
            low, high = law["exponent_interval"]
            lines.append(
                f"{label}: loss ∝ {figure['x']}^{law['exponent']:.4f}"
                f" (95 % interval {low:.4f} … {high:.4f})"
            )
    return lines


def spread(
    found: Mapping[str, Any] | None, digits: int, *, percent: bool = False, sign: bool = False
) -> str:
    """A figure over seeds, as mean ± standard deviation; empty where there is none."""
    if found is None or found["mean"] is None:
        return ""
    scale, unit = (100.0, " %") if percent else (1.0, "")
    plus = "+" if sign else ""
    text = f"{scale * found['mean']:{plus}.{digits}f}"
    if found["deviation"] is not None:
        text += f" ± {scale * found['deviation']:.{digits}f}"
    return text + unit + _missing(found)


def quality(found: Mapping[str, Any]) -> str:
    """A final quality over seeds, "diverged" where no seed has one."""
    return "diverged" if found["of"] and found["mean"] is None else spread(found, 3)


def times(found: Mapping[str, Any] | None) -> str:
    """A speed-up over seeds; "not reached" where no seed gets there, empty where none was run."""
    if found is None or not found["of"]:
        return ""
    if found["mean"] is None:
        return "not reached"
    return spread({**found, "known": found["of"]}, 2) + " ×" + _missing(found)


def _missing(found: Mapping[str, Any]) -> str:
    return "" if found["known"] == found["of"] else f" ({found['known']} of {found['of']})"


def _facts(numbers: Summary) -> str:
    """What all figures have in common."""
    on = " and ".join(numbers["devices"]) or "nothing yet"
    seeds = ", ".join(map(str, numbers["seeds"]))
    return (
        f"Trained on {on}; seeds {seeds} (mean ± standard deviation, differences between runs of"
        " one seed). Times are median train steps, without compilation and evaluation; FLOPs are"
        f" by the convention «{numbers['flops_convention']}», in training three times as many and"
        " those of a teacher."
    )


def _is_drawn(place: str, numbers: Summary, drawn: Sequence[Path]) -> bool:
    """Whether a table has a drawing that is not a figure's."""
    return place not in numbers["figures"] and _has_file(place, drawn)


def _has_file(place: str, drawn: Sequence[Path]) -> bool:
    return any(path.stem == place for path in drawn)


def _markdown(lines: Cells) -> str:
    header, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def _html(text: str) -> str:
    return html.escape(text)


def _html_table(lines: Cells) -> str:
    header, *body = ([_html(cell) for cell in line] for line in lines)
    head = "<table><thead><tr><th>" + "<th>".join(header) + "<tbody>"
    return "\n".join([head, *("<tr><th>" + "<td>".join(line) for line in body), "</table>"])


def _picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{_html(text)}">'


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{
  margin: 2rem auto; max-width: 72rem; padding: 0 1.5rem;
  background: #fff; color: #24292f; font: 15px/1.5 system-ui, sans-serif;
}}
h1 {{ font-size: 1.6rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .5rem; }}
p {{ max-width: 48rem; color: #656d76; margin: .5rem 0; }}
img {{ max-width: 100%; width: 44rem; height: auto; display: block; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
thead th {{ color: #656d76; font-size: .8rem; box-shadow: inset 0 -1px #d8dee4; }}
th, td {{ padding: .4rem .7rem; text-align: right; font-weight: normal; }}
th:first-child {{ text-align: left; font-weight: 600; }}
tbody tr {{ border-bottom: 1px solid #d8dee4; }}
</style>
"""
