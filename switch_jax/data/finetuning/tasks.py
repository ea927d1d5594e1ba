"""Table of the fine-tuning tasks: those of the Switch paper, and T5's translations.

Data sets, versions and numbers of examples are T5's, or TFDS's for tasks that T5 does not have. The
maximal lengths in tokens:

| tasks                        | inputs, targets | as in                                           |
|------------------------------|-----------------|-------------------------------------------------|
| glue                         | 512, 84         | T5                                              |
| super_glue                   | 512, 62         | T5                                              |
| squad                        | 512, 97         | T5                                              |
| cnn_dailymail, wmt           | 512, 512        | T5                                              |
| closed_book, winogrande      | 128, 32         | T5's notebook on closed-book questions          |
| anli                         | 512, 84         | glue: MNLI is similar                           |
| arc, xsum                    | 512, 128        | our choice: an answer is a sentence             |
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from switch_jax.data.finetuning.prompts import (
    Format,
    format_arc,
    format_classification,
    format_dpr,
    format_multirc,
    format_open_question,
    format_record_task,
    format_squad,
    format_stsb,
    format_summarization,
    format_translation,
    format_trivia_qa,
    format_winogrande,
    format_wsc,
)
from switch_jax.data.finetuning.task import ALL_PARTS, Rows, Task, TaskPart, custom_task
from switch_jax.data.finetuning.task_records import LABEL

_LENGTHS = {
    "glue": (512, 84),
    "super_glue": (512, 62),
    "squad": (512, 97),
    "cnn_dailymail": (512, 512),
    "wmt": (512, 512),
    "closed_book": (128, 32),
    "winogrande": (128, 32),
    "anli": (512, 84),
    "arc": (512, 128),
    "xsum": (512, 128),
}
_VERSIONS = {"glue": "1.0.0", "super_glue": "1.0.2", "anli": "0.1.0"}
_TEST: dict[TaskPart, Rows] = {"validation": Rows("test")}  # without labels: predicted, not scored


def _task(
    name: str,
    num_examples: int,
    metrics: str,
    format: Format,
    schema: Mapping[str, Any],
    classes: tuple[str, ...] = (),
    dataset: str | None = None,
    splits: Mapping[TaskPart, Rows] = ALL_PARTS,
    reported_metric: str | None = None,
) -> Task:
    benchmark, _, config = name.partition(".")
    dataset, _, version = (dataset or f"{benchmark}/{config}:{_VERSIONS[benchmark]}").partition(":")
    return Task(
        name=name,
        dataset=dataset,
        version=version,
        splits=splits,
        num_examples=num_examples,
        schema=schema,
        format=format,
        classes=classes,
        metrics=tuple(metrics.split()),
        reported_metric=reported_metric,
        inputs_length=_LENGTHS[benchmark][0],
        targets_length=_LENGTHS[benchmark][1],
    )


def _classification(
    name: str,
    num_examples: int,
    classes: tuple[str, ...],
    fields: str | Mapping[str, str],
    metrics: str = "accuracy",
    prefix: str | None = None,
    dataset: str | None = None,
    splits: Mapping[TaskPart, Rows] = ALL_PARTS,
) -> Task:
    """Returns a task with class names as targets.

    Args:
      fields: names in the order of the inputs, separated by blanks, or name → field of the record.
    """
    if isinstance(fields, str):
        fields = {field: field for field in fields.split()}
    prefix = prefix or name.partition(".")[2]
    format = partial(format_classification, prefix=prefix, fields=fields, classes=classes)
    schema = {**dict.fromkeys(fields.values(), str), "label": LABEL}
    return _task(name, num_examples, metrics, format, schema, classes, dataset, splits)


def _mnli(genre: str) -> Task:
    parts: tuple[TaskPart, ...] = ("validation", "test")
    splits = {part: Rows(f"{part}_{genre}") for part in parts}
    name, data = f"glue.mnli_{genre}", "glue/mnli:1.0.0"
    return _classification(name, 0, _NLI, _INFERENCE, "accuracy", "mnli", data, splits)


def _anli(name: str, num_examples: int) -> Task:
    prefix = name.replace(".", "_")
    return _classification(name, num_examples, _NLI, "hypothesis context", prefix=prefix)


def _arc(name: str, config: str, num_examples: int) -> Task:
    return _task(
        f"arc.{name}",
        num_examples,
        "accuracy",
        partial(format_arc, prefix=f"arc_{name}"),
        {"question": str, "choices": {"text": [str], "label": [LABEL]}, "answerKey": LABEL},
        dataset=f"ai2_arc/{config}:1.0.0",
    )


def _winogrande(size: str, num_examples: int) -> Task:
    return _task(
        f"winogrande.{size}",
        num_examples,
        "accuracy",
        format_winogrande,
        {"sentence": str, "option1": str, "option2": str, "label": LABEL},
        dataset="winogrande:1.2.0",
        splits={**ALL_PARTS, "train": Rows(f"train_{size}")},
    )


def _wmt(language: str, target: str, num_examples: int, dataset: str) -> Task:
    """Returns the translation from English; `target` is the code of the language."""
    prefix = f"translate English to {language}"
    format = partial(format_translation, source="en", target=target, prefix=prefix)
    schema = {"en": str, target: str}
    return _task(f"wmt.en{target}", num_examples, "bleu", format, schema, dataset=dataset)


def _closed_book(
    name: str,
    num_examples: int,
    metrics: str,
    format: Format,
    schema: Mapping[str, Any],
    dataset: str,
    test: str = "validation",
) -> Task:
    """Returns a closed-book task; as in T5, the last tenth of `train` is for validation."""
    return _task(
        f"closed_book.{name}",
        num_examples,
        metrics,
        format,
        {"question": str, **schema},
        dataset=dataset,
        splits={
            "train": Rows("train", 0, num_examples),
            "validation": Rows("train", num_examples),
            "test": Rows(test),
        },
        reported_metric="exact_match",
    )


_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_CB = ("entailment", "contradiction", "neutral")
_BOOLEAN = ("False", "True")
_PAIR, _INFERENCE = "sentence1 sentence2", "hypothesis premise"
_AXB = {"hypothesis": "sentence2", "premise": "sentence1"}
_COPA = "choice1 choice2 premise question"
_TASKS = (
    _classification("glue.cola", 8_551, ("unacceptable", "acceptable"), "sentence", "matthews"),
    _classification("glue.sst2", 67_349, ("negative", "positive"), "sentence"),
    _classification("glue.mrpc", 3_668, ("not_equivalent", "equivalent"), _PAIR, "f1 accuracy"),
    _classification(
        "glue.qqp", 363_849, ("not_duplicate", "duplicate"), "question1 question2", "f1 accuracy"
    ),
    _task(
        "glue.stsb",
        5_749,
        "pearson spearman",
        format_stsb,
        {"sentence1": str, "sentence2": str, "label": float},
    ),
    _classification("glue.mnli", 392_702, _NLI, _INFERENCE, splits={"train": Rows("train")}),
    _mnli("matched"),
    _mnli("mismatched"),
    _classification("glue.qnli", 104_743, _RTE, "question sentence"),
    _classification("glue.rte", 2_490, _RTE, _PAIR),
    _classification("glue.wnli", 635, ("not_entailment", "entailment"), _PAIR),
    _classification("glue.ax", 0, _NLI, _INFERENCE, "", "mnli", splits=_TEST),
    _classification("super_glue.boolq", 9_427, _BOOLEAN, "passage question"),
    _classification("super_glue.cb", 250, _CB, _INFERENCE, "macro_f1 accuracy"),
    _classification("super_glue.copa", 400, ("choice1", "choice2"), _COPA),
    _task(
        "super_glue.multirc",
        27_243,
        "multirc",
        partial(format_multirc, classes=_BOOLEAN),
        {
            "question": str,
            "answer": str,
            "paragraph": str,
            "idx": {"paragraph": int, "question": int},
            "label": LABEL,
        },
        _BOOLEAN,
    ),
    _task(
        "super_glue.record",
        138_854,
        "record",
        format_record_task,
        {
            "query": str,
            "entities": [str],
            "passage": str,
            "answers": [str],
            "idx": {"passage": int, "query": int},
        },
    ),
    _classification("super_glue.rte", 2_490, _RTE, _INFERENCE),
    _classification("super_glue.wic", 5_428, _BOOLEAN, f"{_PAIR} word"),
    _task(
        "super_glue.wsc",
        259,
        "wsc",
        partial(format_wsc, classes=_BOOLEAN),
        {"text": str, "span1_text": str, "span2_text": str, "span2_index": int, "label": LABEL},
        _BOOLEAN,
        "super_glue/wsc.fixed:1.0.2",
    ),
    _task(
        "super_glue.dpr",
        1_322,
        "accuracy",
        format_dpr,
        {"sentence": str, "pronoun": str, "candidates": [str], "label": LABEL},
        dataset="definite_pronoun_resolution:1.1.0",
        splits={"train": Rows("train"), "test": Rows("test")},
    ),
    _classification("super_glue.axb", 0, _RTE, _AXB, "", "rte", splits=_TEST),
    _classification("super_glue.axg", 0, _RTE, _INFERENCE, "", "rte", splits=_TEST),
    _task(
        "squad",
        87_599,
        "squad",
        format_squad,
        {"question": str, "context": str, "answers": {"text": [str]}},
        dataset="squad/v1.1:3.0.0",
        splits={"train": Rows("train"), "validation": Rows("validation")},
        reported_metric="exact_match",
    ),
    _task(
        "cnn_dailymail",
        287_113,
        "rouge",
        partial(format_summarization, document="article", summary="highlights"),
        {"article": str, "highlights": str},
        dataset="cnn_dailymail:3.4.0",
        reported_metric="rouge2",
    ),
    _task(
        "xsum",
        203_577,
        "rouge",
        partial(format_summarization, document="document", summary="summary"),
        {"document": str, "summary": str},
        dataset="xsum:1.1.0",
        reported_metric="rouge2",
    ),
    _wmt("German", "de", 4_592_289, "wmt_t2t_translate/de-en:1.0.0"),
    _wmt("French", "fr", 40_853_137, "wmt15_translate/fr-en:1.0.0"),
    _wmt("Romanian", "ro", 610_320, "wmt16_translate/ro-en:1.0.0"),
    _anli("anli.r1", 16_946),
    _anli("anli.r2", 45_460),
    _anli("anli.r3", 100_459),
    _arc("easy", "ARC-Easy", 2_251),
    _arc("challenge", "ARC-Challenge", 1_119),
    _winogrande("xs", 160),
    _winogrande("s", 640),
    _winogrande("m", 2_558),
    _winogrande("l", 10_234),
    _winogrande("xl", 40_398),
    _closed_book(
        "natural_questions",
        79_168,
        "squad",
        partial(format_open_question, prefix="nq", answers="answer"),
        {"answer": [str]},
        "natural_questions_open:1.0.0",
    ),
    _closed_book(
        "web_questions",
        3_417,
        "squad",
        partial(format_open_question, prefix="wq", answers="answers"),
        {"answers": [str]},
        "web_questions:1.0.0",
        test="test",
    ),
    _closed_book(
        "trivia_qa",
        78_785,
        "trivia_qa",
        format_trivia_qa,
        {"answer": {"value": str, "aliases": [str]}},
        "trivia_qa/unfiltered.nocontext:1.1.0",
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """Returns the task `name` of TASKS; for any other name, a task of custom files."""
    return TASKS[name] if name in TASKS else custom_task(name)
