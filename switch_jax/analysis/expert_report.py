"""The report of `experts.analyse`: one HTML file that needs no other, JSON, and a short table."""

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switch_jax.analysis.plotting import import_matplotlib, new_figure
from switch_jax.errors import UserError
from switch_jax.files import write_atomically

Analysis = Mapping[str, Any]  # as from `experts.analyse`
ReportLayer = Mapping[str, Any]  # one of its `layers`
ReportToken = Mapping[str, Any]  # one of the tokens of an expert

# Text and lines of the figures; their background is the page's.
_LIGHT, _DARK = "#24292f", "#d4d8dd"


def write_expert_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes `experts.html` and `experts.json`, each all or not at all; returns their paths.

    Raises `UserError` for a folder that cannot be written, and without Matplotlib.
    """
    contents = {
        "experts.html": expert_page(analysis),
        "experts.json": json.dumps(analysis, indent=1, ensure_ascii=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); use another --output."
        ) from error
    return [folder / name for name in contents]


def expert_table(analysis: Analysis) -> str:
    """The layers as aligned lines for people."""
    lines = [
        f"{'':20}{'mutual information':>31}{'load, 1 = fair share':>24}",
        f"{'':20}{'nats':>8}{'by chance':>11}{'of entropy':>12}{'max':>12}{'min':>12}",
    ]
    for layer in analysis["layers"]:
        lines.append(
            f"{place(layer):20}"
            f"{layer['mutual_information']:>8.3f}"
            f"{layer['mutual_information_by_chance']:>11.3f}"
            f"{_percent(layer['mutual_information_of_entropy']):>12}"
            f"{layer['load_max']:>12.2f}"
            f"{layer['load_min']:>12.2f}"
        )
    return "\n".join(lines)


def place(layer: ReportLayer) -> str:
    """Where an expert layer is: `encoder 3`, `encoder 3 attention`."""
    sublayer = "" if layer["sublayer"] == "ff" else f" {layer['sublayer']}"
    return f"{layer['stack']} {layer['layer']}{sublayer}"


def visible(token: str) -> str:
    """A token as HTML, with the code of every character that would not be seen."""
    shown = (c if c.isprintable() and c != " " else f"⟨U+{ord(c):04X}⟩" for c in token)
    return html.escape("".join(shown)).replace("▁", "<i>▁</i>")  # else it looks like `_`


def expert_page(analysis: Analysis) -> str:
    """The report as HTML, figures included. Raises `UserError` without Matplotlib."""
    layers, factor = analysis["layers"], analysis["eval_capacity_factor"]
    facts = {
        "checkpoint": analysis["checkpoint"],
        "text": analysis["text"],
        "batches": f"{analysis['batches']:,}",
        "router": analysis["router"],
        "experts": f"{analysis['num_experts']:,}",
        "capacity factor": "none" if factor is None else f"{factor:g}",
    }
    light, dark = (_png(layers, colour) for colour in (_LIGHT, _DARK))
    body = [
        "<dl>",
        *(f"<div><dt>{name}<dd>{html.escape(value)}</div>" for name, value in facts.items()),
        "</dl>",
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="Loads of the experts, and mutual information by layer">'
        "</picture>",
        _overview(layers),
        *map(_section, enumerate(layers)),
    ]
    return _HEAD + "\n".join(body) + "\n</html>\n"


def _png(layers: Sequence[ReportLayer], colour: str) -> str:
    """Loads and mutual information as a data URL; text and lines have the colour."""
    kinds = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    file = io.BytesIO()
    with import_matplotlib().rc_context(dict.fromkeys(kinds, colour)):
        _figure(layers, colour).savefig(file, format="png", dpi=144, transparent=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(layers: Sequence[ReportLayer], colour: str) -> Any:
    rows, names = range(len(layers)), [place(layer) for layer in layers]
    figure = new_figure(1, 2, (12, 1.6 + 0.35 * len(layers)), width_ratios=[3, 2])
    loads, information = figure.axes
    share_LxE = [[expert["load"] for expert in layer["experts"]] for layer in layers]
    E = len(share_LxE[0])
    image = loads.imshow(
        [[E * share for share in share_E] for share_E in share_LxE],
        aspect="auto",
        interpolation="nearest",
        vmin=0,
    )
    loads.grid(False)
    loads.set(xlabel="expert", title="Load (1 = fair share)")
    loads.locator_params("x", integer=True)
    entropy, mutual, chance = (
        [layer[key] for layer in layers]
        for key in ("expert_entropy", "mutual_information", "mutual_information_by_chance")
    )
    information.barh(rows, entropy, color="none", edgecolor=colour, label="entropy of experts")
    information.barh(rows, mutual, color="C0", label="mutual information")
    information.plot(chance, rows, "|", ms=12, mew=2, color="C1", label="by chance")
    information.set(xlabel="nats", title="What a token tells about its expert")
    information.set(ylim=loads.get_ylim())
    information.set_axisbelow(True)
    information.grid(False, axis="y")
    for axes in (loads, information):
        axes.set_yticks(rows, names)
    figure.colorbar(image, ax=loads, pad=0.01)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower right")
    return figure


def _overview(layers: Sequence[ReportLayer]) -> str:
    """A line for each layer, which leads to its section."""
    columns = {
        "Mutual information (nats)": lambda layer: f"{layer['mutual_information']:.3f}",
        "By chance": lambda layer: f"{layer['mutual_information_by_chance']:.3f}",
        "Of entropy": lambda layer: _percent(layer["mutual_information_of_entropy"]),
        "Busiest": lambda layer: f"{layer['load_max']:.2f}",
        "Idlest": lambda layer: f"{layer['load_min']:.2f}",
        "Spread": lambda layer: f"{layer['load_cv']:.2f}",
        "Idle experts": lambda layer: f"{layer['idle_experts']:,}",
        "Assignments": lambda layer: f"{layer['assignments']:,}",
    }
    rows = []
    for number, layer in enumerate(layers):
        cells = "".join(f"<td>{cell(layer)}" for cell in columns.values())
        rows.append(f'<tr><th><a href="#layer{number}">{place(layer)}</a>{cells}')
    return _table("overview", ["Layer", *columns], rows)


def _section(numbered: tuple[int, ReportLayer]) -> str:
    """The experts of a layer."""
    number, layer = numbered
    rows = []
    for expert in layer["experts"]:
        fair = expert["load"] * len(layer["experts"])
        gate = expert["mean_gate"]
        cells = (
            f'<td class="load" style="--part:{fair / max(layer["load_max"], 1):.3f}">'
            f"{_percent(expert['load'])}<small>{fair:.2f} × fair</small>",
            f"<td>{'–' if gate is None else f'{gate:.3f}'}",
            f"<td>{_tokens(expert['tokens'], _share)}",
            f"<td>{_tokens(expert['characteristic'], _lift)}",
            f"<td>{_tokens(expert['preceding'], _share)}",
        )
        rows.append(f"<tr><th>{expert['expert']}{''.join(cells)}")
    columns = ["Expert", "Load", "Mean gate", "Tokens", "Characteristic", "Preceding"]
    title = f'<h2 id="layer{number}">{place(layer).capitalize()}</h2>'
    return title + _table("experts", columns, rows)


def _table(kind: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{column}" for column in columns)
    return "\n".join([f'<table class="{kind}"><thead><tr>{head}<tbody>', *rows, "</table>"])


def _tokens(tokens: Sequence[ReportToken], note: Callable[[ReportToken], str]) -> str:
    """Tokens side by side, each with a note; those that are no text look different."""
    return " ".join(
        f"<span{' class=sign' if re.fullmatch('<.+>', token['token']) else ''}"
        f' title="id {token["id"]}"><code>{visible(token["token"])}</code>'
        f"<small>{note(token)}</small></span>"
        for token in tokens
    )


def _share(token: ReportToken) -> str:
    return f"{token['count']:,} · {_percent(token['share'])}"


def _lift(token: ReportToken) -> str:
    return f"{token['count']:,} · {token['lift']:.3g}×"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the experts specialise in</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --text: #24292f; --dim: #656d76; --line: #d8dee4; --chip: #f3f5f7;
  --bar: #d5e4f5; --link: #0a5cb8; --sign: #8a4b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16191d; --text: #d4d8dd; --dim: #8d96a0; --line: #30363d; --chip: #22272d;
    --bar: #1f3a57; --link: #6cb0ff; --sign: #e3a857;
  }
}
body {
  margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem;
  background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 48rem; color: var(--dim); }
a { color: var(--link); text-decoration: none; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 1.5rem; }
dt, small { color: var(--dim); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
thead th {
  position: sticky; top: 0; background: var(--page); color: var(--dim);
  font-size: .8rem; font-weight: 600; box-shadow: inset 0 -1px var(--line);
}
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; }
tbody tr { border-bottom: 1px solid var(--line); }
.overview { margin: 1.5rem 0; }
.overview td, .overview thead th + th { text-align: right; }
.experts td:nth-child(n + 4) { width: 27%; }
.load {
  white-space: nowrap;
  background: linear-gradient(90deg, var(--bar) calc(100% * var(--part)), transparent 0);
}
.load small { display: block; }
span {
  display: inline-block; margin: 0 .1rem .25rem 0; padding: 0 .35rem; border-radius: .3rem;
  background: var(--chip); white-space: nowrap;
}
span small { margin-left: .4rem; }
code { font: .85rem ui-monospace, monospace; unicode-bidi: isolate; white-space: pre; }
.sign code { color: var(--sign); }
i { color: var(--link); font-style: normal; }
</style>
<h1>What the experts specialise in</h1>
<p>Counted are the assignments that the router made in evaluation, before any was dropped for want
of a slot (ntlb, expert choice: those with a slot), of real tokens only; with several experts a
token, each counts. A decoder’s tokens are its inputs, which begin with <code>&lt;start&gt;</code>;
<code><i>▁</i></code> is a space.</p>
<p>Tokens and preceding tokens are those an expert takes, or takes the successor of, most often,
with counts and shares of the expert’s total. Characteristic ones add most to the mutual
information of token and expert; × says how many times as often the expert takes them as if
experts did not depend on tokens. Mutual information by chance is what the same tokens show with
their experts shuffled: only what is above it means something. Loads of layers are in units of a
fair share.</p>
"""
