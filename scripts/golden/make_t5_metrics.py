"""Writes tests/golden/t5_metrics.json: T5's metrics of known answers and predictions.

    pip install seqio==0.0.20 tensorflow==2.21.0 tensorflow-datasets==4.9.10 \
        tensorflow-text==2.21.1 babel editdistance gin-config pandas rouge-score==0.1.2 \
        sacrebleu scikit-learn==1.9.1
    pip install --no-deps t5==0.9.4
    python scripts/golden/make_t5_metrics.py tests/golden

in an environment of its own: with its dependencies, t5 replaces seqio by an older one. The
file there was made with these versions, numpy 2.4.6 and scipy 1.17.1. Two runs give equal bytes.

It is a list, one case a line: `metric`, its name in switch_jax; `classes` of a classification,
else empty; `answers` and `predictions`; `t5`, what T5 calls its values and what they are, null
where they are no number. Answers of MultiRC are [label, question], of ReCoRD [answers, [passage,
query]], of WSC [referent, label]. ROUGE is what T5 says after `np.random.seed(0)`. The case
`average` has scores by T5's tag, and the averages that T5 shows of them.
"""

import itertools
import json
import math
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from t5.data import glue_utils, postprocessors
from t5.evaluation import eval_utils, metrics

TWO, THREE = ["not_equivalent", "equivalent"], ["entailment", "contradiction", "neutral"]
TRUTH = ["False", "True"]
NO_CLASS = ["", " equivalent", "Equivalent", "equivalent.", "true", "neutral neutral", "é"]
CB = glue_utils.get_super_glue_metric("cb")[0]
OF_CLASSES = {
    "accuracy": metrics.accuracy,
    "f1": metrics.f1_score_with_invalid,
    "macro_f1": CB,
    "matthews": glue_utils.get_glue_metric("cola")[0],
}
OF_NUMBERS = {"pearson": metrics.pearson_corrcoef, "spearman": metrics.spearman_corrcoef}
NUMBERS = ["", "3.8.", "four", "-1.0", " 2.4 ", "1e1", "1_0", "٣", "-", "0", "5.0", "3,2"]
WORDS = (
    "the The a an An then U.S. U.S N.Y. don't don’t ‘so’ so “Eiffel” Eiffel Tower, tower café CAFÉ"
    " cafe\u0301 1,000 1000 1 000 _x_ x well-known well known — `quoted` quoted 東京 Ä.B. the-end !"
    " rock'n'roll"
)
NOUNS = (
    "Bob|bob |the Bob|Bob's hat|Bob’s hat|hat|my hat|the old hat|old|his|the|the a|the  a|the   a|"
    "the  cat|cat|fuzzy bunny|bunny|the fuzzy hungry bunny|bunny fuzzy||  |a\tcat|Bob. |it|Her|Bob "
    "and Ann|Ann's|the Ann's|CATS|a an few her his each every many much my our some that the their "
    "these this those which whose your cat"
)
SENTENCES = [
    "The cat sat on the mat . It was happy . ",
    "A dog barked .\nThe cat ran .",
    "the cat sat . it ran",
    "Prices rose 3.5 % in 2019 . Analysts expected 3 % .",
    "prices rose in 2019",
    "Café Zürich opened . 東京 too . ",
    "it it it it it",
    ".",
    "",
]


def sample(draw: random.Random, choices: list, count: int) -> list:
    return [draw.choice(choices) for _ in range(count)]


def phrases(draw: random.Random, longest: int) -> str:
    return " ".join(sample(draw, WORDS.split(), draw.randint(0, longest)))


def case(
    metric: str, answers: list, predictions: list, values: dict, classes: Sequence = ()
) -> dict:
    numbers = {name: float(value) for name, value in values.items()}
    numbers = {name: None if math.isnan(x) else x for name, x in numbers.items()}
    return {
        "metric": metric,
        "classes": classes,
        "answers": answers,
        "predictions": predictions,
        "t5": numbers,
    }


def classifications() -> list[dict]:
    """Random, without and with texts that name no class; all of one class; only such texts."""
    cases, draw = [], random.Random(0)
    for metric, function in OF_CLASSES.items():
        classes = {"macro_f1": THREE, "accuracy": THREE}.get(metric, TWO)
        first, last = classes[0], classes[-1]
        pairs = [
            (sample(draw, classes, n), sample(draw, classes + NO_CLASS[:invalid], n))
            for n, invalid in [(1, 0), (2, 0), (9, 0), (30, 0), (30, 2), (30, 7)]
        ]
        pairs += [
            ([first] * 5, [first] * 5),
            ([last] * 5, [last] * 5),
            ([first] * 4, [last] * 4),
            ([first] * 4, [first, first, "", last]),
            ([first, last, last], ["", "nothing", "x"]),
            ([first, last, last], [last] * 3),
            ([last, first, last, first], [last, first, last, first]),
        ]
        for answers, predictions in pairs:
            ids = [
                [postprocessors.string_label_to_class_id(text, classes) for text in texts]
                for texts in (answers, predictions)
            ]
            cases.append(case(metric, answers, predictions, function(*ids), classes))
    return cases


def correlations() -> list[dict]:
    """Random, with ties, with texts that are no numbers, and constant ones."""
    draw = random.Random(1)
    grid = [f"{x / 5:.1f}" for x in range(26)]
    pairs = [
        (sample(draw, grid, n), sample(draw, grid + NUMBERS[:invalid], n))
        for n, invalid in [(2, 0), (3, 0), (10, 0), (40, 0), (40, 6), (40, 12)]
    ]
    pairs += [
        (grid[:12], NUMBERS),
        (["1.0", "2.0", "2.0", "3.0"], ["1.0", "1.0", "4.0", "4.0"]),
        (grid, grid[::-1]),
        (grid[:4], ["2.0"] * 4),
        (["2.0"] * 4, grid[:4]),
        (grid[:3], ["a", "b", "-1"]),
    ]
    cases = []
    for metric, function in OF_NUMBERS.items():
        for answers, predictions in pairs:
            numbers = [postprocessors.string_to_float(text) for text in predictions]
            answered = [float(text) for text in answers]
            with warnings.catch_warnings(action="ignore"):  # that of a constant is undefined
                values = function(answered, numbers)
            cases.append(case(metric, answered, predictions, values))
    return cases


def multirc() -> list[dict]:
    cases, draw = [], random.Random(2)
    for n, groups, invalid in [
        (1, 1, 0),
        (8, 3, 0),
        (8, 8, 0),
        (30, 5, 0),
        (30, 12, 1),
        (30, 12, 5),
    ]:
        answers = [[draw.choice(TRUTH), draw.randrange(groups)] for _ in range(n)]
        wrong = sample(draw, TRUTH + NO_CLASS[:invalid], n)
        cases.append(
            (answers, [w if draw.random() < 0.4 else a[0] for a, w in zip(answers, wrong)])
        )
    truths = [["True", 7], ["False", 7], ["True", 2], ["True", 7], ["False", 2]]
    cases += [(truths, [label for label, _ in truths]), (truths, ["false", "", "x", "TRUE", "0"])]
    cases += [([["False", 0], ["False", 1]], ["False", "False"])]
    made = []
    for answers, predictions in cases:
        targets = [
            postprocessors.multirc(label, {"idx/question": group}, is_target=True)
            for label, group in answers
        ]
        texts = [postprocessors.multirc(text) for text in predictions]
        f1, exact_match = glue_utils.get_super_glue_metric("multirc")
        values = f1(targets, texts) | exact_match(targets, texts)
        made.append(case("multirc", answers, predictions, values, TRUTH))
    return made


def questions() -> list[dict]:
    """SQuAD, TriviaQA and ReCoRD: few words, so that they often agree."""
    draw = random.Random(3)
    pairs = []
    for n, longest in [(1, 3), (20, 1), (20, 2), (20, 3), (40, 5)]:
        answers = [[phrases(draw, longest) for _ in range(draw.randint(1, 4))] for _ in range(n)]
        near = [draw.choice(of).upper() + draw.choice(["", "!", " the", "."]) for of in answers]
        far = [phrases(draw, longest) for _ in range(n)]
        pairs.append((answers, [a if draw.random() < 0.4 else b for a, b in zip(near, far)]))
    pairs += [
        ([["the"], ["an !"], [""], ["x"]], ["", "the", "", ""]),
        ([["U.S.", "the U.S"]] * 4, ["us", "U S", "u.s", "America"]),
        ([["a cat sat"], ["cat cat dog"]], ["the cat", "cat cat cat"]),
        ([["don’t"], ["don't"], ["‘so’"], ["so_"]], ["don't", "dont", "so", "so"]),
    ]
    cases = []
    for metric, function in (("squad", metrics.squad), ("trivia_qa", metrics.trivia_qa)):
        cases += [case(metric, *pair, function(*pair)) for pair in pairs]
    (deduplicated,) = glue_utils.get_super_glue_metric("record")
    for answers, predictions in pairs:
        n = len(answers)
        groups = [[draw.randrange(2), draw.randrange(1 + n // 3)] for _ in range(n)]
        examples = [
            {"answers": of, "idx/passage": passage, "idx/query": query}
            for of, (passage, query) in zip(answers, groups)
        ]
        targets = [postprocessors.record(of, of, is_target=True) for of in examples]
        texts = [postprocessors.record(text) for text in predictions]
        values = deduplicated(targets, texts)
        cases.append(case("record", [*map(list, zip(answers, groups))], predictions, values))
    return cases


def wsc() -> list[dict]:
    """Every noun against every other one, as T5 decides, and random ones."""
    draw, nouns = random.Random(4), NOUNS.split("|")

    def decided(prediction: str, noun: str) -> int:
        return postprocessors.wsc_simple(prediction, {"targets_pretokenized": noun})

    pairs = list(itertools.product(nouns, nouns))
    cases = [([[noun, decided(said, noun) == 1] for said, noun in pairs], [x for x, _ in pairs])]
    for n in (1, 10, 40):
        answers = [[draw.choice(nouns), draw.random() < 0.5] for _ in range(n)]
        cases.append((answers, sample(draw, nouns, n)))
    made = []
    for answers, predictions in cases:
        labels = [int(label) for _, label in answers]
        ids = [decided(said, noun) for said, (noun, _) in zip(predictions, answers)]
        made.append(case("wsc", answers, predictions, metrics.accuracy(labels, ids)))
    return made


def rouge() -> list[dict]:
    draw = random.Random(5)
    pairs = [(sample(draw, SENTENCES, n), sample(draw, SENTENCES, n)) for n in (1, 2, 5, 12, 20)]
    pairs += [(SENTENCES, SENTENCES), (SENTENCES, SENTENCES[::-1])]
    pairs += [([answer], [guess]) for answer, guess in itertools.pairwise(SENTENCES[:4])]
    cases = []
    for answers, predictions in pairs:
        np.random.seed(0)
        cases.append(case("rouge", answers, predictions, metrics.rouge(answers, predictions)))
    return cases


def averages() -> list[dict]:
    draw = random.Random(6)
    tags = {tag: m.name for tag, m in eval_utils.METRIC_NAMES.items() if "average" not in tag}
    scores = {tag: round(100 * draw.random(), 3) for tag in tags if "glue" in tag}
    table = pandas.DataFrame({tags[tag]: [value] for tag, value in scores.items()})
    shown = eval_utils.compute_avg_glue(table)
    # T5 adds them in the order of a set, which changes the last bits.
    values = {name: round(shown[f"Average {name} Score"][0], 9) for name in ("GLUE", "SuperGLUE")}
    return [{"metric": "average", "scores": scores, "t5": values}]


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden", "t5_metrics.json")
    parts = (classifications, correlations, multirc, questions, wsc, rouge, averages)
    lines = [json.dumps(one, ensure_ascii=False) for part in parts for one in part()]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{path}: {len(lines)} cases, {path.stat().st_size / 1000:.0f} kB")
