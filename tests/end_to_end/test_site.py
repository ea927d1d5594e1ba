"""The documentation as a site: built strictly, complete, and without anything of other hosts."""

import re
from html.parser import HTMLParser

import griffe
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from scripts.docs import commands
from scripts.docs.site import MODULES, PAGES, notebook_to_markdown, public_names
from tests.support.paths import ROOT

NAMES = {path for module in MODULES for path in public_names(module).values()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site. Dead links and anchors, and missing pages, fail."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


class Page(HTMLParser):
    """Anchors of a page, what it loads, and whether a table stayed text."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.loaded, self.text = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.loaded.append(values.get("src") or "")
        if tag == "link":
            self.loaded.append(values.get("href") or "")

    def handle_data(self, data):
        self.text.append(data)


def test_every_page_is_in_the_site(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {"404.html"}
    assert {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")} <= pages
    assert {page.replace(".md", ".html") for page in PAGES.values()} <= pages
    assert {f"api/{module}.html" for module in MODULES} <= pages


def test_nothing_is_loaded_from_other_hosts(site):
    for path in site.rglob("*.html"):
        page = Page(path.read_text())
        assert not [url for url in page.loaded if re.match(r"(\w+:)?//", url)], path
        # A table that Markdown does not recognise.
        assert not re.search(r"\| ?---", "".join(page.text)), path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", path.read_text()), path


def test_every_public_name_is_in_the_reference(site):
    anchors = {
        anchor
        for module in MODULES
        for anchor in Page((site / "api" / f"{module}.html").read_text()).anchors
    }
    assert len(NAMES) > 250 and not NAMES - anchors


def test_every_public_name_has_a_docstring():
    package = griffe.load("switch_jax", search_paths=[ROOT])
    found = {name: package[name.removeprefix("switch_jax.")] for name in NAMES}
    assert not [name for name, thing in found.items() if not thing.has_docstring]


def test_the_page_of_commands_is_made_from_the_parser():
    assert commands.PAGE.read_text() == commands.command_page()


def test_a_notebook_is_a_page_of_its_cells():
    text = {"cell_type": "markdown", "source": ["# Title\n", "Text."]}
    code = {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": []}
    page = notebook_to_markdown({"cells": [text, code, text]})
    assert page == "# Title\nText.\n\n```python\nprint(1)\nprint(2)\n```\n\n# Title\nText.\n"
