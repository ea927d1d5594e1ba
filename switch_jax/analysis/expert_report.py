"""Report on expert specialization: one HTML file that needs no other, JSON, and a short table."""

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switch_jax.analysis.html_report import html_page, html_table, png_data_url
from switch_jax.analysis.plotting import import_matplotlib, new_figure
from switch_jax.errors import UserError
from switch_jax.files import write_atomically

Analysis = Mapping[str, Any]  # from `analyse_experts`
ReportLayer = Mapping[str, Any]  # an element of its `layers`
ReportToken = Mapping[str, Any]  # a token of an expert: token, id, count, share, lift

# Colours of text and lines in the figures on a light and on a dark page. Figures are transparent.
_LIGHT, _DARK = "#24292f", "#d4d8dd"


def write_expert_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes `experts.html` and `experts.json`, each atomically; returns their paths.

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
    """Returns the layers as a table of aligned text, a line each."""
    lines = [
        f"{'':20}{'mutual information':>31}{'load, 1 = fair share':>24}",
        f"{'':20}{'nats':>8}{'by chance':>11}{'of entropy':>12}{'max':>12}{'min':>12}",
    ]
    for layer in analysis["layers"]:
        lines.append(
            f"{layer_name(layer):20}"
            f"{layer['mutual_information']:>8.3f}"
            f"{layer['mutual_information_by_chance']:>11.3f}"
            f"{_percent(layer['mutual_information_of_entropy']):>12}"
            f"{layer['load_max']:>12.2f}"
            f"{layer['load_min']:>12.2f}"
        )
    return "\n".join(lines)


def layer_name(layer: ReportLayer) -> str:
    """Returns stack, layer and sublayer: `encoder 3`, `encoder 3 attention`."""
    sublayer = "" if layer["sublayer"] == "ff" else f" {layer['sublayer']}"
    return f"{layer['stack']} {layer['layer']}{sublayer}"


def token_to_html(token: str) -> str:
    """Returns a token as HTML, with invisible characters as their codes."""
    text = "".join(c if c.isprintable() and c != " " else f"⟨U+{ord(c):04X}⟩" for c in token)
    return html.escape(text).replace("▁", "<i>▁</i>")  # coloured, to differ from `_`


def expert_page(analysis: Analysis) -> str:
    """Returns the report as HTML, figures included. Raises `UserError` without Matplotlib."""
    layers, factor = analysis["layers"], analysis["eval_capacity_factor"]
    facts = {
        "checkpoint": analysis["checkpoint"],
        "text": analysis["text"],
        "batches": f"{analysis['batches']:,}",
        "router": analysis["router"],
        "experts": f"{analysis['num_experts']:,}",
        "capacity factor": "none" if factor is None else f"{factor:g}",
    }
    light, dark = (_figure_url(layers, colour) for colour in (_LIGHT, _DARK))
    body = [
        _INTRODUCTION,
        "<dl>",
        *(f"<div><dt>{name}<dd>{html.escape(value)}</div>" for name, value in facts.items()),
        "</dl>",
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="Loads of the experts, and mutual information by layer">'
        "</picture>",
        _overview(layers),
        *(_layer_section(number, layer) for number, layer in enumerate(layers)),
    ]
    return html_page(_TITLE, "\n".join(body), _STYLE)


def _figure_url(layers: Sequence[ReportLayer], colour: str) -> str:
    """Returns the figure of all layers as a data URL; text and lines have the colour."""
    kinds = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    file = io.BytesIO()
    with import_matplotlib().rc_context(dict.fromkeys(kinds, colour)):
        _draw_figure(layers, colour).savefig(file, format="png", dpi=144, transparent=True)
    return png_data_url(file.getvalue())


def _draw_figure(layers: Sequence[ReportLayer], colour: str) -> Any:
    """Draws the load of every expert, and the mutual information of every layer."""
    rows, names = range(len(layers)), [layer_name(layer) for layer in layers]
    figure = new_figure(1, 2, (12, 1.6 + 0.35 * len(layers)), width_ratios=[3, 2])
    load_axes, information_axes = figure.axes
    load_LxE = [[expert["load"] for expert in layer["experts"]] for layer in layers]
    E = len(load_LxE[0])
    image = load_axes.imshow(
        [[E * load for load in load_E] for load_E in load_LxE],
        aspect="auto",
        interpolation="nearest",
        vmin=0,
    )
    load_axes.grid(False)
    load_axes.set(xlabel="expert", title="Load (1 = fair share)")
    load_axes.locator_params("x", integer=True)
    entropy, mutual, chance = (
        [layer[key] for layer in layers]
        for key in ("expert_entropy", "mutual_information", "mutual_information_by_chance")
    )
    information_axes.barh(rows, entropy, color="none", edgecolor=colour, label="entropy of experts")
    information_axes.barh(rows, mutual, color="C0", label="mutual information")
    information_axes.plot(chance, rows, "|", ms=12, mew=2, color="C1", label="by chance")
    information_axes.set(xlabel="nats", title="Mutual information of token and expert")
    information_axes.set(ylim=load_axes.get_ylim())
    information_axes.set_axisbelow(True)
    information_axes.grid(False, axis="y")
    for axes in (load_axes, information_axes):
        axes.set_yticks(rows, names)
    figure.colorbar(image, ax=load_axes, pad=0.01)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower right")
    return figure


def _overview(layers: Sequence[ReportLayer]) -> str:
    """Returns a table with a line for each layer, linked to the section of that layer."""
    columns: dict[str, Callable[[ReportLayer], str]] = {
        "Mutual information (nats)": lambda layer: f"{layer['mutual_information']:.3f}",
        "By chance": lambda layer: f"{layer['mutual_information_by_chance']:.3f}",
        "Of entropy": lambda layer: _percent(layer["mutual_information_of_entropy"]),
        "Router’s largest probability": lambda layer: _beside_uniform(layer, "confidence"),
        "Router’s entropy (nats)": lambda layer: _beside_uniform(layer, "entropy"),
        "Busiest": lambda layer: f"{layer['load_max']:.2f}",
        "Idlest": lambda layer: f"{layer['load_min']:.2f}",
        "Spread": lambda layer: f"{layer['load_cv']:.2f}",
        "Idle experts": lambda layer: f"{layer['idle_experts']:,}",
        "Assignments": lambda layer: f"{layer['assignments']:,}",
    }
    rows = [
        [
            f'<th><a href="#layer{number}">{layer_name(layer)}</a>',
            *(f"<td>{cell(layer)}" for cell in columns.values()),
        ]
        for number, layer in enumerate(layers)
    ]
    return html_table("overview", ["Layer", *columns], rows)


def _beside_uniform(layer: ReportLayer, name: str) -> str:
    """Returns a mean of the router's probabilities, with the value of a uniform router below."""
    return f"{layer[f'router_{name}']:.3f}<small>uniform {layer[f'uniform_{name}']:.3f}</small>"


def _layer_section(number: int, layer: ReportLayer) -> str:
    """Returns a heading and a table of the experts of a layer."""
    rows = []
    for expert in layer["experts"]:
        load = expert["load"] * len(layer["experts"])  # 1: a fair share
        gate = expert["mean_gate"]
        rows.append(
            [
                f"<th>{expert['expert']}",
                f'<td class="load" style="--part:{load / max(layer["load_max"], 1):.3f}">'
                f"{_percent(expert['load'])}<small>{load:.2f} × fair</small>",
                f"<td>{'–' if gate is None else f'{gate:.3f}'}",
                f"<td>{_tokens(expert['tokens'], _count_and_share)}",
                f"<td>{_tokens(expert['characteristic'], _count_and_lift)}",
                f"<td>{_tokens(expert['preceding'], _count_and_share)}",
            ]
        )
    columns = ["Expert", "Load", "Mean gate", "Tokens", "Characteristic", "Preceding"]
    title = f'<h2 id="layer{number}">{layer_name(layer).capitalize()}</h2>'
    return title + html_table("experts", columns, rows)


def _tokens(tokens: Sequence[ReportToken], note: Callable[[ReportToken], str]) -> str:
    """Returns tokens side by side, each with a note; special tokens have another colour."""
    return " ".join(
        f"<span{' class=sign' if re.fullmatch('<.+>', token['token']) else ''}"
        f' title="id {token["id"]}"><code>{token_to_html(token["token"])}</code>'
        f"<small>{note(token)}</small></span>"
        for token in tokens
    )


def _count_and_share(token: ReportToken) -> str:
    return f"{token['count']:,} · {_percent(token['share'])}"


def _count_and_lift(token: ReportToken) -> str:
    return f"{token['count']:,} · {token['lift']:.3g}×"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_TITLE = "Expert specialization"
_INTRODUCTION = f"""<h1>{_TITLE}</h1>
<p>The counts are of the router’s assignments in evaluation, before any is dropped for want of a
slot (ntlb and expert choice: only assignments with a slot), of real tokens only; each of a token’s
several experts counts. The decoder’s tokens are its inputs, which begin with
<code>&lt;start&gt;</code>; <code><i>▁</i></code> is a space.</p>
<p>“Tokens” are the most frequent tokens of an expert, and “Preceding” the most frequent tokens
before its tokens, with their counts and their shares of the expert’s total. “Characteristic” tokens
add most to the mutual information of token and expert; × is the ratio of their count to the count
that is expected if experts do not depend on tokens. Mutual information by chance is that of the
same tokens with their experts shuffled: only the part above it means something. Loads of layers are
in units of a fair share. A router’s largest probability and entropy are means over tokens; those of
a uniform router are 1 / E and ln E. Near them, gates are about 1 / E, unless they are renormalized:
experts add little to a token, even if the router always chooses the same ones for it.</p>
"""
_STYLE = """\
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 1.5rem; }
dt, small { color: var(--dim); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
img, table { width: 100%; }
.overview { margin: 1.5rem 0; }
.overview tbody th { white-space: nowrap; }
.overview td, .overview thead th + th { text-align: right; }
.experts td:nth-child(n + 4) { width: 27%; }
.load {
  white-space: nowrap;
  background: linear-gradient(90deg, var(--bar) calc(100% * var(--part)), transparent 0);
}
.load small, .overview small { display: block; }
span {
  display: inline-block; margin: 0 .1rem .25rem 0; padding: 0 .35rem; border-radius: .3rem;
  background: var(--chip); white-space: nowrap;
}
span small { margin-left: .4rem; }
code { font: .85rem ui-monospace, monospace; unicode-bidi: isolate; white-space: pre; }
.sign code { color: var(--sign); }
i { color: var(--link); font-style: normal; }
"""
