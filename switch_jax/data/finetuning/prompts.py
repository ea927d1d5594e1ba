"""Text-to-text examples from the records of fine-tuning tasks.

What T5 defines is T5's text, character by character: GLUE, SuperGLUE, SQuAD and CNN/DailyMail as
in t5 0.9.4, closed-book questions as in t5_closed_book_qa (tests/golden/t5_tasks.json).

| task                 | inputs                                   | targets, and what is compared  |
|----------------------|------------------------------------------|--------------------------------|
| classification       | `cola sentence: …`: the task, its fields | class name                     |
| glue.mnli_*, ax      | `mnli hypothesis: … premise: …`          | class name                     |
| super_glue.axb, axg  | `rte hypothesis: … premise: …`           | class name                     |
| glue.stsb            | `stsb sentence1: … sentence2: …`         | `3.8`: to 0.2; as a number     |
| super_glue.multirc   | `multirc question: … answer: …           | `True`; {value: class,         |
|                      | paragraph: …`, without `<b>` and `<br>`  | group: the question}           |
| super_glue.record    | `record query: … entities: A, B          | an answer; {value: all of      |
|                      | passage: …`                              | them, group: the query}        |
| super_glue.wsc       | `wsc: … *pronoun* …`                     | noun; {value: class: is it     |
|                      |                                          | meant?, referent: noun}        |
| super_glue.dpr       | `wsc: … *pronoun* …`                     | candidate                      |
| squad                | `question: … context: …`, spaces around  | first answer; all of them      |
|                      | punctuation                              |                                |
| cnn_dailymail        | `summarize: …`                           | highlights                     |
| natural_questions    | `nq question: …`                         | first answer; all of them      |
| web_questions        | `wq question: …`                         | first answer; all of them      |
| trivia_qa            | `trivia_qa question: …`                  | its value; all of its aliases  |

T5 defines nothing for the others, and the Switch paper gives no text. Theirs is that of SPoT, by
T5's colleagues (google-research/prompt-tuning), as far as it goes.

| task       | inputs                                         | targets       | as in              |
|------------|------------------------------------------------|---------------|--------------------|
| xsum       | `summarize: …`                                 | summary       | T5's CNN/DailyMail |
| anli.r3    | `anli_r3 hypothesis: … context: …`             | `entailment`… | SPoT               |
| winogrande | `winogrande sentence: … option1: … option2: …` | option's text | SPoT               |
| arc.easy   | `arc_easy question: … choice1: … choice2: …`   | choice's text | SPoT's questions   |
|            |                                                |               | with choices; COPA |

Records of one's own files have `inputs` and `targets` already.

Where the answer is not known (a label of -1, no answers), targets are `<unk>`, or `-1.0` in
glue.stsb, and `Example.answer` is None.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from switch_jax.errors import UserError

UNKNOWN = "<unk>"
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SPACES = re.compile(r"[\t\n\f\r ]+")

# Records of wsc.fixed whose `span2_index` is not the place of the pronoun that is meant.
_WSC_BY_HAND = {
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
    """What the model reads and shall write, and what its own text is compared with.

    Attributes:
      answer: as in the tables above; None where it is not known. Elsewhere it is the targets
        or, for several accepted answers, a list of texts.
    """

    inputs: str
    targets: str
    answer: Any


Record = Mapping[str, Any]

# Of a record, and whether for training. `super_glue.record` then gives an example for every
# answer, otherwise one; `super_glue.wsc` gives none where the noun is not the one meant.
Format = Callable[[Record, bool], list[Example]]


def classification(
    record: Record,
    training: bool,
    task: str,
    prefix: str,
    fields: Mapping[str, str],
    classes: Sequence[str],
) -> list[Example]:
    """A text made of fields, and a class name.

    Args:
      fields: the record's field behind each name in the text, in the text's order.
      classes: names in the order of their labels; a record may have either.
    """
    label = _chosen(task, record["label"], classes)
    inputs = _text(prefix, {name: record[field] for name, field in fields.items()})
    return [Example(inputs, UNKNOWN if label is None else label, label)]


def stsb(record: Record, training: bool, task: str) -> list[Example]:
    """Similarity from 0 to 5, rounded to a multiple of 0.2."""
    inputs = _text("stsb", {name: record[name] for name in ("sentence1", "sentence2")})
    try:
        label = np.float32(record["label"])  # as T5: another precision rounds others down
    except (TypeError, ValueError):
        label = np.float32(np.nan)
    if label != -1 and not 0 <= label <= 5:
        raise UserError(
            f"{task}: the label {record['label']!r} is no similarity from 0 to 5, nor -1 for one"
            " that is not known; correct the record."
        )
    targets = f"{np.round(label * 5) / 5:.1f}"
    return [Example(inputs, targets, None if label == -1 else float(targets))]


def multirc(record: Record, training: bool, task: str, classes: Sequence[str]) -> list[Example]:
    """One of a question's answers, and whether it is right."""
    fields = {name: name for name in ("question", "answer", "paragraph")}
    [example] = classification(record, training, task, "multirc", fields, classes)
    inputs = re.sub("</?b>", "", example.inputs.replace("<br>", " "))
    group = (record["idx"]["paragraph"], record["idx"]["question"])
    answer = None if example.answer is None else {"value": example.answer, "group": group}
    return [Example(inputs, example.targets, answer)]


def record(record: Record, training: bool) -> list[Example]:
    """A sentence with a gap, and the entity that fills it."""
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", record["passage"])
    inputs = _text(
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


def wsc(record: Record, training: bool, task: str, classes: Sequence[str]) -> list[Example]:
    """A sentence with a pronoun, and a noun that it may stand for: T5's `wsc_simple`.

    Raises `UserError` where `span2_text` does not stand at `span2_index`.
    """
    label = _chosen(task, record["label"], classes)
    if training and label != "True":
        return []
    text, pronoun, place = record["text"], record["span2_text"], record["span2_index"]
    if text in _WSC_BY_HAND:
        text = _WSC_BY_HAND[text].format(pronoun)
    else:
        words = text.split(" ")
        if not 0 <= place < len(words) or words[place] != pronoun:
            raise UserError(
                f"{task}: span2_text={pronoun!r} is not word {place} of {text!r}; correct the"
                " record's span2_index."
            )
        text = " ".join([*words[:place], f"*{pronoun}*", *words[place + 1 :]])
    noun = record["span1_text"]
    return [Example(f"wsc: {text}", noun, label and {"value": label, "referent": noun})]


def dpr(record: Record, training: bool, task: str) -> list[Example]:
    """A sentence with a pronoun, and which of two nouns it stands for."""
    # The first is the one that is meant.
    pronoun = re.compile(rf" ({re.escape(record['pronoun'])})([ .,])")
    text = pronoun.sub(r" *\1*\2", record["sentence"], count=1)
    answer = _chosen(task, record["label"], record["candidates"])
    return [Example(f"wsc: {text}", UNKNOWN if answer is None else answer, answer)]


def squad(record: Record, training: bool) -> list[Example]:
    """A question about a text that has the answer."""
    texts = {name: _spaced(record[name]) for name in ("question", "context")}
    inputs = _SPACES.sub(" ", " ".join(f"{name}: {text}" for name, text in texts.items()))
    return _accepting(inputs, [_spaced(answer) for answer in record["answers"]["text"]])


def summarization(record: Record, training: bool, document: str, summary: str) -> list[Example]:
    """The fields `document` and `summary`."""
    return [Example(f"summarize: {record[document]}", record[summary], record[summary])]


def pair(record: Record, training: bool) -> list[Example]:
    """Inputs and targets as they are."""
    return [Example(record["inputs"], record["targets"], record["targets"])]


def open_question(record: Record, training: bool, prefix: str, answers: str) -> list[Example]:
    """A question without a text that would have the answer; the field `answers` has all."""
    return _accepting(f"{prefix} question: {record['question']}", list(record[answers]))


def trivia_qa(record: Record, training: bool) -> list[Example]:
    """As `open_question`; one answer is the usual one, the others are aliases."""
    answer = record["answer"]
    inputs = f"trivia_qa question: {record['question']}"
    return [Example(inputs, answer["value"], list(answer["aliases"]) or None)]


def arc(record: Record, training: bool, task: str, prefix: str) -> list[Example]:
    """A question with three to five choices."""
    labels, texts = list(record["choices"]["label"]), list(record["choices"]["text"])
    choices = {f"choice{number}": text for number, text in enumerate(texts, start=1)}
    inputs = _text(prefix, {"question": record["question"], **choices})
    key = record["answerKey"]
    if key in (-1, ""):
        return [Example(inputs, UNKNOWN, None)]
    if key not in labels:
        raise _no_class(task, key, labels)
    answer = texts[labels.index(key)]
    return [Example(inputs, answer, answer)]


def winogrande(record: Record, training: bool, task: str) -> list[Example]:
    """A sentence with a gap `_`, and two nouns that may fill it."""
    fields = ("sentence", "option1", "option2")
    inputs = _text("winogrande", {name: record[name] for name in fields})
    chosen = _chosen(task, record["label"], ("1", "2"))
    answer = None if chosen is None else record[f"option{chosen}"]
    return [Example(inputs, UNKNOWN if answer is None else answer, answer)]


def _text(prefix: str, parts: Mapping[str, str]) -> str:
    return " ".join([prefix, *(f"{name}: {text}" for name, text in parts.items())])


def _spaced(text: str) -> str:
    """With spaces around ASCII punctuation, and one where there were several."""
    return _SPACES.sub(" ", _PUNCTUATION.sub(r" \1 ", text))


def _accepting(inputs: str, answers: list[str]) -> list[Example]:
    return [Example(inputs, answers[0] if answers else UNKNOWN, answers or None)]


def _chosen(task: str, label: int | str, classes: Sequence[str]) -> str | None:
    """The class that a label means; None for -1.

    Labels are names or numbers; "1" is the class of this name where there is one, and the
    second class elsewhere. Raises `UserError` for any other.
    """
    if isinstance(label, str) and label in classes:
        return label
    try:
        number = int(label) if isinstance(label, str) else operator.index(label)
    except (TypeError, ValueError):
        raise _no_class(task, label, classes) from None
    if number == -1:
        return None
    if not 0 <= number < len(classes):
        raise _no_class(task, label, classes)
    return classes[number]


def _no_class(task: str, label: Any, classes: Sequence[Any]) -> UserError:
    return UserError(
        f"{task}: the label {label!r} is none of its classes ({', '.join(map(str, classes))}), nor"
        " the number of one, nor -1 for one that is not known; correct the record."
    )
