"""Analysis of trained models and learning curves."""

from switch_jax.analysis.expert_report import expert_table, write_expert_report
from switch_jax.analysis.expert_specialization import analyse_experts
from switch_jax.analysis.html_report import escape_markdown, html_page, markdown_to_html
from switch_jax.analysis.learning_curves import (
    PowerLaw,
    SpeedUp,
    mean_spread,
    power_law,
    speed_up,
    value_at,
)
from switch_jax.analysis.plotting import import_matplotlib, literal_text, new_figure
from switch_jax.analysis.run_plots import (
    draw_figures_of_run,
    draw_run_plots,
    draw_source_losses,
    read_expert_counts,
    read_runs,
)
from switch_jax.analysis.speedup import (
    common_sources,
    compare_sources,
    comparison_to_json,
    speedup_table,
)

__all__ = [
    "PowerLaw",
    "SpeedUp",
    "analyse_experts",
    "common_sources",
    "compare_sources",
    "comparison_to_json",
    "draw_figures_of_run",
    "draw_run_plots",
    "draw_source_losses",
    "escape_markdown",
    "expert_table",
    "html_page",
    "import_matplotlib",
    "literal_text",
    "markdown_to_html",
    "mean_spread",
    "new_figure",
    "power_law",
    "read_expert_counts",
    "read_runs",
    "speed_up",
    "speedup_table",
    "value_at",
    "write_expert_report",
]
