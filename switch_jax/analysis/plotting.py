"""Matplotlib figures: import on first use, the common style, and texts of others in them."""

from typing import Any

from switch_jax.errors import UserError, printable


def import_matplotlib() -> Any:
    """Returns the package `matplotlib`; raises `UserError` if it cannot be imported."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise UserError('Figures need Matplotlib: pip install "switch_jax[plots]".') from None
    except ValueError as error:  # of a setting
        raise UserError(
            f"Matplotlib cannot start ({error}); correct or unset MPLBACKEND."
        ) from error
    return matplotlib


def literal_text(text: str) -> str:
    """Returns a text that Matplotlib draws as it is, for names that others have chosen.

    Without mathematics between dollar signs, and in a legend also if it begins with `_`.
    """
    zero_width_space = "\u200b"  # a legend leaves out labels that begin with `_`
    text = printable(text).replace("$", r"\$")
    return zero_width_space + text if text.startswith("_") else text


def new_figure(rows: int, columns: int, size: tuple[float, float], **grid: Any) -> Any:
    """Returns a Matplotlib figure of rows × columns axes, in the common style.

    Args:
      size: width and height, inches.
      grid: arguments of `GridSpec`, such as `width_ratios`.

    Raises `UserError` if Matplotlib is not installed.
    """
    figure = import_matplotlib().figure.Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
