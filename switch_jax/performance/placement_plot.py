"""Placement plot: which device holds which part of the batch and of the weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.analysis import new_figure


def draw_placement(result: Mapping[str, Any], path: Path) -> None:
    """Draws the placement of the batch and of the weights, as in the paper's Figure 9.

    A square is a device; devices of equal colour hold the same part.

    Args:
      result: from `compile_step`.
      path: a .png file.
    """
    mesh = result["mesh"]
    parameters = result["parameters"]
    axes_by_title = {"rows of the batch": ["slice", "data", "expert"]}
    for title, pattern in _WEIGHT_PATTERNS.items():
        name = next((n for n in parameters if re.search(pattern, n)), None)
        if name is not None:
            axes_by_title[title] = [
                axis for axes in parameters[name]["spec"] for axis in axes or ()
            ]
    figure = new_figure(1, len(axes_by_title), (4.2 * len(axes_by_title), 4.6))
    sizes = list(mesh.values())
    devices = math.prod(sizes)
    columns = mesh["model"] if mesh["model"] > 1 else 1
    while columns**2 < devices:
        columns *= 2
    for axes, (title, split_axes) in zip(figure.axes, axes_by_title.items()):
        coordinates = np.unravel_index(np.arange(devices), sizes)
        part = np.zeros(devices, int)
        for axis, size, coordinate in zip(mesh, sizes, coordinates):
            part = part * size + coordinate if axis in split_axes else part
        colours = np.full(-(-devices // columns) * columns, np.nan)
        colours[:devices] = part
        line_width = 1.0 if devices <= 256 else 0.0
        squares = colours.reshape(-1, columns)[::-1]
        axes.pcolormesh(squares, cmap="turbo", edgecolors="white", linewidth=line_width)
        count = part.max() + 1
        over = " × ".join(axis for axis in mesh if axis in split_axes and mesh[axis] > 1)
        axes.set_title(f"{title}\n{count:,} parts over {over}" if count > 1 else f"{title}\nwhole")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    figure.suptitle(f"{devices:,} × {result['device_kind']}: {shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)


_WEIGHT_PATTERNS = {"dense weights": r"attention/out$", "expert weights": r"experts/w[io]$"}
