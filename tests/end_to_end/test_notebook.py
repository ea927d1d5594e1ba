"""docs/first_hour.ipynb: its cells run one after the other, with few steps."""

import os
import sys
from itertools import islice
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from switch_jax.data.sources.python_text import python_documents
from tests.support.paths import ROOT
from tests.support.runs import write_text

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
FEW_STEPS = {
    "train.steps": 2,
    "train.eval_every": 2,
    "train.eval_batches": 1,
    "optimizer.warmup_steps": 1,
    "optimizer.cooldown_steps": 0,
    "data.batch_size": 4,
    "data.inputs_length": 32,
    "data.targets_length": 14,
    "model.vocab_size": 800,
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with the outputs of a run of few steps."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [number] = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    folder = tmp_path_factory.mktemp("notebook")
    texts = [document.text for document in islice(python_documents(), 12)]
    mixture = write_text(folder / "text", train=texts[2:], validation=texts[:2])
    settings = FEW_STEPS | {"data.mixture": mixture}
    words = "".join(f" --config.{key}={value}" for key, value in settings.items())
    notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(f"SETTINGS += {words!r}"))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", programs)
        where = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=600, resources=where).execute()
    return notebook


def output(notebook, start):
    """Returns what the cells that begin with `start` print."""
    return "".join(
        item.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(start)
        for item in cell.outputs
    )


def test_every_cell_of_the_notebook_runs(executed):
    train = output(executed, "!switch-jax train")
    assert train.count("step 2  validation cross-entropy") == 2
    printed = "".join(output(executed, ""))
    assert "switch-jax: " not in printed  # how a command of `!` reports an error
    assert "sparse  cross-entropy" in printed and "dense   cross-entropy" in printed
    assert "mutual information" in output(executed, "!switch-jax experts")
    tokens = output(executed, "report =").splitlines()
    assert len(tokens) == 1 + 8 and tokens[0].startswith("encoder 1")
    assert output(executed, "!switch-jax generate").strip()


def test_the_notebook_is_stored_without_outputs():
    code = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
