"""HTML reports: one page that needs no other file, from HTML or from Markdown."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

from switch_jax.errors import printable


def html_page(title: str, body: str, style: str = "") -> str:
    """Returns a page with the colours and fonts of all reports, light and dark.

    Its tables can be sorted by each column, and filtered.

    Args:
      title: plain text.
      body: HTML.
      style: more CSS, after the common rules.
    """
    head = _HEAD.format(title=html.escape(title), style=_STYLE + style)
    return f"{head}{body.strip()}\n<script>\n{_SCRIPT.read_text()}</script>\n</html>\n"


def html_table(kind: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of the CSS class `kind`.

    Args:
      header: HTML of the columns' names.
      rows: their cells with opening tags: `<th>…`, `<td>…`.
    """
    head = "".join(f"<th>{name}" for name in header)
    body = (f"<tr>{''.join(cells)}" for cells in rows)
    return "\n".join([f'<table class="{kind}"><thead><tr>{head}<tbody>', *body, "</table>"])


def png_data_url(image: bytes) -> str:
    """Returns a PNG file as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def markdown_to_html(text: str, folder: Path) -> str:
    """Returns Markdown with tables as HTML; HTML in the text stays visible text.

    Args:
      folder: paths of images in the text, all PNG, are relative to it; the images are inlined.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                path = folder / unquote(str(child.attrs["src"]))
                child.attrs["src"] = png_data_url(path.read_bytes())
    return parser.renderer.render(tokens, parser.options, {})


def escape_markdown(text: str) -> str:
    """Returns Markdown that shows `text` as it is, on one line."""
    line = printable(" ".join(text.split()))
    line = re.sub(r"[\\`*<>\[\]|~#&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"^(\d*)([-+=.)])(?!\w)", r"\1\\\2", line)  # else a list or a heading may begin


_SCRIPT = Path(__file__).with_name("report_tables.js")
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
"""
_STYLE = """\
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
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
thead th {
  position: sticky; top: 0; background: var(--page); color: var(--dim);
  font-size: .8rem; font-weight: 600; box-shadow: inset 0 -1px var(--line);
}
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; }
thead th[tabindex] { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
input {
  margin: 1rem 0 .5rem; padding: .3rem .6rem; border: 1px solid var(--line);
  border-radius: .3rem; background: var(--page); color: var(--text); font: inherit;
}
@media (max-width: 50rem) {
  body { padding: 0 1rem; }
  table { display: block; overflow-x: auto; }
}
tbody tr { border-bottom: 1px solid var(--line); }
"""
