"""Models on disk: WORKDIRs, checkpoints, and checkpoints of other programs."""

from switch_jax.checkpoint.checkpoint_reader import (
    checkpoint_identity,
    find_checkpoint_together,
    restore_params,
)
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.data_position import DataPosition
from switch_jax.checkpoint.finite import check_parameters_finite
from switch_jax.checkpoint.interop.hf_export import export_hugging_face
from switch_jax.checkpoint.interop.hf_import import read_hugging_face
from switch_jax.checkpoint.interop.t5x_import import read_t5x
from switch_jax.checkpoint.interop.workdir_writer import write_workdir
from switch_jax.checkpoint.metrics_log import (
    QUALITY,
    MetricsWriter,
    has_diverged,
    last_logged_step,
    read_metrics,
    sort_key,
)
from switch_jax.checkpoint.model_differences import check_special_ids, model_differences
from switch_jax.checkpoint.pretrained import PretrainedModel, find_pretrained, load
from switch_jax.checkpoint.transfer import (
    VOCABULARY_AXES,
    Shape,
    Shapes,
    Transfer,
    parameter_origins,
    plan_transfer,
    render_transfer,
)
from switch_jax.checkpoint.upcycle import upcycle_dense_model
from switch_jax.checkpoint.workdir import Workdir

__all__ = [
    "QUALITY",
    "VOCABULARY_AXES",
    "Checkpointer",
    "DataPosition",
    "MetricsWriter",
    "PretrainedModel",
    "Shape",
    "Shapes",
    "Transfer",
    "Workdir",
    "check_parameters_finite",
    "check_special_ids",
    "checkpoint_identity",
    "export_hugging_face",
    "find_checkpoint_together",
    "find_pretrained",
    "has_diverged",
    "last_logged_step",
    "load",
    "model_differences",
    "parameter_origins",
    "plan_transfer",
    "read_hugging_face",
    "read_metrics",
    "read_t5x",
    "render_transfer",
    "restore_params",
    "sort_key",
    "upcycle_dense_model",
    "write_workdir",
]
