"""Prompts: T5's text, our own text, labels, tasks and mixtures."""

import collections
import itertools
import json

import pytest

from switch_jax.data.finetuning.prompts import UNKNOWN, Example
from switch_jax.data.finetuning.task import Rows
from switch_jax.data.finetuning.task_mixtures import MIXTURES, TaskMixture, find_task_or_mixture
from switch_jax.data.finetuning.task_records import LABEL
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.data.sources.bad_records import UnusableRecord
from switch_jax.errors import UserError
from switch_jax.evaluation.task_metrics import METRICS
from tests.support.paths import GOLDEN

CASES = collections.defaultdict(list)
for case in json.loads((GOLDEN / "t5_tasks.json").read_text()):
    CASES[case["task"]].append(case)

OURS = {"xsum", "anli.r1", "anli.r2", "anli.r3", "arc.easy", "arc.challenge"}
OURS |= {f"winogrande.{size}" for size in ("xs", "s", "m", "l", "xl")}


WMT = {"wmt.ende": ("German", "de"), "wmt.enfr": ("French", "fr"), "wmt.enro": ("Romanian", "ro")}


def text(examples):
    return [[example.inputs, example.targets] for example in examples]


def test_t5_defines_all_tasks_but_ours():
    assert set(CASES) == set(TASKS) - OURS - set(WMT)


@pytest.mark.parametrize("name", WMT)
def test_translations_have_the_prompt_of_the_t5_paper(name):
    language, code = WMT[name]
    record = {"en": "That is good.", code: "Das ist gut."}
    prompt = f"translate English to {language}: That is good."  # figure 1 of Raffel et al.
    assert TASKS[name].format(record, True) == [Example(prompt, "Das ist gut.", "Das ist gut.")]


@pytest.mark.parametrize("name", CASES)
def test_text_equals_t5(name):
    for case in CASES[name]:
        assert text(TASKS[name].format(case["record"], case["training"])) == case["examples"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "super_glue.wsc"])
def test_evaluation_has_one_example_per_record(name):
    for case in CASES[name]:
        assert text(TASKS[name].format(case["record"], False)) == case["examples"][:1]


def sample_record(schema, name="text"):
    """A record of a schema, with a known answer."""
    match schema:
        case dict():
            return {field: sample_record(schema[field], field) for field in schema}
        case list():
            return [sample_record(schema[0], name)] * 2 if schema != [LABEL] else [0, 1]
    if schema is str:
        return "he" if name in ("span2_text", "pronoun") else f"he said {name}."
    return 1 if schema in (int, LABEL) else 2.6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_formats_a_record_of_its_schema(task, training):
    record = sample_record(task.schema)
    if task.name == "super_glue.wsc":
        record["text"] = "Tom, he said"
    examples = task.format(record, training)
    assert len(examples) == (2 if task.name == "super_glue.record" and training else 1)
    for example in examples:
        assert isinstance(example, Example) and example.answer is not None
        assert UNKNOWN not in example.targets
        assert json.loads(json.dumps(example.answer))


def test_fields_and_classes_equal_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    kinds = {str: "string", int: "int", float: "float", LABEL: "int"}

    def agrees(schema, info):
        if isinstance(schema, dict):
            return all(field in info and agrees(schema[field], info[field]) for field in schema)
        kind, rank = (schema[0], 1) if isinstance(schema, list) else (schema, 0)
        return len(info.shape) == rank and info.tf_dtype.name.startswith(kinds[kind])

    for name, task in TASKS.items():
        builder = tfds.builder(task.dataset, data_dir=tmp_path)
        assert task.version in map(str, (builder.version, *builder.supported_versions)), name
        features = builder.info.features
        assert agrees(task.schema, features.get_tensor_info()), name
        if task.classes and not name.startswith("anli"):  # there they are e, n and c
            assert tuple(features["label"].names) == task.classes, name


# Answers for metrics -------------------------------------------------------------


def golden_answers(name, training=False):
    cases = [case for case in CASES[name] if name != "super_glue.wsc" or not case["training"]]
    examples_of_cases = (TASKS[name].format(case["record"], training) for case in cases)
    return [[example.answer for example in examples] for examples in examples_of_cases]


def test_answers_of_classes_are_their_names():
    assert golden_answers("glue.cola") == [["unacceptable"], ["acceptable"], [None]]
    assert golden_answers("super_glue.boolq") == [["False"], ["True"], [None]]


def test_answers_of_stsb_are_rounded_as_in_t5():
    targets = [case["examples"][0][1] for case in CASES["glue.stsb"]]
    assert targets[-1] == "-1.0"
    expected = [*map(float, targets[:-1]), None]
    assert [answer for [answer] in golden_answers("glue.stsb")] == expected


def test_answers_of_one_question_form_a_group():
    group = (3, 14)
    assert golden_answers("super_glue.multirc") == [
        [{"value": "False", "group": group}],
        [{"value": "True", "group": group}],
        [None],
    ]


def test_record_accepts_every_answer_of_a_query():
    first = {"value": ["the Ship", "Titanic"], "group": (5, 0)}
    second = {"value": ["Titanic"], "group": (5, 1)}
    assert golden_answers("super_glue.record") == [[first], [second], [None], [None]]
    training = golden_answers("super_glue.record", training=True)
    assert training == [[first, first], [second], [None], [None]]


def test_answers_of_wsc_have_class_and_referent():
    wrong, right, unknown = golden_answers("super_glue.wsc")[:3]
    assert (wrong, right) == (
        [{"value": "False", "referent": "Tom,"}],
        [{"value": "True", "referent": "Tom,"}],
    )
    assert unknown == [None]


def test_wsc_marks_a_pronoun_at_either_end():
    record = {"span1_text": "Tom", "span2_text": "He", "label": "True"}
    for words, place in ((["He", "is", "Tom"], 0), (["Tom", "is", "He"], 2)):
        made = TASKS["super_glue.wsc"].format(
            {**record, "text": " ".join(words), "span2_index": place}, True
        )
        words[place] = "*He*"
        assert made == [
            Example(f"wsc: {' '.join(words)}", "Tom", {"value": "True", "referent": "Tom"})
        ]


def test_questions_accept_all_answers_and_trivia_the_aliases():
    assert golden_answers("squad")[0] == [["The U . S . ", "U . S . [ of A . ] ", "3–1"]]
    assert golden_answers("closed_book.natural_questions")[0] == [["Bob", 'Robert "Bob"']]
    assert golden_answers("closed_book.trivia_qa") == [[["Dave Seville", "David Seville"]], [None]]


@pytest.mark.parametrize("name", ["squad", "closed_book.web_questions"])
def test_questions_without_answers_are_unknown(name):
    record = dict(CASES[name][0]["record"])
    record["answers"] = {"text": []} if name == "squad" else []
    [example] = TASKS[name].format(record, False)
    assert example[1:] == ("<unk>", None)


# Our own formats --------------------------------------------------------------------------


def test_xsum():
    record = {"document": "A ship\nsank.", "summary": "It sank."}
    assert TASKS["xsum"].format(record, True) == [
        Example("summarize: A ship\nsank.", "It sank.", "It sank.")
    ]


def test_anli():
    record = {"context": "It rains.", "hypothesis": "It is wet.", "uid": "x", "label": 0}
    made = {
        label: TASKS["anli.r3"].format({**record, "label": label}, True)[0]
        for label in (0, 1, 2, -1)
    }
    assert {example.inputs for example in made.values()} == {
        "anli_r3 hypothesis: It is wet. context: It rains."
    }
    assert {label: example[1:] for label, example in made.items()} == {
        0: ("entailment", "entailment"),
        1: ("neutral", "neutral"),
        2: ("contradiction", "contradiction"),
        -1: ("<unk>", None),
    }


@pytest.mark.parametrize("labels", [[0, 1, 2], ["A", "B", "C"], ["1", "2", "3"]])
def test_arc(labels):
    choices = {"text": ["Ice.", "Steam", "Water"], "label": labels}
    record = {"id": "x", "question": "What melts?", "choices": choices, "answerKey": labels[0]}
    inputs = "arc_challenge question: What melts? choice1: Ice. choice2: Steam choice3: Water"
    arc = TASKS["arc.challenge"].format
    assert arc(record, True) == [Example(inputs, "Ice.", "Ice.")]
    assert arc({**record, "answerKey": labels[2]}, True) == [Example(inputs, "Water", "Water")]
    for unknown in (-1, ""):
        assert arc({**record, "answerKey": unknown}, True) == [Example(inputs, "<unk>", None)]
    with pytest.raises(UnusableRecord, match="is none of"):  # a label without a text
        arc({**record, "choices": {**choices, "text": ["Ice."]}, "answerKey": labels[2]}, True)


@pytest.mark.parametrize(
    "label, answer", [(0, "Bob"), (1, "Al"), ("1", "Bob"), ("2", "Al"), (-1, None)]
)
def test_winogrande(label, answer):
    record = {"sentence": "Al thanked _ .", "option1": "Bob", "option2": "Al", "label": label}
    assert TASKS["winogrande.xs"].format(record, True) == [
        Example(
            "winogrande sentence: Al thanked _ . option1: Bob option2: Al",
            answer or "<unk>",
            answer,
        )
    ]


# Labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1, "1", "acceptable", True])
def test_a_label_is_a_number_or_a_name(label):
    [example] = TASKS["glue.cola"].format({"sentence": "x", "label": label}, True)
    assert example == Example("cola sentence: x", "acceptable", "acceptable")


def labelled(schema, label):
    record = sample_record(schema)
    record["answerKey" if "answerKey" in schema else "label"] = label
    return record


WITH_LABELS = [name for name, task in TASKS.items() if {"label", "answerKey"} & set(task.schema)]


@pytest.mark.parametrize("label", [7, -2, "perhaps", 5.5, None])
@pytest.mark.parametrize("name", WITH_LABELS)
def test_unknown_labels_are_refused(name, label):
    task = TASKS[name]
    with pytest.raises(UnusableRecord) as error:
        task.format(labelled(task.schema, label), True)
    assert f"its label {label!r} is none of" in error.value.detail or name == "glue.stsb"
    assert all(name in error.value.detail for name in task.classes)


def test_a_wrong_index_of_the_pronoun_is_refused():
    record = dict(CASES["super_glue.wsc"][0]["record"], label=1)
    for place in (3, 99, -1):
        with pytest.raises(UnusableRecord, match=r"span2_text 'he' is not word"):
            TASKS["super_glue.wsc"].format({**record, "span2_index": place}, True)


# Tasks and mixtures -----------------------------------------------------------------------


def test_a_task_is_a_mixture_of_itself():
    mixture = find_task_or_mixture("winogrande.xl")
    assert mixture == TaskMixture("winogrande.xl", {"winogrande.xl": 40_398}, (("winogrande.xl",),))
    assert find_task_or_mixture("glue") is MIXTURES["glue"]
    with pytest.raises(UserError, match=r"no fine-tuning task 'glu'; use one of glue, mnli, .*xl"):
        find_task_or_mixture("glu")


def test_rates_equal_t5():
    assert sum(MIXTURES["glue"].rates.values()) == 949_101
    assert sum(MIXTURES["super_glue"].rates.values()) == 185_673
    evaluated = {name for m in MIXTURES.values() for name, rate in m.rates.items() if not rate}
    assert evaluated == {
        "glue.mnli_matched",
        "glue.mnli_mismatched",
        "glue.ax",
        "super_glue.axb",
        "super_glue.axg",
    }


def test_every_mixture_can_be_trained_and_evaluated():
    alone = map(find_task_or_mixture, ("squad", "cnn_dailymail", "xsum", "winogrande.xl"))
    for mixture in (*MIXTURES.values(), *alone):
        for name, rate in mixture.rates.items():
            assert (rate > 0) == ("train" in TASKS[name].splits)
        for name in itertools.chain(*mixture.average_groups):
            assert "validation" in TASKS[name].splits and TASKS[name].metrics
    for task in TASKS.values():
        assert set(task.metrics) <= set(METRICS)


def test_closed_book_validation_is_the_end_of_the_training_split():
    splits = TASKS["closed_book.trivia_qa"].splits
    assert splits["train"] == Rows("train", 0, 78_785)
    assert splits["validation"] == Rows("train", 78_785, None)
