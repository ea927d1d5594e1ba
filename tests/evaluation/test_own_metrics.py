"""Metrics of one's own tasks: equal to their libraries, and refused in one sentence."""

import numpy as np
import pytest
import scipy.stats

from switch_jax.errors import UserError
from switch_jax.evaluation.own_metrics import compute_own_metrics
from switch_jax.evaluation.task_metrics import bleu

WORDS = ("the", "red", "green", "a", "fox", "ran", "ran.", "Home", "café")


def random_texts(seed, count=200, references=3):
    """References and predictions of `count` examples; a third of the predictions are right."""
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join(rng.choice(WORDS, rng.integers(4, 9)))

    listed = [[sentence() for _ in range(rng.integers(1, references + 1))] for _ in range(count)]
    predictions = [
        texts[int(rng.integers(len(texts)))] if rng.random() < 1 / 3 else sentence()
        for texts in listed
    ]
    return listed, predictions


def test_accuracy_and_words_take_the_best_reference():
    references = [["a red fox", "The fox!"], ["ran"], ["home"]]
    predictions = ["the fox", "he ran", "home"]
    assert compute_own_metrics("accuracy", references, predictions) == {
        "accuracy": pytest.approx(100 / 3)
    }
    scores = compute_own_metrics("token_f1", references, predictions)
    assert scores["exact_match"] == pytest.approx(200 / 3)  # case, articles, punctuation removed
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)


def test_rouge_equals_rouge_score():
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    references, predictions = random_texts(0)
    kinds = ("rouge1", "rouge2", "rougeLsum")
    scorer = scorers.RougeScorer(kinds)
    expected = dict.fromkeys(kinds, 0.0)
    for texts, prediction in zip(references, predictions):
        for kind in kinds:
            best = max(scorer.score(text, prediction)[kind].fmeasure for text in texts)
            expected[kind] += 100 * best / len(predictions)
    assert compute_own_metrics("rouge", references, predictions) == pytest.approx(expected)


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    references, predictions = random_texts(1)
    longest = max(map(len, references))
    # The same with as many references for each example: a repeated one changes nothing.
    streams = [[texts[min(i, len(texts) - 1)] for texts in references] for i in range(longest)]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    found = compute_own_metrics("bleu", references, predictions)
    assert found == {"bleu": pytest.approx(expected)} and 20 < expected < 90
    first = [texts[0] for texts in references]
    translated = sacrebleu.corpus_bleu(predictions, [first], tokenize="intl").score
    assert bleu(first, predictions) == {"bleu": pytest.approx(translated)}


def test_classes_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    answers = list(rng.choice(["yes", "no", "maybe"], 200))
    predictions = list(rng.choice(["yes", "no", "maybe", "what"], 200))
    scores = compute_own_metrics("classes", [[text] for text in answers], predictions)
    expected = sklearn.f1_score(
        answers, predictions, labels=["maybe", "no", "yes"], average="macro", zero_division=0
    )
    assert scores == {
        "accuracy": pytest.approx(100 * sklearn.accuracy_score(answers, predictions)),
        "macro_f1": pytest.approx(100 * expected),
        "invalid": predictions.count("what"),
    }


def test_correlation_equals_scipy():
    rng = np.random.default_rng(3)
    numbers = rng.normal(size=200)
    predictions = [f"{number + noise:.3f}" for number, noise in zip(numbers, rng.normal(size=200))]
    found = compute_own_metrics("correlation", [[repr(float(x))] for x in numbers], predictions)
    values = [float(text) for text in predictions]
    assert found["pearson"] == pytest.approx(100 * scipy.stats.pearsonr(numbers, values)[0])
    assert found["spearman"] == pytest.approx(100 * scipy.stats.spearmanr(numbers, values)[0])


def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(references, predictions):\n    return sum(map(len, predictions))\n"
        "def both(references, predictions):\n    return {'one': 1, 'two': len(references[0])}\n"
        "def text(references, predictions):\n    return 'no number'\n"
    )
    references, predictions = [["a", "b"], ["c"]], ["a", "cc"]
    found = compute_own_metrics(f"{path}:length, accuracy", references, predictions)
    assert found == {"length": 3.0, "accuracy": 50.0} and next(iter(found)) == "length"
    assert compute_own_metrics(f"{path}:both", references, predictions) == {"one": 1.0, "two": 2.0}
    for metric, sentence in {
        f"{path}:text": r"text fails .*; it must return a number",
        f"{path}:none": r"has no function 'none'; add it",
        f"{tmp_path}/no.py:x": "there is no file",
        "bleurt": r"there is no metric 'bleurt'; use accuracy, token_f1",
        " , ": "names no metric",
    }.items():
        with pytest.raises(UserError, match=sentence):
            compute_own_metrics(metric, references, predictions)
    path.write_text("def broken(:\n")
    with pytest.raises(UserError, match=r"mine\.py fails \(SyntaxError"):
        compute_own_metrics(f"{path}:broken", references, predictions)
    with pytest.raises(UserError, match="needs targets that are numbers, and one is 'a'"):
        compute_own_metrics("correlation", references, predictions)
