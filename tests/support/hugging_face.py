"""Folders as Hugging Face's transformers write them, from stored weights (make_reference.py)."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.paths import GOLDEN

MODELS = ["t5_relu_tied", "t5_geglu_untied", "switch_relu_tied", "switch_dropping"]
SHARED, HEAD = "shared.weight", "lm_head.weight"

Arrays = dict[str, np.ndarray]


def reference(name: str) -> Arrays:
    """What scripts/make_reference.py stored; it says what the names mean."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def weights(stored: Arrays) -> Arrays:
    """The tensors by Hugging Face's names, float16."""
    return {name[len("param/") :]: v for name, v in stored.items() if name.startswith("param/")}


def write_folder(folder: Path, stored: Arrays) -> Path:
    """A folder with that model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(str(stored["config"]))
    save_file(weights(stored), folder / "model.safetensors", {"format": "pt"})
    return folder
