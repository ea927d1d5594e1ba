"""Published layouts: in which files the data sets of each task can be downloaded.

Files are read as they are after unpacking: those of TFDS, of the Hugging Face hub, and of the
authors of a data set. Fields become those that TFDS has.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from switch_jax.data.finetuning.layouts import VERSION, Adapt, Layout, unchanged
from switch_jax.data.finetuning.task import Task
from switch_jax.data.sources.record_files import Fields

# On the hub, of the data sets.
_ORGANISATIONS = {
    "ai2_arc": "allenai",
    "anli": "facebook",
    "cnn_dailymail": "abisee",
    "definite_pronoun_resolution": "community-datasets",
    "glue": "nyu-mll",
    "nq_open": "google-research-datasets",
    "squad": "rajpurkar",
    "super_glue": "aps",
    "trivia_qa": "mandarjoshi",
    "web_questions": "stanfordnlp",
    "winogrande": "allenai",
    "wmt15": "wmt",
    "wmt16": "wmt",
    "wmt_t2t": "wmt",
    "xsum": "EdinburghNLP",
}
TFDS, OWN_FILES, HUB_FILES = "TFDS", "files named after the splits", "Hugging Face hub"
_NO_STEMS: Mapping[str, str] = MappingProxyType({})


def layouts_of_task(task: Task) -> tuple[Layout, ...]:
    """Returns the layouts in which the files of a task are found, in the order of the search."""
    prefix = task.dataset.partition("/")[0]
    stems = {rows.split: f"{prefix}-{rows.split}" for rows in task.splits.values()}
    return (
        Layout(TFDS, (f"{task.dataset}/{VERSION}",), stems),
        Layout(OWN_FILES, (task.dataset,)),
        *_PUBLISHED.get(task.name, ()),
    )


def hub_configuration(task: Task) -> tuple[str, Layout]:
    """Returns the configuration on the hub that has a task, such as nyu-mll/glue/cola.

    The stems of the layout are the splits there.
    """
    own = Layout(HUB_FILES, (task.dataset,))
    layout = next((one for one in _PUBLISHED.get(task.name, ()) if one.name == HUB_FILES), own)
    name, _, config = layout.folders[0].partition("/")
    path = f"{_ORGANISATIONS[name]}/{name}"
    return (path if config in ("", "data") else f"{path}/{config}"), layout


# Records -----------------------------------------------------------------------------------------


def _renamed(**names: str) -> Adapt:
    """Returns a function that adds fields with other names: new name → name in the file."""

    def adapt(fields: Fields) -> list[Fields]:
        known = {new: fields[old] for new, old in names.items() if old in fields}
        return [{**fields, **known}]

    return adapt


def _unlabelled_pair(fields: Fields) -> list[Fields]:
    """GLUE's diagnostic set: its test file has no labels."""
    return [{"premise": fields["sentence1"], "hypothesis": fields["sentence2"], "label": -1}]


def _questions_of_multirc(fields: Fields) -> list[Fields]:
    passage = fields["passage"]
    return [
        {
            "paragraph": passage["text"],
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": fields["idx"], "question": question["idx"]},
            "label": answer.get("label", -1),
        }
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def _queries_of_record(fields: Fields) -> list[Fields]:
    passage = fields["passage"]
    text = passage["text"]
    # `end` is the index of the last character.
    entities = {text[entity["start"] : entity["end"] + 1] for entity in passage["entities"]}
    return [
        {
            "passage": text,
            "query": query["query"],
            "entities": sorted(entities),
            "answers": sorted({answer["text"] for answer in query.get("answers", [])}),
            "idx": {"passage": fields["idx"], "query": query["idx"]},
        }
        for query in fields["qas"]
    ]


def _spans_of_wsc(fields: Fields) -> list[Fields]:
    """Returns the record with spans that are in its text, as `super_glue/wsc.fixed` of TFDS."""
    text, target = fields["text"], dict(fields["target"])
    for span in ("span1", "span2"):
        words = target[f"{span}_text"]
        # These name people whose names are apart in the text.
        if words in text or words in ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin"):
            continue
        if "theyscold" in words:
            target["span2_index"] = 10
        first = text.split()[target[f"{span}_index"]]
        words = (words[0].lower() if first[0].islower() else words[0].upper()) + words[1:]
        target[f"{span}_text"] = words.rstrip(".").replace("\n", " ")
    return [{"text": text, **target, "label": fields.get("label", -1)}]


def _pronoun_of_dpr(fields: Fields) -> list[Fields]:
    sentence, pronoun, candidates, answer = fields["text"].split("\n")
    names = [name.strip() for name in candidates.split(",")]
    return [
        {
            "sentence": sentence.strip(),
            "pronoun": pronoun.strip(),
            "candidates": names,
            "label": answer.strip(),
        }
    ]


def _questions_of_squad(fields: Fields) -> list[Fields]:
    return [
        {
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {"text": [answer["text"] for answer in question["answers"]]},
        }
        for paragraph in fields["paragraphs"]
        for question in paragraph["qas"]
    ]


def _translation(fields: Fields) -> list[Fields]:
    return [dict(fields["translation"])]


def _anli_label(fields: Fields) -> list[Fields]:
    letters = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    return [{**fields, "label": letters.get(fields["label"], fields["label"])}]


def _choices_of_arc(fields: Fields) -> list[Fields]:
    question = fields["question"]
    choices = question["choices"]
    lists = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    return [
        {"question": question["stem"], "choices": lists, "answerKey": fields.get("answerKey", -1)}
    ]


# (list (description Jazmyn) (description "Padmé Amidala"))
_DESCRIPTION = re.compile(r'\(description (?:"([^"]+)"|([^)]+))\)')


def _answers_of_web_questions(fields: Fields) -> list[Fields]:
    found = _DESCRIPTION.findall(fields["targetValue"])
    answers = [quoted or plain for quoted, plain in found]
    return [{"question": fields["utterance"], "answers": answers}]


def _aliases_of_trivia_qa(fields: Fields) -> list[Fields]:
    answer = fields["Answer"]
    aliases = [alias.strip() for alias in answer["Aliases"]]
    known = {"value": answer["Value"].strip(), "aliases": aliases}
    return [{"question": fields["Question"].strip(), "answer": known}]


# Published layouts -------------------------------------------------------------------------------


def _hub(
    folders: Sequence[str],
    stems: Mapping[str, str] = _NO_STEMS,
    adapt: Adapt = unchanged,
) -> Layout:
    """Returns the layout of a data set's repository on the hub, or of its converted files.

    The first folder is that of the repository, the others those of other revisions.
    """
    return Layout(HUB_FILES, tuple(folders), stems, adapt=adapt)


def _glue(
    folder: str,
    stems: Mapping[str, str] = _NO_STEMS,
    columns: tuple[str, ...] | None = None,
    adapt: Adapt = unchanged,
) -> Layout:
    folders = tuple(f"{parent}{folder}" for parent in ("", "glue/", "glue_data/"))
    stems = {"validation": "dev", **stems}
    return Layout("GLUE's zip", folders, stems, "tsv", columns, adapt=adapt)


def _super_glue(
    folder: str,
    stems: Mapping[str, str] = _NO_STEMS,
    adapt: Adapt = unchanged,
) -> Layout:
    folders = tuple(f"{parent}{folder}" for parent in ("", "superglue/", "super_glue/"))
    stems = {"validation": "val", **stems}
    return Layout("SuperGLUE's zip", folders, stems, "jsonl", adapt=adapt)


def _mnli(genre: str) -> Layout:
    stems = {f"validation_{genre}": f"dev_{genre}", f"test_{genre}": f"test_{genre}"}
    adapt = _renamed(premise="sentence1", hypothesis="sentence2", label="gold_label")
    return _glue("MNLI", stems, adapt=adapt)


def _anli(number: int) -> tuple[Layout, ...]:
    in_hub = {
        "train": f"train_r{number}",
        "validation": f"dev_r{number}",
        "test": f"test_r{number}",
    }
    folders = ("anli/plain_text", "anli/data", "anli")
    return (
        _hub(folders, in_hub, _renamed(context="premise")),
        Layout(
            "ANLI's zip",
            (f"anli_v1.0/R{number}",),
            {"validation": "dev"},
            "jsonl",
            adapt=_anli_label,
        ),
    )


def _arc(config: str) -> tuple[Layout, ...]:
    stems = {"train": f"{config}-Train", "validation": f"{config}-Dev", "test": f"{config}-Test"}
    folders = (f"ARC-V1-Feb2018-2/{config}", f"ARC-V1-Feb2018/{config}")
    return (Layout("ARC's zip", folders, stems, "jsonl", adapt=_choices_of_arc),)


def _winogrande(size: str) -> tuple[Layout, ...]:
    folder, train = f"winogrande/winogrande_{size}", f"train_{size}"
    answer = _renamed(label="answer")
    return (
        _hub((folder,), {train: "train"}, answer),
        Layout(
            "Winogrande's zip", ("winogrande_1.1",), {"validation": "dev"}, "jsonl", adapt=answer
        ),
    )


_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_PUBLISHED: Mapping[str, tuple[Layout, ...]] = {
    "glue.cola": (_glue("CoLA", columns=_COLA_COLUMNS),),
    "glue.sst2": (_glue("SST-2"),),
    "glue.mrpc": (
        _glue(
            "MRPC", adapt=_renamed(sentence1="#1 String", sentence2="#2 String", label="Quality")
        ),
    ),
    "glue.qqp": (_glue("QQP", adapt=_renamed(label="is_duplicate")),),
    "glue.stsb": (_glue("STS-B", adapt=_renamed(label="score")),),
    "glue.mnli": (_mnli("matched"),),
    "glue.mnli_matched": (_mnli("matched"),),
    "glue.mnli_mismatched": (_mnli("mismatched"),),
    "glue.qnli": (_glue("QNLI"),),
    "glue.rte": (_glue("RTE"),),
    "glue.wnli": (_glue("WNLI"),),
    "glue.ax": (
        _glue("AX", {"test": "AX"}, adapt=_unlabelled_pair),
        _glue("diagnostic", {"test": "diagnostic"}, adapt=_unlabelled_pair),
    ),
    "super_glue.boolq": (_super_glue("BoolQ"),),
    "super_glue.cb": (_super_glue("CB"),),
    "super_glue.copa": (_super_glue("COPA"),),
    "super_glue.multirc": (_super_glue("MultiRC", adapt=_questions_of_multirc),),
    "super_glue.record": (_super_glue("ReCoRD", adapt=_queries_of_record),),
    "super_glue.rte": (_super_glue("RTE"),),
    "super_glue.wic": (_super_glue("WiC"),),
    "super_glue.wsc": (_super_glue("WSC", adapt=_spans_of_wsc),),
    "super_glue.axb": (_super_glue("AX-b", {"test": "AX-b"}),),
    "super_glue.axg": (_super_glue("AX-g", {"test": "AX-g"}),),
    "super_glue.dpr": (
        _hub(("definite_pronoun_resolution/plain_text", "definite_pronoun_resolution/data")),
        Layout(
            "the authors' text files",
            ("definite_pronoun_resolution", ""),
            {"train": "train.c", "test": "test.c"},
            "txt",
            adapt=_pronoun_of_dpr,
        ),
    ),
    "squad": (
        _hub(("squad/plain_text",)),
        Layout(
            "SQuAD's JSON",
            ("squad", ""),
            {"train": "train-v1.1", "validation": "dev-v1.1"},
            "json",
            items="data.item",
            adapt=_questions_of_squad,
        ),
    ),
    "cnn_dailymail": (_hub(("cnn_dailymail/3.0.0",)),),
    "xsum": (_hub(("xsum/data", "xsum/default")),),
    "wmt.ende": (_hub(("wmt_t2t/de-en",), adapt=_translation),),
    "wmt.enfr": (_hub(("wmt15/fr-en",), adapt=_translation),),
    "wmt.enro": (_hub(("wmt16/ro-en",), adapt=_translation),),
    "anli.r1": _anli(1),
    "anli.r2": _anli(2),
    "anli.r3": _anli(3),
    "arc.easy": _arc("ARC-Easy"),
    "arc.challenge": _arc("ARC-Challenge"),
    **{f"winogrande.{size}": _winogrande(size) for size in ("xs", "s", "m", "l", "xl")},
    "closed_book.natural_questions": (
        _hub(("nq_open/nq_open",)),
        Layout(
            "NQ-open's JSON lines",
            ("nq_open", ""),
            {"train": "NQ-open.train", "validation": "NQ-open.dev"},
            "jsonl",
        ),
    ),
    "closed_book.web_questions": (
        _hub(("web_questions/data", "web_questions/default")),
        Layout(
            "WebQuestions' JSON",
            ("web_questions", ""),
            {"train": "webquestions.examples.train", "test": "webquestions.examples.test"},
            "json",
            adapt=_answers_of_web_questions,
        ),
    ),
    "closed_book.trivia_qa": (
        _hub(("trivia_qa/unfiltered.nocontext",)),
        Layout(
            "TriviaQA's archive",
            ("triviaqa-unfiltered",),
            {"train": "unfiltered-web-train", "validation": "unfiltered-web-dev"},
            "json",
            items="Data.item",
            adapt=_aliases_of_trivia_qa,
        ),
    ),
}
