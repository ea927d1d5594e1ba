"""Optimizer, train step, initial state and training loop."""

from switch_jax.training.distill import teacher_config, teacher_parameters
from switch_jax.training.initial_state import initial_state_report
from switch_jax.training.loop import train
from switch_jax.training.memory import check_memory
from switch_jax.training.optimizer import make_optimizer
from switch_jax.training.progress import ProgressDisplay, format_duration
from switch_jax.training.step import TrainProgram

__all__ = [
    "ProgressDisplay",
    "TrainProgram",
    "check_memory",
    "format_duration",
    "initial_state_report",
    "make_optimizer",
    "teacher_config",
    "teacher_parameters",
    "train",
]
