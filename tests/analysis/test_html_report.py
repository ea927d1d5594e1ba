"""HTML pages, and Markdown that shows any text as it is."""

import html
import re
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from switch_jax.analysis import html_report
from switch_jax.analysis.html_report import (
    escape_markdown,
    html_page,
    html_table,
    markdown_to_html,
)

PARTS = ["<b>", "&amp;", "a_b", "_a_", "*", "**", "`", "[x](y)", "![x](y)", "|", "\\", "~~", "#"]
PARTS += ["1.", "2)", "-", "+", "a", "Ä", "http://x.y", "---", "===", ":", "  "]


@hypothesis.given(st.lists(st.sampled_from(PARTS), max_size=6), st.sampled_from(["", " "]))
def test_escaped_text_is_shown_as_it_is(parts, separator):
    text = separator.join(parts)
    shown = " ".join(text.split())
    line = escape_markdown(text)
    page = f"## {line}\n\n- {line}\n\n| a | b |\n| --- | --- |\n| x | {line} |\n"
    rendered = markdown_to_html(page, Path())
    for tag in ("h2", "li", "td"):
        *_, content = re.findall(f"<{tag}>(.*?)</{tag}>", rendered)
        assert html.unescape(content) == shown


def test_images_are_inlined(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"\x89PNG")
    rendered = markdown_to_html("![<alt>](a%20b.png)", tmp_path)
    assert rendered == '<p><img src="data:image/png;base64,iVBORw==" alt="&lt;alt&gt;" /></p>\n'


@pytest.mark.parametrize("style", ["", "p { color: red; }\n"])
def test_a_page_has_its_title_and_style(style):
    page = html_page("a <b>", "<p>text", style)
    assert "<title>a &lt;b&gt;</title>" in page and "\n<p>text\n" in page
    assert style in page and page.count("<style>") == 1


def test_a_page_has_the_script_of_its_tables_and_loads_nothing():
    script = Path(html_report.__file__).with_name("report_tables.js").read_text()
    page = html_page("title", html_table("kind", ["a", "b"], [["<th>x", "<td>1"]]))
    assert page.endswith(f"<script>\n{script}</script>\n</html>\n")
    assert "</script" not in script and not re.search(r"(src|href)=|https?:|@import", page)
    # What the script relies on: a head, one body, and as many cells in each row as in the head.
    assert page.count("<thead><tr><th>a<th>b<tbody>") == 1 and "<tr><th>x<td>1" in page
