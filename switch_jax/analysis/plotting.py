"""plotting: to be written."""

from typing import Any

from switch_jax.errors import UserError


def import_matplotlib() -> Any:
    """The library; raises `UserError` where it is not installed."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise UserError('Figures need Matplotlib: pip install "switch_jax[plots]".') from None
    return matplotlib


def new_figure(rows: int, columns: int, size: tuple[float, float], **grid: Any) -> Any:
    """A Matplotlib figure of `size` inches; `grid` goes to `subplots`. Raises `UserError`."""
    figure = import_matplotlib().figure.Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
