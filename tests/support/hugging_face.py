"""Hugging Face model folders from the weights of scripts/golden/make_hugging_face.py."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.paths import GOLDEN

MODELS = ["t5_relu_tied", "t5_geglu_untied", "switch_relu_tied", "switch_dropping"]
SHARED, HEAD = "shared.weight", "lm_head.weight"

Arrays = dict[str, np.ndarray]


def reference(name: str) -> Arrays:
    """Returns stored arrays; scripts/golden/make_hugging_face.py documents their names."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def weights(stored: Arrays) -> Arrays:
    """Returns the float16 tensors by their names in Hugging Face's models."""
    return {name[len("param/") :]: v for name, v in stored.items() if name.startswith("param/")}


def write_folder(folder: Path, stored: Arrays) -> Path:
    """Writes a folder with the stored model and returns its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(str(stored["config"]))
    save_file(weights(stored), folder / "model.safetensors", {"format": "pt"})
    return folder
