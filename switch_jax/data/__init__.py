"""Input data: sources of text, vocabularies, token stores, and readers that make NumPy batches."""

from switch_jax.data.batch import (
    Batch,
    BatchIterator,
    ProcessRows,
    SyntheticIterator,
    data_of_position,
    feature_shapes,
    padded_batch,
)
from switch_jax.data.finetuning.task import Task
from switch_jax.data.finetuning.task_mixtures import MIXTURES
from switch_jax.data.finetuning.tasks import get_task
from switch_jax.data.mixture import find_sources, has_plain_text
from switch_jax.data.objectives import uses_sentinels
from switch_jax.data.peek import examples_text
from switch_jax.data.readers import open_batches, open_epoch_by_source, read_task_examples
from switch_jax.data.text_batches import read_text_file, text_file_batches
from switch_jax.data.token_store.build import build_token_store, store_table
from switch_jax.data.vocabulary import (
    BYT5,
    HUGGING_FACE_VOCABULARY_FILES,
    Vocabulary,
    hugging_face_file_name,
    parse_vocabulary,
    read_vocabulary,
)
from switch_jax.data.vocabulary_builder import open_vocabulary, sample_texts, train_vocabulary

__all__ = [
    "BYT5",
    "HUGGING_FACE_VOCABULARY_FILES",
    "MIXTURES",
    "Batch",
    "BatchIterator",
    "ProcessRows",
    "SyntheticIterator",
    "Task",
    "Vocabulary",
    "build_token_store",
    "data_of_position",
    "examples_text",
    "feature_shapes",
    "find_sources",
    "get_task",
    "has_plain_text",
    "hugging_face_file_name",
    "open_batches",
    "open_epoch_by_source",
    "open_vocabulary",
    "padded_batch",
    "parse_vocabulary",
    "read_task_examples",
    "read_text_file",
    "read_vocabulary",
    "sample_texts",
    "store_table",
    "text_file_batches",
    "train_vocabulary",
    "uses_sentinels",
]
