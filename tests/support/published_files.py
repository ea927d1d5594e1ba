"""Miniatures of the files in which data sets of tasks are published: names, columns and quirks."""

import json

from switch_jax.data.finetuning.published_layouts import hub_configuration
from switch_jax.data.finetuning.tasks import TASKS
from tests.support.tasks import random_record, write_parquet

GLUE = {
    # No header; the mark of a sentence that is not acceptable; a quotation mark that is not closed.
    "glue.cola": {
        "CoLA/train.tsv": 'gj04\t1\t\tHe said "so.\nks08\t0\t*\tSaid so he.\n',
        "CoLA/dev.tsv": "gj04\t1\t\tThey read.\n",
    },
    "glue.sst2": {
        "SST-2/train.tsv": "sentence\tlabel\nhide new secretions \t0\na fine film \t1\n",
        "SST-2/dev.tsv": "sentence\tlabel\nit 's charming \t1\n",
    },
    "glue.mrpc": {
        "MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t702876\t702977\tHe said "no.\tNo, he said.\n0\t1\t2\tA dog.\tA cat.\n',
        "MRPC/dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t3\t4\tYes.\tYes!\n",
    },
    # A question that contains a line break takes two broken rows.
    "glue.qqp": {
        "QQP/train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "133273\t213221\t213222\tHow old?\tWhat age?\t1\n402555\t5\t6\tWhy so\nlong?\tWhy?\t0\n"
        "7\t8\t9\tWho?\tWhat?\t0\n",
        "QQP/dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhere?\tWhen?\t0\n",
    },
    "glue.stsb": {
        "STS-B/train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1"
        "\tsentence2\tscore\n0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn"
        " air plane.\t5.000\n1\tm\tM\t2012\t4\tn\tn\tA man.\tA dog.\t3.533\n",
        "STS-B/dev.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1"
        "\tsentence2\tscore\n0\tm\tM\t2012\t4\tn\tn\tA man.\tA man.\t4.75\n",
    },
    "glue.mnli": {
        "MNLI/train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse"
        "\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1"
        "\tgold_label\n0\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains."
        "\tIt is wet.\tentailment\tentailment\n",
    },
    **{
        f"glue.mnli_{genre}": {
            f"MNLI/dev_{genre}.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse"
            "\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
            "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n0\t6\t6e\tslate\t( a )\t( b )"
            "\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is dry.\tneutral\tcontradiction\tcontradiction"
            "\tneutral\tcontradiction\tcontradiction\n",
        }
        for genre in ("matched", "mismatched")
    },
    "glue.qnli": {
        "QNLI/train.tsv": "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1900.\tentailment\n",
        "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tIn 1900.\tnot_entailment\n",
    },
    "glue.rte": {
        "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo.\tYes.\tnot_entailment\n",
        "RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo.\tNo!\tentailment\n",
    },
    "glue.wnli": {
        "WNLI/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tI stuck it.\tIt stuck.\t1\n",
        "WNLI/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tHe saw it.\tIt saw.\t0\n",
    },
    "glue.ax": {"AX/AX.tsv": "index\tsentence1\tsentence2\n0\tThe cat sat.\tThe cat did not.\n"},
}


def _lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


_PASSAGE = {
    "text": "Ada met Bo.\n@highlight\nAda smiled.",
    "entities": [{"start": 8, "end": 9}, {"start": 0, "end": 2}, {"start": 23, "end": 25}],
}
_ANSWERS = [{"start": 8, "end": 9, "text": "Bo"}, {"start": 0, "end": 2, "text": "Ada"}] * 2
SUPER_GLUE = {
    "super_glue.boolq": {
        f"BoolQ/{split}.jsonl": _lines(
            {"question": "is it", "passage": "It is.", "idx": 0, "label": label}
        )
        for split, label in (("train", True), ("val", False))
    },
    "super_glue.cb": {
        f"CB/{split}.jsonl": _lines({"premise": "A", "hypothesis": "B", "label": label, "idx": 0})
        for split, label in (("train", "neutral"), ("val", "contradiction"))
    },
    "super_glue.copa": {
        f"COPA/{split}.jsonl": _lines(
            {
                **{"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew."},
                **{"question": "effect", "label": label, "idx": 0},
            }
        )
        for split, label in (("train", 1), ("val", 0))
    },
    "super_glue.multirc": {
        f"MultiRC/{split}.jsonl": _lines(
            {
                "idx": 0,
                "version": 1.1,
                "passage": {
                    "text": "<b>Sent 1: </b>Ada reads.<br>",
                    "questions": [
                        {
                            "question": "Who reads?",
                            "answers": [
                                {"text": "Ada", "idx": 0, "label": 1},
                                {"text": "Bo", "idx": 1, "label": 0},
                            ],
                            "idx": 0,
                        },
                        {
                            "question": "What?",
                            "answers": [{"text": "A book", "idx": 2, "label": 0}],
                            "idx": 1,
                        },
                    ],
                },
            }
        )
        for split in ("train", "val")
    },
    "super_glue.record": {
        f"ReCoRD/{split}.jsonl": _lines(
            {
                "source": "Daily mail",
                "passage": _PASSAGE,
                "idx": 0,
                "qas": [
                    {"query": "@placeholder met Ada", "answers": _ANSWERS, "idx": 0},
                    {"query": "@placeholder smiled", "answers": _ANSWERS[1:2], "idx": 1},
                ],
            }
        )
        for split in ("train", "val")
    },
    "super_glue.rte": {
        f"RTE/{split}.jsonl": _lines({"premise": "A", "hypothesis": "B", "label": label, "idx": 0})
        for split, label in (("train", "entailment"), ("val", "not_entailment"))
    },
    "super_glue.wic": {
        f"WiC/{split}.jsonl": _lines(
            {
                **{"word": "place", "sentence1": "Do you want to come to my place?"},
                **{"sentence2": "A political system with no place.", "idx": 0, "label": label},
                **{"start1": 31, "start2": 27, "end1": 36, "end2": 32, "version": 1.1},
            }
        )
        for split, label in (("train", False), ("val", True))
    },
    # Spans with another case, a period and a line break than the text.
    "super_glue.wsc": {
        f"WSC/{split}.jsonl": _lines(
            {
                "text": "Mark told Pete lies, and he was the liar.",
                "target": {
                    **{"span2_index": 5, "span1_index": 0, "span1_text": "mark"},
                    "span2_text": "He",
                },
                "idx": 0,
                "label": True,
            },
            {
                "text": "The old tree fell on it.",
                "target": {
                    **{"span2_index": 5, "span1_index": 0, "span1_text": "the old\ntree."},
                    "span2_text": "it.",
                },
                "idx": 1,
                "label": True,
            },
        )
        for split in ("train", "val")
    },
    "super_glue.axb": {
        "AX-b/AX-b.jsonl": _lines(
            {
                **{"sentence1": "A", "sentence2": "B", "idx": 0, "label": "not_entailment"},
                "logic": "Negation",
            }
        )
    },
    "super_glue.axg": {
        "AX-g/AX-g.jsonl": _lines(
            {"premise": "A", "hypothesis": "B", "idx": 0, "label": "entailment", "pair_id": 551}
        )
    },
    "super_glue.dpr": {
        "definite_pronoun_resolution/train.c.txt": "The bee landed on the flower because it had"
        " pollen. \nit\nThe bee,the flower\nthe flower\n\nBo saw Al, so he ran.\nhe\nBo,Al\nBo\n\n",
        "definite_pronoun_resolution/test.c.txt": "Bo saw Al, so he hid.\nhe\nBo, Al\nAl\n\n",
    },
}


def _article(number):
    questions = [
        {
            "question": f"What {word}?",
            "id": f"{number}{word}",
            "answers": [{"answer_start": 1, "text": "Oak"}, {"answer_start": 1, "text": "Oak and"}],
        }
        for word in ("trees", "plants")
    ]
    return {"title": "Trees", "paragraphs": [{"context": " Oak and  elm. ", "qas": questions}]}


def _anli(number):
    records = [
        {"uid": f"{i}", "context": "It rains.", "hypothesis": "It is wet.", "label": label}
        for i, label in enumerate("enc")
    ]
    return {f"anli_v1.0/R{number}/{split}.jsonl": _lines(*records) for split in ("train", "dev")}


def _arc(config):
    stem = "Which is a tree?"
    choices = [{"text": "oak", "label": "A"}, {"text": "cow", "label": "B"}]
    numbered = [{"text": "oak", "label": "1"}, {"text": "cow", "label": "2"}]
    records = (
        {"id": "M1", "question": {"stem": stem, "choices": choices}, "answerKey": "A"},
        {"id": "M2", "question": {"stem": stem, "choices": numbered}, "answerKey": "2"},
    )
    folder = f"ARC-V1-Feb2018-2/{config}"
    return {f"{folder}/{config}-{split}.jsonl": _lines(*records) for split in ("Train", "Dev")}


def _winogrande(size):
    record = {"qID": "3QX", "sentence": "Al was not Bo, so _ ran.", "option1": "Al"}
    record |= {"option2": "Bo", "answer": "2"}
    return {f"winogrande_1.1/{split}.jsonl": _lines(record) for split in (f"train_{size}", "dev")}


def _questions(count):
    return [
        {
            "url": "http://www.example.org",
            "targetValue": '(list (description Jazmyn) (description "Ad \\"a") (description B-2))',
            "utterance": f"what is {i}?",
        }
        for i in range(count)
    ]


def _trivia(count):
    answer = {
        **{"Aliases": [" Ada ", "A. L."], "NormalizedAliases": ["ada"], "NormalizedValue": "ada"},
        **{"Type": "WikipediaEntity", "Value": "Ada "},
    }
    question = {"Answer": answer, "EntityPages": [], "SearchResults": [], "QuestionSource": "x"}
    data = [{**question, "Question": f" Who is {i}? ", "QuestionId": f"q{i}"} for i in range(count)]
    return json.dumps({"Data": data, "Domain": "Web", "Version": 1.0}, indent=4)


OTHERS = {
    "squad": {
        f"{split}-v1.1.json": json.dumps({"data": [_article(1), _article(2)], "version": "1.1"})
        for split in ("train", "dev")
    },
    **{f"anli.r{number}": _anli(number) for number in (1, 2, 3)},
    "arc.easy": _arc("ARC-Easy"),
    "arc.challenge": _arc("ARC-Challenge"),
    **{f"winogrande.{size}": _winogrande(size) for size in ("xs", "s", "m", "l", "xl")},
    "closed_book.natural_questions": {
        f"NQ-open.{split}.jsonl": _lines({"question": "who", "answer": ["Ada", "A. L."]})
        for split in ("train", "dev")
    },
    "closed_book.web_questions": {
        f"webquestions.examples.{split}.json": json.dumps(_questions(2))
        for split in ("train", "test")
    },
    "closed_book.trivia_qa": {
        f"triviaqa-unfiltered/unfiltered-web-{split}.json": _trivia(2) for split in ("train", "dev")
    },
}
ARCHIVES = {**GLUE, **SUPER_GLUE, **OTHERS}


def write_archive(root, name):
    """Writes the files of a task as its authors publish them."""
    _write(root, ARCHIVES[name])


def write_closed_book_archives(root):
    """Writes the closed-book questions, with 4 training examples past those that T5 trains on."""
    rows = {
        name: TASKS[f"closed_book.{name}"].num_examples + 4
        for name in ("natural_questions", "web_questions", "trivia_qa")
    }
    question = _lines({"question": "who", "answer": ["Ada", "A. L."]})
    files = {
        "NQ-open.train.jsonl": question * rows["natural_questions"],
        "NQ-open.dev.jsonl": question,
        "webquestions.examples.train.json": json.dumps(_questions(rows["web_questions"])),
        "webquestions.examples.test.json": json.dumps(_questions(2)),
        "triviaqa-unfiltered/unfiltered-web-train.json": _trivia(rows["trivia_qa"]),
        "triviaqa-unfiltered/unfiltered-web-dev.json": _trivia(2),
    }
    _write(root, files)


def write_hub_repository(root, task, rng):
    """Writes the Parquet files of a task as they are in a repository of the hub."""
    _, layout = hub_configuration(task)
    for rows in task.splits.values():
        records = [random_record(task, rng) for _ in range(8)]
        if task.name.startswith("wmt"):
            records = [{"translation": record} for record in records]
        file = f"{layout.stem(rows.split)}-00000-of-00001.parquet"
        write_parquet(root / layout.folders[0] / file, records)


def _write(root, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
