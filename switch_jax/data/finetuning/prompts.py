"""Prompts: text-to-text examples from the records of fine-tuning tasks.

Tasks that T5 defines have T5's text, character by character: GLUE, SuperGLUE, SQuAD and
CNN/DailyMail as in t5 0.9.4, closed-book questions as in t5_closed_book_qa
(tests/golden/t5_tasks.json).

| task                 | inputs                                   | targets; answer for metrics    |
|----------------------|------------------------------------------|--------------------------------|
| classification       | `cola sentence: …`: the task, its fields | class name                     |
| glue.mnli_*, ax      | `mnli hypothesis: … premise: …`          | class name                     |
| super_glue.axb, axg  | `rte hypothesis: … premise: …`           | class name                     |
| glue.stsb            | `stsb sentence1: … sentence2: …`         | `3.8`: to 0.2; as a number     |
| super_glue.multirc   | `multirc question: … answer: …           | `True`; {value: class,         |
|                      | paragraph: …`, without `<b>` and `<br>`  | group: the question}           |
| super_glue.record    | `record query: … entities: A, B          | an answer; {value: all of      |
|                      | passage: …`                              | them, group: the query}        |
| super_glue.wsc       | `wsc: … *pronoun* …`                     | noun; {value: class,           |
|                      |                                          | referent: noun}                |
| super_glue.dpr       | `wsc: … *pronoun* …`                     | candidate                      |
| squad                | `question: … context: …`, spaces around  | first answer; all of them      |
|                      | punctuation                              |                                |
| cnn_dailymail        | `summarize: …`                           | highlights                     |
| wmt.ende, enfr, enro | `translate English to German: …`         | the other language             |
| natural_questions    | `nq question: …`                         | first answer; all of them      |
| web_questions        | `wq question: …`                         | first answer; all of them      |
| trivia_qa            | `trivia_qa question: …`                  | its value; all of its aliases  |

Neither T5 nor the Switch paper defines text for the tasks below. It follows SPoT (google-research/
prompt-tuning) where SPoT has the task.

| task       | inputs                                         | targets       | as in              |
|------------|------------------------------------------------|---------------|--------------------|
| xsum       | `summarize: …`                                 | summary       | T5's CNN/DailyMail |
| anli.r3    | `anli_r3 hypothesis: … context: …`             | `entailment`… | SPoT               |
| winogrande | `winogrande sentence: … option1: … option2: …` | option's text | SPoT               |
| arc.easy   | `arc_easy question: … choice1: … choice2: …`   | choice's text | SPoT's questions   |
|            |                                                |               | with choices; COPA |

Records of custom files have `inputs` and `targets` already; `targets` may list several texts, of
which the first is trained on and all are accepted.

If the answer is unknown (a label of -1, no answers), targets are `<unk>`, or `-1.0` in glue.stsb,
and `Example.answer` is None. A record with another label than its task has raises
`UnusableRecord`.
"""

import operator
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from switch_jax.data.sources.bad_records import UnusableRecord

UNKNOWN = "<unk>"
_NO_CLASS = "of no class of its task"
_NO_SIMILARITY = "of no similarity from 0 to 5"
_WRONG_SPAN = "with a pronoun that is not where it says"
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SPACES = re.compile(r"[\t\n\f\r ]+")

# Records of wsc.fixed whose `span2_index` is not the index of the pronoun.
_WSC_CORRECTIONS = {
    "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out"
    ' quite loud. "Good for him," he said. ': "The boy continued to whip the pony , and eventually"
    ' the pony threw him over. John laughed out quite loud. "Good for *{}* ," he said.',
    "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic"
    " pebble in an iron safe . Some day they might want to use it , but really for now, what more"
    " could they wish for?": "When they had eventually calmed down a bit , and had gotten home, Mr."
    " Farley put the magic pebble in an iron safe . Some day they might want to use *{}* , but"
    " really for now, what more could they wish for?",
}


class Example(NamedTuple):
    """Inputs and targets of the model, and the answer that metrics compare its output with.

    Attributes:
      answer: as in the tables above; where they give none, the targets, or a list of all accepted
        texts. None if it is unknown.
    """

    inputs: str
    targets: str
    answer: Any


Record = Mapping[str, Any]

# (record, whether for training) -> examples. For training, `super_glue.record` returns an example
# for every answer, and `super_glue.wsc` none if the pronoun does not refer to the noun; otherwise
# there is one example.
Format = Callable[[Record, bool], list[Example]]


def format_classification(
    record: Record,
    training: bool,
    prefix: str,
    fields: Mapping[str, str],
    classes: Sequence[str],
) -> list[Example]:
    """Formats a classification: inputs list the fields, targets are a class name.

    Args:
      fields: name in the inputs → field of the record, in the order of the inputs.
      classes: names in the order of their numbers; the label of a record may be either.
    """
    label = _class_name(record["label"], classes)
    inputs = _join_fields(prefix, {name: record[field] for name, field in fields.items()})
    return [Example(inputs, UNKNOWN if label is None else label, label)]


def format_stsb(record: Record, training: bool) -> list[Example]:
    """Formats STS-B: targets are a similarity from 0 to 5, rounded to a multiple of 0.2."""
    inputs = _join_fields("stsb", {name: record[name] for name in ("sentence1", "sentence2")})
    try:
        label = np.float32(record["label"])  # as in T5: another precision rounds differently
    except (TypeError, ValueError):
        label = np.float32(np.nan)
    if label != -1 and not 0 <= label <= 5:
        raise UnusableRecord(_NO_SIMILARITY, f"its label is {record['label']!r}")
    targets = f"{np.round(label * 5) / 5:.1f}"
    return [Example(inputs, targets, None if label == -1 else float(targets))]


def format_multirc(record: Record, training: bool, classes: Sequence[str]) -> list[Example]:
    """Formats MultiRC: targets tell whether an answer to a question is right."""
    fields = {name: name for name in ("question", "answer", "paragraph")}
    [example] = format_classification(record, training, "multirc", fields, classes)
    inputs = re.sub("</?b>", "", example.inputs.replace("<br>", " "))
    group = (record["idx"]["paragraph"], record["idx"]["question"])
    answer = None if example.answer is None else {"value": example.answer, "group": group}
    return [Example(inputs, example.targets, answer)]


def format_record_task(record: Record, training: bool) -> list[Example]:
    """Formats ReCoRD: targets are the entity that fills the gap in a sentence."""
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", record["passage"])
    inputs = _join_fields(
        "record",
        {
            "query": record["query"],
            "entities": ", ".join(record["entities"]),
            "passage": passage.replace("\n@highlight\n", ". "),
        },
    )
    answers = list(record["answers"])
    if not answers:
        return [Example(inputs, UNKNOWN, None)]
    answer = {"value": answers, "group": (record["idx"]["passage"], record["idx"]["query"])}
    return [Example(inputs, targets, answer) for targets in (answers if training else answers[:1])]


def format_wsc(record: Record, training: bool, classes: Sequence[str]) -> list[Example]:
    """Formats WSC as T5's `wsc_simple`: targets are a noun, perhaps that of the marked pronoun.

    Raises `UnusableRecord` if `span2_text` is not the word at `span2_index`.
    """
    label = _class_name(record["label"], classes)
    if training and label != "True":
        return []
    text, pronoun, place = record["text"], record["span2_text"], record["span2_index"]
    if text in _WSC_CORRECTIONS:
        text = _WSC_CORRECTIONS[text].format(pronoun)
    else:
        words = text.split(" ")
        if not 0 <= place < len(words) or words[place] != pronoun:
            raise UnusableRecord(_WRONG_SPAN, f"span2_text {pronoun!r} is not word {place}")
        text = " ".join([*words[:place], f"*{pronoun}*", *words[place + 1 :]])
    noun = record["span1_text"]
    return [Example(f"wsc: {text}", noun, label and {"value": label, "referent": noun})]


def format_dpr(record: Record, training: bool) -> list[Example]:
    """Formats DPR: targets are the one of two nouns that the marked pronoun refers to."""
    # The first occurrence is the pronoun in question.
    pronoun = re.compile(rf" ({re.escape(record['pronoun'])})([ .,])")
    text = pronoun.sub(r" *\1*\2", record["sentence"], count=1)
    answer = _class_name(record["label"], record["candidates"])
    return [Example(f"wsc: {text}", UNKNOWN if answer is None else answer, answer)]


def format_squad(record: Record, training: bool) -> list[Example]:
    """Formats SQuAD: inputs are a question and a text that has the answer."""
    texts = {name: _space_punctuation(record[name]) for name in ("question", "context")}
    inputs = _SPACES.sub(" ", " ".join(f"{name}: {text}" for name, text in texts.items()))
    return _example_of_answers(
        inputs, [_space_punctuation(answer) for answer in record["answers"]["text"]]
    )


def format_summarization(
    record: Record, training: bool, document: str, summary: str
) -> list[Example]:
    """Formats a summarization; `document` and `summary` are the names of the fields."""
    return [Example(f"summarize: {record[document]}", record[summary], record[summary])]


def format_translation(
    record: Record, training: bool, source: str, target: str, prefix: str
) -> list[Example]:
    """Formats a translation; `source` and `target` are the names of the fields."""
    return [Example(f"{prefix}: {record[source]}", record[target], record[target])]


def format_pair(record: Record, training: bool) -> list[Example]:
    """Returns `inputs` and `targets` unchanged; of a list, the first target is trained on.

    Raises `UnusableRecord` for a list that is empty or has anything but texts.
    """
    targets = record["targets"]
    if isinstance(targets, str):
        return [Example(record["inputs"], targets, targets)]
    if not targets or not all(isinstance(text, str) for text in targets):
        raise UnusableRecord("without a target that is a text", f"targets are {targets!r:.60}")
    return [Example(record["inputs"], targets[0], list(targets))]


def format_open_question(
    record: Record, training: bool, prefix: str, answers: str
) -> list[Example]:
    """Formats a closed-book question; `answers` is the field with all accepted answers."""
    return _example_of_answers(f"{prefix} question: {record['question']}", list(record[answers]))


def format_trivia_qa(record: Record, training: bool) -> list[Example]:
    """Formats TriviaQA: targets are the usual answer; its aliases are accepted, too."""
    answer = record["answer"]
    inputs = f"trivia_qa question: {record['question']}"
    return [Example(inputs, answer["value"], list(answer["aliases"]) or None)]


def format_arc(record: Record, training: bool, prefix: str) -> list[Example]:
    """Formats ARC: inputs are a question and three to five choices, targets a choice."""
    labels, texts = list(record["choices"]["label"]), list(record["choices"]["text"])
    choices = {f"choice{number}": text for number, text in enumerate(texts, start=1)}
    inputs = _join_fields(prefix, {"question": record["question"], **choices})
    key = record["answerKey"]
    if key in (-1, ""):
        return [Example(inputs, UNKNOWN, None)]
    if key not in labels[: len(texts)]:
        raise _no_class(key, labels)
    answer = texts[labels.index(key)]
    return [Example(inputs, answer, answer)]


def format_winogrande(record: Record, training: bool) -> list[Example]:
    """Formats Winogrande: targets are the one of two nouns that fills the gap `_`."""
    fields = ("sentence", "option1", "option2")
    inputs = _join_fields("winogrande", {name: record[name] for name in fields})
    number = _class_name(record["label"], ("1", "2"))
    answer = None if number is None else record[f"option{number}"]
    return [Example(inputs, UNKNOWN if answer is None else answer, answer)]


def _join_fields(prefix: str, fields: Mapping[str, str]) -> str:
    return " ".join([prefix, *(f"{name}: {text}" for name, text in fields.items())])


def _space_punctuation(text: str) -> str:
    """Returns `text` with spaces around ASCII punctuation and without repeated spaces."""
    return _SPACES.sub(" ", _PUNCTUATION.sub(r" \1 ", text))


def _example_of_answers(inputs: str, answers: list[str]) -> list[Example]:
    return [Example(inputs, answers[0] if answers else UNKNOWN, answers or None)]


def _class_name(label: int | str, classes: Sequence[str]) -> str | None:
    """Returns the class of a label, which is a name or a number; None for -1.

    "1" is the class of this name if there is one, else the second class. Raises `UnusableRecord`
    for any other label.
    """
    if isinstance(label, str) and label in classes:
        return label
    try:
        number = int(label) if isinstance(label, str) else operator.index(label)
    except (TypeError, ValueError):
        raise _no_class(label, classes) from None
    if number == -1:
        return None
    if not 0 <= number < len(classes):
        raise _no_class(label, classes)
    return classes[number]


def _no_class(label: Any, classes: Sequence[Any]) -> UnusableRecord:
    names = ", ".join(map(str, classes))
    return UnusableRecord(_NO_CLASS, f"its label {reprlib.repr(label)} is none of {names}")
