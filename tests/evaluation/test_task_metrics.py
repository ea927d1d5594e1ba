"""Task metrics: values of T5 in tests/golden/t5_metrics.json, and values computed by hand."""

import json
import math
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.errors import UserError
from switch_jax.evaluation.task_metrics import (
    METRICS,
    MultircAnswer,
    RecordAnswer,
    WscAnswer,
    benchmark_average,
    compute_metrics,
    macro_f1,
    multirc,
    pearson,
    record,
    rouge,
    spearman,
    squad,
    trivia_qa,
    wsc,
)
from tests.support.paths import GOLDEN

CASES = json.loads((GOLDEN / "t5_metrics.json").read_text("utf-8"))
T5_NAMES = {
    "em": "exact_match",
    "matthews_corrcoef": "matthews",
    "mean_3class_f1": "macro_f1",
    "pearson_corrcoef": "pearson",
    "spearman_corrcoef": "spearman",
}
ANSWERS = {
    "multirc": lambda label, group: MultircAnswer(label, group),
    "record": lambda answers, group: RecordAnswer(answers, tuple(group)),
    "wsc": lambda referent, label: WscAnswer(referent, label),
}
TWO, THREE = ("no", "yes"), ("entailment", "contradiction", "neutral")
GLUE = {
    "cola": ["cola"],
    "sst2": ["sst2"],
    "mrpc": ["mrpc"],
    "qqp": ["qqp"],
    "stsb": ["stsb"],
    "mnli": ["mnli_matched", "mnli_mismatched"],
    "qnli": ["qnli"],
    "rte": ["rte"],
}
SUPER_GLUE = {name: [name] for name in ("boolq", "cb", "copa", "multirc", "record")}
SUPER_GLUE |= {name: [name] for name in ("rte", "wic", "wsc")}
TEXTS = st.text("ab theU.S'‘ ", max_size=8)
# Possible answers, and classes, of the metrics that do not depend on the order of examples:
# `record` takes the first example of a query, and `rouge` samples examples by index.
KINDS = {
    "accuracy": (st.sampled_from(THREE), THREE),
    "f1": (st.sampled_from(TWO), TWO),
    "macro_f1": (st.sampled_from(THREE), THREE),
    "matthews": (st.sampled_from(TWO), TWO),
    "pearson": (st.integers(0, 25).map(lambda x: x / 5), ()),
    "spearman": (st.integers(0, 25).map(lambda x: x / 5), ()),
    "multirc": (st.builds(MultircAnswer, st.sampled_from(TWO), st.integers(0, 3)), TWO),
    "squad": (st.lists(TEXTS, min_size=1, max_size=3), ()),
    "trivia_qa": (st.lists(TEXTS, min_size=1, max_size=3), ()),
    "wsc": (st.builds(WscAnswer, st.sampled_from(["Bob", "the cat"]), st.booleans()), ()),
}


def perfect(metric, answer):
    """The prediction of a model that is always correct."""
    match metric:
        case "multirc":
            return answer.label
        case "record":
            return answer.answers[-1]
        case "wsc":
            return answer.referent if answer.label else "somebody else"
        case "squad" | "trivia_qa":
            return answer[-1]
    return str(answer)


# `bleu` is compared with sacrebleu itself in test_own_metrics.py; T5 calls it in the same way.
@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"bleu"}))
def test_metrics_equal_those_of_t5(metric):
    cases = [case for case in CASES if case["metric"] == metric]
    assert len(cases) >= 4
    for case in cases:
        answers = case["answers"]
        if metric in ANSWERS:
            answers = [ANSWERS[metric](*answer) for answer in answers]
        values = compute_metrics([metric], answers, case["predictions"], case["classes"])
        values.pop("invalid", None)
        # T5 has null for the correlation with a constant.
        expected = {T5_NAMES.get(name, name): x or 0.0 for name, x in case["t5"].items()}
        assert values == pytest.approx(expected, abs=1e-9), case


def test_benchmark_averages_equal_those_of_t5():
    (case,) = (case for case in CASES if case["metric"] == "average")
    benchmarks = {"glue_": {}, "super_glue_": {}}
    for tag, value in case["scores"].items():
        prefix = "super_glue_" if tag.startswith("super_glue_") else "glue_"
        task, name = tag.removeprefix(prefix).split("/")
        task = task.split("_v10")[0].removesuffix("_v002")
        benchmarks[prefix].setdefault(task, {"invalid": 1234})[name] = value
    assert benchmark_average(benchmarks["glue_"], GLUE) == pytest.approx(case["t5"]["GLUE"])
    super_glue = benchmark_average(benchmarks["super_glue_"], SUPER_GLUE)
    assert super_glue == pytest.approx(case["t5"]["SuperGLUE"])


def test_a_prediction_that_is_no_class_is_wrong_and_counts_as_invalid():
    answers, predictions = ["yes", "yes", "no", "no"], ["yes", "Yes", "", "no"]
    scores = compute_metrics(["f1", "accuracy", "matthews"], answers, predictions, TWO)
    # "Yes" counts as no and "" as yes: one true, one false positive, one false negative.
    assert scores["f1"] == pytest.approx(100 * 2 * 1 / (2 * 1 + 1 + 1))
    assert scores["accuracy"] == 50
    # Agree 2 of 4. Shares of no, yes and neither: 1/2, 1/2, 0 and 1/4, 1/4, 1/2.
    # (2/4 - 1/8 - 1/8) / sqrt((1 - 1/4 - 1/4) * (1 - 1/16 - 1/16 - 1/4))
    assert scores["matthews"] == pytest.approx(100 * 0.25 / math.sqrt(0.5 * 0.625))
    assert scores["invalid"] == 2


def test_macro_f1_by_hand():
    answers = ["entailment", "entailment", "neutral", "neutral"]
    predictions = ["entailment", "neutral", "neutral", "?"]
    # F1: entailment 2/(2 + 1), contradiction 0, neutral 2/(2 + 2).
    expected = {"macro_f1": 100 * (2 / 3 + 0 + 1 / 2) / 3, "invalid": 1}
    assert macro_f1(answers, predictions, THREE) == pytest.approx(expected)


def test_free_text_has_no_invalid_predictions():
    assert compute_metrics(["accuracy"], ["a dog", "b"], ["a dog", "a"]) == {"accuracy": 50}


def test_correlations_by_hand():
    answers, predictions = [1.0, 2.0, 3.0], ["1", "3.0", "two"]
    # "two" is -1: deviations (-1, 0, 1) and (0, 2, -2), of ranks (-1, 0, 1) and (0, 1, -1).
    expected = {"pearson": 100 * -2 / math.sqrt(2 * 8), "invalid": 1}
    assert pearson(answers, predictions) == pytest.approx(expected)
    expected = {"spearman": 100 * -1 / math.sqrt(2 * 2), "invalid": 1}
    assert spearman(answers, predictions) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("text", ["nan", "inf", "-1e999"])
def test_a_number_that_is_not_finite_is_invalid(metric, text):
    scores = compute_metrics([metric], [1.0, 2.0, 4.0], ["3", "2", text])
    assert scores == compute_metrics([metric], [1.0, 2.0, 4.0], ["3", "2", "?"])


def test_multirc_exact_match_needs_all_answers_of_a_question():
    answers = [MultircAnswer(label, group) for label, group in zip(["yes"] * 4, "aabb")]
    # Question a has a wrong answer. 3 true positives, 1 false negative.
    scores = multirc(answers, ["yes", "no", "yes", "yes"], TWO)
    expected = {"exact_match": 50, "f1": 100 * 2 * 3 / (2 * 3 + 1), "invalid": 0}
    assert scores == pytest.approx(expected)


def test_squad_and_trivia_qa_by_hand():
    answers, predictions = [["the U.S.", "United States"], ["a cat"]], ["US states", "The cat!"]
    # "us states" has "us" in common with "us" and "states" with "united states".
    f1 = max(2 * 1 / (2 + 1), 2 * 1 / (2 + 2))
    expected = {"exact_match": 50, "f1": 100 * (f1 + 1) / 2}
    assert squad(answers, predictions) == pytest.approx(expected)
    # "us states" has nothing in common with "u s".
    expected = {"exact_match": 50, "f1": 100 * (1 / 2 + 1) / 2}
    assert trivia_qa(answers, predictions) == pytest.approx(expected)


def test_a_query_of_record_counts_once():
    query = RecordAnswer(["Ann", "Bob"], ("passage", "query"))
    other = RecordAnswer(["Eve"], ("passage", "other"))
    scores = record([query, query, other], ["bob", "bob", "Adam"])
    assert scores == {"exact_match": 50, "f1": 50}


def test_an_empty_wsc_prediction_is_invalid_and_not_a_wrong_referent():
    answers = [WscAnswer("Bob", False)] * 2
    assert wsc(answers, ["Ann", "the"]) == {"accuracy": 50, "invalid": 1}


def test_rouge_by_hand():
    scores = rouge(["the cat sat . it ran"], ["it ran . the cat"])
    # 4 words of 5 and of 4. Pairs: "the cat", "it ran" of 4 and 3. Sentence by sentence, all 4.
    f1, f2 = 2 * 4 / (5 + 4), 2 * 2 / (4 + 3)
    expected = {"rouge1": 100 * f1, "rouge2": 100 * f2, "rougeLsum": 100 * f1}
    assert scores == pytest.approx(expected)


def test_rouge_is_the_same_every_time():
    answers, predictions = ["a b c", "d e f", "g h i"], ["a b", "d x", "y"]
    first = rouge(answers, predictions)
    assert rouge(answers, predictions) == first
    mean = 100 * (2 * 2 / 5 + 2 * 1 / 5 + 0) / 3
    assert first["rouge1"] == pytest.approx(mean, abs=3)


@pytest.mark.parametrize("metric", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_metrics_do_not_depend_on_the_order_of_examples(metric, data):
    kind, classes = KINDS[metric]
    text = st.one_of(kind.map(lambda answer: perfect(metric, answer)), TEXTS)
    pairs = data.draw(st.lists(st.tuples(kind, text), min_size=1, max_size=12))
    shuffled = random.Random(0).sample(pairs, len(pairs))
    scores = [compute_metrics([metric], *zip(*examples), classes) for examples in (pairs, shuffled)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    low = -100 if metric in ("matthews", "pearson", "spearman") else 0
    assert all(low - 1e-9 <= x <= 100 + 1e-9 for x in scores[0].values())


@pytest.mark.parametrize("metric", METRICS)
def test_a_perfect_model_scores_100(metric):
    _, classes = KINDS.get(metric, (None, ()))
    answers = {
        "pearson": [0.0, 2.4, 5.0],
        "spearman": [0.0, 2.4, 5.0],
        "multirc": [MultircAnswer(label, "question") for label in TWO],
        "record": [RecordAnswer(["Bob", "the cat"], group) for group in range(3)],
        "squad": [["Bob", "U.S."], ["no 1"]],
        "trivia_qa": [["Bob", "U.S."], ["no 1"]],
        "rouge": ["the cat . a dog", "some words"],
        "bleu": ["the cat sat there .", "some more words"],
        "wsc": [WscAnswer("the cat", label) for label in (False, True)],
    }.get(metric, classes)
    scores = compute_metrics(
        [metric], answers, [perfect(metric, answer) for answer in answers], classes
    )
    assert scores.pop("invalid", 0) == 0
    assert scores == pytest.approx(dict.fromkeys(scores, 100))


def test_errors_name_the_reason_why_there_is_no_score():
    with pytest.raises(UserError, match=r"no metric 'meteor'; the metrics are accuracy, f1, .*wsc"):
        compute_metrics(["accuracy", "meteor"], ["a"], ["a"])
    with pytest.raises(UserError, match="nothing to score"):
        compute_metrics(["accuracy"], [], [])
    with pytest.raises(UserError, match="a split with labels"):
        compute_metrics(["accuracy"], ["<unk>"], ["yes"], TWO)
    with pytest.raises(UserError, match="a split with labels"):
        compute_metrics(["squad"], [[]], ["yes"])
    with pytest.raises(UserError, match="needs qnli, rte too"):
        benchmark_average(
            {name: {"accuracy": 1.0} for name in list(GLUE)[:5]},
            {"qqp": ["qqp"], "rte": ["rte"], "qnli": ["qnli"]},
        )
    with pytest.raises(ValueError, match="2 predictions for 1 answers"):
        compute_metrics(["accuracy"], ["a"], ["a", "b"])


def test_rouge_without_its_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r'pip install "switch_jax\[metrics\]"'):
        rouge(["a"], ["a"])
