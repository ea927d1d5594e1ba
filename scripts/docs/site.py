"""MkDocs hook: pages of the site that do not stand in docs/, and the links to and from them.

The site has README.md as its first page, CONTRIBUTING.md and CHANGELOG.md, a page for the README.md
and one for the Python API of each wing, and docs/first_hour.ipynb. Links work in both forms, on the
site and between the files.
"""

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
WINGS = sorted(path.parent.name for path in ROOT.glob("switch_jax/*/README.md"))
MODULES = ["errors", *WINGS]  # with a page of the Python API
# File → page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/first_hour.ipynb": "first_hour.md",
} | {f"switch_jax/{wing}/README.md": f"wings/{wing}.md" for wing in WINGS}
_FILES = {page: file for file, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")  # target of a link without scheme and anchor


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of the Python API and of the wings to the navigation."""
    reference = next(entry["Reference"] for entry in config.nav or () if "Reference" in entry)
    reference += [
        {"Python API": ["api/index.md", *({name: f"api/{name}.md"} for name in MODULES)]},
        {"Parts of the package": [{wing: f"wings/{wing}.md"} for wing in WINGS]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    contents = {page: (ROOT / file).read_text() for file, page in PAGES.items()}
    contents["first_hour.md"] = notebook_to_markdown(json.loads(contents["first_hour.md"]))
    contents["api/index.md"] = _index_of_api()
    contents |= {f"api/{name}.md": _api_page(name) for name in MODULES}
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links between files into links between pages of the site."""
    own_page = page.file.src_uri
    own_file = Path(_FILES.get(own_page, f"docs/{own_page}"))

    def page_link(match: re.Match[str]) -> str:
        target = posixpath.normpath((own_file.parent / match[1]).as_posix())
        to_page = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(to_page, posixpath.dirname(own_page) or ".")

    return markdown if own_page.startswith("api/") else _LINK.sub(page_link, markdown)


def public_names(wing: str) -> dict[str, str]:
    """Returns the names that a wing exports, and for each its path in the reference.

    That is its wing and its name, or its file and its name where a file has the same name.
    """
    own_names = {path.stem for path in (ROOT / "switch_jax" / wing).glob("*.py")}
    paths = {name: f"{name}.{name}" if name in own_names else name for name in _exports(wing)}
    return {name: f"switch_jax.{wing}.{path}" for name, path in paths.items()}


def notebook_to_markdown(notebook: dict[str, Any]) -> str:
    """Returns the cells of a notebook without their outputs."""
    texts = (("".join(cell["source"]), cell["cell_type"]) for cell in notebook["cells"])
    parts = (f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)
    return "\n\n".join(parts) + "\n"


def _syntax_tree(module: str) -> ast.Module:
    """Returns the parsed file of a wing, of a module at the top or, for "", of the package."""
    path = ROOT / "switch_jax" / module
    return ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )


def _assigned(tree: ast.Module, name: str) -> Any:
    """Returns the literal that a name is assigned; None where there is no such assignment."""
    values = (n.value for n in tree.body if isinstance(n, ast.Assign) and _target(n) == name)
    return next(map(ast.literal_eval, values), None)


def _target(assignment: ast.Assign) -> str:
    return ast.unparse(assignment.targets[0])


def _exports(wing: str) -> list[str]:
    """Returns `__all__` of a wing; without one, the public classes and functions."""
    tree = _syntax_tree(wing)
    defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return _assigned(tree, "__all__") or [name for name in defined if not name.startswith("_")]


def _first_sentence(wing: str) -> str:
    return (ast.get_docstring(_syntax_tree(wing)) or "").splitlines()[0]


def _api_page(wing: str) -> str:
    """Returns the page of a wing; what has the name of its file has a block of its own."""
    paths = public_names(wing)
    members = [name for name, path in paths.items() if path.endswith(f".{wing}.{name}")]
    blocks = [f"# switch_jax.{wing}", _block(f"switch_jax.{wing}", members=members)]
    blocks += [
        _block(path, show_root_heading="true", show_root_toc_entry="true", members=[])
        for name, path in paths.items()
        if name not in members
    ]
    return "\n\n".join(blocks) + "\n"


def _block(path: str, members: list[str], **options: str) -> str:
    """Returns a block of mkdocstrings."""
    values = options | {"members": f"[{', '.join(members)}]" if members else "false"}
    lines = [f"      {name}: {value}" for name, value in values.items()]
    return "\n".join([f"::: {path}", "    options:", *lines])


def _index_of_api() -> str:
    """Returns the page of the names of `switch_jax` itself, and of the wings."""
    names = _assigned(_syntax_tree(""), "_PUBLIC").items()
    rows = [f"| `switch_jax.{name}` | [{module}.{name}][] |" for name, module in sorted(names)]
    wings = [f"| [switch_jax.{w}]({w}.md) | {_first_sentence(w)} |" for w in MODULES]
    return "\n".join(
        [
            "# Python API\n",
            "What a program needs is in the package itself:\n",
            *("| name | the same as |", "|---|---|", *rows, ""),
            "To extend the package, import from a wing what its page lists, not from its files.\n",
            *("| wing | content |", "|---|---|", *wings, ""),
        ]
    )
