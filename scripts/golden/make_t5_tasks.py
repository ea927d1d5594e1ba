"""Writes tests/golden/t5_tasks.json: the prompts of T5's code for small records.

    python scripts/golden/make_t5_tasks.py tests/golden preprocessors.py

in the environment of scripts/golden/make_t5_denoising.py. `preprocessors.py` is
t5_cbqa/preprocessors.py of t5_closed_book_qa in github.com/google-research/google-research, which
no package contains; the golden file was made with commit 0c1bbe5fc971a1de1a427debc814e66ab4f1e7fa.
Two runs give equal bytes. Nothing is downloaded: the records are made up, and have all fields of
the data set in TFDS, which are checked.

    [{task, training, record, examples: [[inputs, targets], …]}, …]

`task` is a name in switch_jax.data.finetuning.tasks.TASKS. T5 formats records for training and for
evaluation alike, but for WSC.
"""

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import seqio
import t5.data.tasks  # noqa: F401, registers them
import tensorflow as tf
import tensorflow_datasets as tfds

ODD = "„Straße\" costs 5\u00a0€,\nit's  said;\tunlike <b>this</b> (1.5-2)."  # odd to whom splits it
QUOTED = 'He said "no", and left.'


def labelled(labels: tuple[Any, ...], **fields: str) -> list[dict[str, Any]]:
    return [{**fields, "label": label, "idx": i} for i, label in enumerate(labels)]


SENTENCES = {"sentence1": QUOTED, "sentence2": ODD}
INFERENCE = {"premise": ODD, "hypothesis": QUOTED}
SIMILARITIES = (
    0.0,
    0.1,
    0.25,
    0.3,
    1.5,
    2.5,
    3.2,
    3.25,
    3.75,
    3.8,
    3.9,
    4.7,
    4.699999809265137,
    4.9,
    5.0,
    -1.0,
)

GLUE = {
    "cola": labelled((0, 1, -1), sentence=ODD),
    "sst2": labelled((0, 1, -1), sentence="a gorgeous , witty , seductive movie . "),
    "mrpc": labelled((0, 1, -1), **SENTENCES),
    "qqp": labelled((0, 1, -1), question1="Why?", question2=ODD),
    "stsb": labelled(SIMILARITIES, **SENTENCES),
    "mnli": labelled((0, 1, 2), **INFERENCE),
    "mnli_matched": labelled((2, -1), **INFERENCE),
    "mnli_mismatched": labelled((0, -1), **INFERENCE),
    "qnli": labelled((0, 1, -1), question="Which one?", sentence=ODD),
    "rte": labelled((0, 1, -1), **SENTENCES),
    "wnli": labelled((0, 1, -1), **SENTENCES),
    "ax": labelled((-1,), **INFERENCE),
}

PARAGRAPH = '<b>Sent 1: </b>It was a\\n cold <i>day</i>.<br><b>Sent 2: </b>He said "no".<br>'
NEWS = (
    'A ship sank.\n@highlight\nNo one died\n@highlight\n"It\'s over!"\n@highlight\nIs it?\n'
    "@highlight\nIt is\n@highlight It was"
)
WIC_SPANS = {"start1": 3, "end1": 7, "start2": 0, "end2": 4}
SUPER_GLUE = {
    "boolq": labelled((0, 1, -1), question="is it so", passage=ODD),
    "cb": labelled((0, 1, 2, -1), **INFERENCE),
    "copa": labelled(
        (0, 1, -1), premise="It rained.", choice1=QUOTED, choice2=ODD, question="cause"
    ),
    "multirc": [
        {
            "paragraph": PARAGRAPH,
            "question": "Who <b>said</b><br>what?",
            "answer": "<<b>b> & <br/> </b>he",
            "label": label,
            "idx": {"paragraph": 3, "question": 14, "answer": 15 + label},
        }
        for label in (0, 1, -1)
    ],
    "record": [
        {
            "passage": NEWS,
            "query": 'On @placeholder, "all" were\nsaved',
            "entities": entities,
            "answers": answers,
            "idx": {"passage": 5, "query": query},
        }
        for query, (entities, answers) in enumerate(
            [
                (["Titanic", "the Ship", "O'Neill"], ["the Ship", "Titanic"]),
                (["Titanic"], ["Titanic"]),
                (["Titanic", "A, B"], []),
                ([], []),
            ]
        )
    ],
    "rte": labelled((0, 1, -1), **INFERENCE),
    "wic": [
        {**record, **WIC_SPANS}
        for record in labelled((0, 1, -1), word="said", sentence1=QUOTED, sentence2=ODD)
    ],
    "axb": labelled((-1, 0), **SENTENCES),
    "axg": labelled((-1, 1), **INFERENCE),
}


def coreference(text: str, span1: tuple[int, str], span2: tuple[int, str]) -> list[dict[str, Any]]:
    spans = {"span1_text": span1[1], "span2_text": span2[1]}
    places = {"span1_index": span1[0], "span2_index": span2[0]}
    return [{**record, **places} for record in labelled((0, 1, -1), text=text, **spans)]


PONY = (
    "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out"
    ' quite loud. "Good for him," he said. '
)
PEBBLE = (
    "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic"
    " pebble in an iron safe . Some day they might want to use it , but really for now, what more"
    " could they wish for?"
)
WSC = [
    *coreference('"Bob," asked Tom, if he  could pay. He did', (2, "Tom,"), (4, "he")),
    *coreference("When he fell, Tom's\nold friend Al laughed .", (3, "Tom's\nold"), (1, "he")),
    *coreference("The dog that it bit ran.", (0, "The dog"), (3, "it")),
    *coreference(PONY, (15, "John"), (22, "him")),
    *coreference(PEBBLE, (18, "the magic pebble"), (31, "it")),
]

DPR = [
    {"sentence": sentence, "pronoun": pronoun, "candidates": ["Bob", "the shy Tom"], "label": label}
    for sentence, pronoun in [
        ("Bob asked Tom if he can lend some, for he is he.", "he"),
        ("The heron saw Tom after he, he. left", "he"),
        ("Bob gave Tom it.", "it"),
        ("He is not found; see him?", "him"),
    ]
    for label in (0, 1)
]

SQUAD = [
    {
        "id": "56be",
        "title": "Odd_title",
        "question": question,
        "context": context,
        "answers": {"text": texts, "answer_start": [0] * len(texts)},
    }
    for question, context, texts in [
        ("Who won?", "The U.S. [of A.] won 3–1 (3:1).", ["The U.S.", "U.S. [of A.]", "3–1"]),
        ('  "What" is `x_y`\t?\n', ODD, [ODD]),
        ("No\x0bpunctuation\u00a0here\r\n", " a ~ b^c|d ", ["a ~"]),
    ]
]

NEWS_ITEMS = [
    {"id": "1", "publisher": "x", "article": NEWS, "highlights": "A ship sank .\nNo one died ."},
    {"id": "2", "publisher": "", "article": ODD, "highlights": ODD},
]

QUESTIONS = [("who is it", ["Bob", 'Robert "Bob"']), (ODD, ["5\u00a0€"])]
PAGES = {name: [] for name in ("doc_source", "filename", "title", "wiki_context")}
RESULTS = {
    name: [] for name in ("description", "filename", "rank", "search_context", "title", "url")
}
TRIVIA = [
    {
        "question": question,
        "question_id": "tc_1",
        "question_source": "http://x",
        "entity_pages": PAGES,
        "search_results": RESULTS,
        "answer": {
            "value": value,
            "aliases": aliases,
            "normalized_aliases": [alias.lower() for alias in aliases],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": value.lower(),
            "type": "WikipediaEntity",
        },
    }
    for question, value, aliases in [
        ("Who was it?", "David Seville", ["Dave Seville", "David Seville"]),
        (ODD, "<unk>", []),  # as in the test split
    ]
]


def cases(closed_book: dict[str, Any]) -> Iterator[tuple[str, bool, str, list, list]]:
    """Our task, whether for training, TFDS's data set, T5's steps before tokens, records."""

    def steps(task: str) -> list:
        found = seqio.TaskRegistry.get(task).preprocessors
        return found[: found.index(seqio.preprocessors.tokenize)]

    for name, records in GLUE.items():
        yield f"glue.{name}", True, f"glue/{name}", steps(f"glue_{name}_v002"), records
    for name, records in SUPER_GLUE.items():
        task = steps(f"super_glue_{name}_v102")
        yield f"super_glue.{name}", True, f"super_glue/{name}", task, records
    for training, part in ((True, "train"), (False, "eval")):
        task = steps(f"super_glue_wsc_v102_simple_{part}")
        # T5 would keep a label of -1; there is none in the training split.
        records = [record for record in WSC if not training or record["label"] >= 0]
        yield "super_glue.wsc", training, "super_glue/wsc.fixed", task, records
    task = steps("dpr_v001_simple")
    yield "super_glue.dpr", True, "definite_pronoun_resolution", task, DPR
    yield "squad", True, "squad/v1.1", steps("squad_v010_allanswers"), SQUAD
    yield "cnn_dailymail", True, "cnn_dailymail", steps("cnn_dailymail_v002"), NEWS_ITEMS
    for name, field, function in (
        ("natural_questions", "answer", "natural_questions_open"),
        ("web_questions", "answers", "web_questions_open"),
    ):
        url = {"url": "http://x"} if name == "web_questions" else {}
        records = [{"question": text, field: answers, **url} for text, answers in QUESTIONS]
        dataset = name if url else function
        yield f"closed_book.{name}", True, dataset, [closed_book[function]], records
    trivia = "trivia_qa/unfiltered.nocontext"
    yield "closed_book.trivia_qa", True, trivia, [closed_book["trivia_qa_open"]], TRIVIA


def tensors(value: Any, info: Any) -> Any:
    if isinstance(value, dict):
        assert set(value) == set(info), (sorted(value), sorted(info))
        return {name: tensors(part, info[name]) for name, part in value.items()}
    return tf.constant(value, info.tf_dtype)


def main(golden: str, preprocessors: str) -> None:
    made = []
    for task, training, name, steps, records in cases(runpy.run_path(preprocessors)):
        with tempfile.TemporaryDirectory() as folder:
            features = tfds.builder(name, data_dir=folder).info.features
        for record in records:
            record = dict(sorted(record.items()))
            dataset = tf.data.Dataset.from_tensors(tensors(record, features.get_tensor_info()))
            for step in steps:
                dataset = step(dataset)
            examples = [
                [example[part].decode() for part in ("inputs", "targets")]
                for example in dataset.as_numpy_iterator()
            ]
            made.append(
                {"task": task, "training": training, "record": record, "examples": examples}
            )
    path = Path(golden, "t5_tasks.json")
    lines = (json.dumps(case, ensure_ascii=False) for case in made)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{path}: {len(made)} records, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
