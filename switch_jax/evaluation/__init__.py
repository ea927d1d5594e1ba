"""Quality of parameters: validation loss and scores of fine-tuning tasks."""

from switch_jax.evaluation.metric_names import check_metric
from switch_jax.evaluation.task_scores import TaskScorer, scores_table
from switch_jax.evaluation.validation_loss import (
    ValidationBatches,
    check_vocabulary,
    evaluate,
    evaluate_checkpoint,
    validation_batches,
)

__all__ = [
    "TaskScorer",
    "ValidationBatches",
    "check_metric",
    "check_vocabulary",
    "evaluate",
    "evaluate_checkpoint",
    "scores_table",
    "validation_batches",
]
