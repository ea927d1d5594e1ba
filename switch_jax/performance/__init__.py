"""Cost of a train step: by arithmetic, as compiled, and as timed."""

from switch_jax.performance.benchmark import benchmark_table, run_benchmark
from switch_jax.performance.compile import compile_step, compile_table, remedy
from switch_jax.performance.compile_target import CompileTarget
from switch_jax.performance.cost_model import cost_summary, cost_table
from switch_jax.performance.mesh_choice import choose_mesh, describe_choice, with_mesh
from switch_jax.performance.mesh_search import suggest_meshes, suggestion_to_json, suggestions_table
from switch_jax.performance.placement_plot import draw_placement

__all__ = [
    "CompileTarget",
    "benchmark_table",
    "choose_mesh",
    "compile_step",
    "compile_table",
    "cost_summary",
    "cost_table",
    "describe_choice",
    "draw_placement",
    "remedy",
    "run_benchmark",
    "suggest_meshes",
    "suggestion_to_json",
    "suggestions_table",
    "with_mesh",
]
