"""Writes docs/config.md, the page of all keys of a config, from the schema."""

from pathlib import Path

from switch_jax.config import describe_groups, describe_keys

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
_HEAD = """# Configuration keys

A config is a Python file with a function `get_config(arg)`, which returns
`switch_jax.config.defaults()` with other values. On the command line, `--config.moe.num_experts=16`
changes a key of any config.

```
switch-jax config configs/switch_mini.py          # all keys, and which differ from the defaults
switch-jax config configs/switch_mini.py --json
```

This page is made from the schema by `python scripts/docs/config_keys.py`.
"""


def key_page() -> str:
    """Returns the page in Markdown: a table for each group of keys."""
    tables: dict[str, list[str]] = {}
    for key, one in describe_keys().items():
        default = "''" if one.default == "" else one.default
        row = " | ".join(
            str(cell).replace("|", "\\|")
            for cell in (f"`{key}`", one.values, f"`{default}`", one.text)
        )
        row = f"| {row} |"
        tables.setdefault(key.rpartition(".")[0], []).append(row)
    parts = [_HEAD]
    for group, rows in tables.items():
        title = f"## {group}\n\n{describe_groups()[group]}" if group else "## The run"
        parts.append(
            "\n".join([title, "", "| key | values | default | |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(key_page())
