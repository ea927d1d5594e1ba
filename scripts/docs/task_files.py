"""Writes the table of tasks, their fields and their published files into docs/finetune.md."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switch_jax.data.finetuning.published_layouts import OWN_FILES, TFDS, layouts_of_task
from switch_jax.data.finetuning.task import Task
from switch_jax.data.finetuning.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "finetune.md"
BEGIN, END = "<!-- task files -->\n\n", "\n<!-- end of task files -->"
_HEAD = "| task | data set | fields | files of its authors, and on the hub |\n|---|---|---|---|\n"


def task_table() -> str:
    """Returns the table in Markdown, one row for each task."""
    return _HEAD + "".join(_row(task) for task in TASKS.values())


def write_page() -> None:
    """Replaces the table in the page."""
    text = PAGE.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: BEGIN + task_table() + END, text))


def _row(task: Task) -> str:
    split = next(rows.split for rows in task.splits.values())
    layouts = [layout for layout in layouts_of_task(task) if layout.name not in (TFDS, OWN_FILES)]
    files = "; ".join(f"`{layout.example(split)}` ({layout.name})" for layout in layouts)
    return f"| `{task.name}` | `{task.dataset}` | {_fields(task.schema)} | {files} |\n"


def _fields(schema: Mapping[str, Any]) -> str:
    inner = {name: kind for name, kind in schema.items() if isinstance(kind, dict)}
    names = [f"{name}/{{{', '.join(inner[name])}}}" if name in inner else name for name in schema]
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    write_page()
