"""Metrics of the paper's fine-tuning tasks, from the text that a model wrote.

The values are those of T5 (`t5.evaluation.metrics` and `t5.data.postprocessors` of t5 0.9.4), in
per cent. `invalid` counts the predictions that are no answer at all, such as a text that names no
class; T5 scores them so: wrong, for `f1` the other class than the answer, for `matthews` a class
of their own, for correlations the number -1.
"""

import collections
import math
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from switch_jax.errors import UserError

Scores = dict[str, float]
_UNLABELLED = "Some examples have no answer to score against; take a split with labels."
_ROUGE = ("rouge1", "rouge2", "rougeLsum")
_DETERMINERS = re.compile(
    "a|an|few|her|his|each|every|many|much|my|our|some|that|the|their|these|this|those|which|whose"
    "|your"
)


class MultircAnswer(NamedTuple):
    """One of the possible answers to a question of MultiRC."""

    label: str  # a class name
    group: Hashable  # the question


class RecordAnswer(NamedTuple):
    """A query of ReCoRD, of which there may be one example for each of its answers."""

    answers: Sequence[str]  # all of them
    group: Hashable  # the query


class WscAnswer(NamedTuple):
    """Whether a pronoun stands for a noun; the model writes what it stands for."""

    referent: str  # the noun
    label: bool


def score(
    metrics: Sequence[str],
    answers: Sequence[Any],
    predictions: Sequence[str],
    classes: Sequence[str] = (),
) -> Scores:
    """Several of METRICS together.

    `classes` are those of a classification, in T5's order: `f1` and `multirc` are about the
    second of two. Without classes, `accuracy` is of free text. Raises `UserError` where a metric
    is unknown, or no answer is given.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    if len(answers) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers")
    if not answers:
        raise UserError("There is nothing to score; take a split that has examples.")
    given = (classes,) if classes else ()
    scores: Scores = {}
    for name in metrics:
        scores |= METRICS[name](answers, predictions, *given)
    return scores


def average(
    per_task: Mapping[str, Mapping[str, float]], members: Mapping[str, Sequence[str]]
) -> float:
    """The average over a benchmark's members, as GLUE's, in the unit of the scores.

    A member is one task, or several that count as one (MNLI matched and mismatched); its score
    is the mean of all that is measured of it. Raises `UserError` where a task has no scores.
    """
    missing = sorted({task for tasks in members.values() for task in tasks} - per_task.keys())
    if missing:
        raise UserError(f"The average needs {', '.join(missing)} too; evaluate all its tasks.")

    def of_member(tasks: Sequence[str]) -> float:
        scores = [per_task[task].items() for task in tasks]
        return float(np.mean([x for task in scores for name, x in task if name != "invalid"]))

    return float(np.mean([of_member(tasks) for tasks in members.values()]))


def accuracy(
    answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str] = ()
) -> Scores:
    """Predictions that are their answers, letter by letter."""
    scores = {"accuracy": _mean(a == p for a, p in zip(answers, predictions))}
    return scores | _invalid(_ids(answers, predictions, classes)[1] < 0) if classes else scores


def f1(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """F1 of the second of two classes; 0 where neither answers nor predictions have it."""
    if len(classes) != 2:
        raise ValueError(f"f1 is of two classes, not of {classes}")
    answers_N, guesses_N = _ids(answers, predictions, classes)
    decided_N = np.where(guesses_N < 0, 1 - answers_N, guesses_N)
    return {"f1": 100 * _f1(answers_N, decided_N, 1)} | _invalid(guesses_N < 0)


def macro_f1(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """Mean of the classes' F1; a class that nobody names has 0."""
    answers_N, guesses_N = _ids(answers, predictions, classes)
    each = [_f1(answers_N, guesses_N, place) for place in range(len(classes))]
    return {"macro_f1": 100 * float(np.mean(each))} | _invalid(guesses_N < 0)


def matthews(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """Matthews correlation, -100 to 100; 0 where all answers or all predictions are alike."""
    ids = _ids(answers, predictions, classes)
    one_hot = [ids_N[:, None] == np.arange(-1, len(classes)) for ids_N in ids]
    a_NxC, b_NxC = (x_NxC - x_NxC.mean(0) for x_NxC in one_hot)
    scale = math.sqrt(np.sum(a_NxC**2) * np.sum(b_NxC**2))
    value = float(np.sum(a_NxC * b_NxC)) / scale if scale else 0.0
    return {"matthews": 100 * value} | _invalid(ids[1] < 0)


def pearson(answers: Sequence[float], predictions: Sequence[str]) -> Scores:
    """Linear correlation with numbers, -100 to 100; 0, T5's NaN, where either is constant."""
    return _correlation("pearson", scipy.stats.pearsonr, answers, predictions)


def spearman(answers: Sequence[float], predictions: Sequence[str]) -> Scores:
    """Rank correlation with numbers, -100 to 100; 0, T5's NaN, where either is constant."""
    return _correlation("spearman", scipy.stats.spearmanr, answers, predictions)


def multirc(
    answers: Sequence[MultircAnswer], predictions: Sequence[str], classes: Sequence[str]
) -> Scores:
    """`f1` over all answers (F1a), and `exact_match`: questions whose answers are all right."""
    right = collections.defaultdict(list)
    for answer, prediction in zip(answers, predictions):
        right[answer.group].append(answer.label == prediction)
    exact_match = _mean(all(of_question) for of_question in right.values())
    scores = f1([answer.label for answer in answers], predictions, classes)
    return scores | {"exact_match": exact_match}


def record(answers: Sequence[RecordAnswer], predictions: Sequence[str]) -> Scores:
    """`squad` of the first example of each query."""
    first: dict[Hashable, tuple[Sequence[str], str]] = {}
    for answer, prediction in zip(answers, predictions):
        first.setdefault(answer.group, (answer.answers, prediction))
    return squad(*zip(*first.values()))


def squad(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """`exact_match` and `f1` of words with the best of a question's answers.

    As SQuAD's own program, without case, punctuation and articles: "U.S." is "us".
    """
    removed = str.maketrans("", "", string.punctuation)
    return _questions(answers, predictions, removed)


def trivia_qa(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """As `squad`, but punctuation parts words, as in TriviaQA's own program: "U.S." is "u s"."""
    spaces = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
    return _questions(answers, predictions, spaces)


def rouge(answers: Sequence[str], predictions: Sequence[str]) -> Scores:
    """`rouge1`, `rouge2` and `rougeLsum`: F-measures of words, pairs, and common subsequences.

    Each is the median of 1000 bootstrap means, which T5 draws anew at every evaluation; here they
    are those of NumPy's seed 0. Words are of ASCII letters and digits. Sentences, for `rougeLsum`,
    end at " . " or a line's end.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError('ROUGE needs rouge-score: pip install "switch_jax[metrics]".') from error
    scorer = RougeScorer(_ROUGE)
    texts = ([text.replace(" . ", " .\n") for text in pair] for pair in zip(answers, predictions))
    found = [scorer.score(answer, prediction) for answer, prediction in texts]
    draws = np.random.RandomState(0)

    def bootstrapped(values_N: np.ndarray) -> float:
        N = len(values_N)
        return float(np.median([values_N[draws.randint(0, N, N)].mean() for _ in range(1000)]))

    kinds = {kind: np.array([one[kind].fmeasure for one in found]) for kind in _ROUGE}
    return {kind: 100 * bootstrapped(values_N) for kind, values_N in kinds.items()}


def wsc(answers: Sequence[WscAnswer], predictions: Sequence[str]) -> Scores:
    """`accuracy` of whether the prediction means the referent, by T5's rule.

    It does where the words of one, determiners aside, are among those of the other ("the fuzzy
    bunny" means "bunny") and both or neither have an apostrophe ("Bob's hat" does not mean "Bob").
    """

    def clean(text: str) -> str:
        # As in T5, what two spaces part is a word as well, an empty one.
        words = text.strip().lower().split(" ")
        return " ".join(word for word in words if not _DETERMINERS.fullmatch(word))

    def means(prediction: str, referent: str) -> bool:
        said, meant = set(prediction.split(" ")), set(referent.split(" "))
        return ("'" in prediction) == ("'" in referent) and (said <= meant or meant <= said)

    cleaned = [clean(prediction) for prediction in predictions]
    right = [
        bool(text) and means(text, clean(answer.referent)) == answer.label
        for answer, text in zip(answers, cleaned)
    ]
    return {"accuracy": _mean(right)} | _invalid([not text for text in cleaned])


# By name; functions of answers, predictions and, for a classification, its classes.
METRICS: dict[str, Callable[..., Scores]] = {
    "accuracy": accuracy,  # answers: str
    "f1": f1,  # str
    "macro_f1": macro_f1,  # str
    "matthews": matthews,  # str
    "pearson": pearson,  # float
    "spearman": spearman,  # float
    "multirc": multirc,  # MultircAnswer
    "record": record,  # RecordAnswer
    "squad": squad,  # list of str
    "trivia_qa": trivia_qa,  # list of str
    "rouge": rouge,  # str
    "wsc": wsc,  # WscAnswer
}


def _mean(values: Any) -> float:
    """Mean of numbers of 0 to 1, in per cent."""
    return 100 * float(np.mean(list(values)))


def _invalid(of_them: Any) -> Scores:
    return {"invalid": int(np.sum(of_them))}


def _ids(
    answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """[N] places in `classes` of answers and of predictions; -1: no class."""
    places = {name: place for place, name in enumerate(classes)}
    answers_N, guesses_N = (
        np.array([places.get(text, -1) for text in texts]) for texts in (answers, predictions)
    )
    if -1 in answers_N:
        raise UserError(_UNLABELLED)
    return answers_N, guesses_N


def _f1(answers_N: np.ndarray, guesses_N: np.ndarray, place: int) -> float:
    """F1 of one class, 0 to 1."""
    answered_N, guessed_N = answers_N == place, guesses_N == place
    named = np.sum(answered_N) + np.sum(guessed_N)
    return float(2 * np.sum(answered_N & guessed_N) / named) if named else 0.0


def _correlation(
    name: str, of: Callable, answers: Sequence[float], predictions: Sequence[str]
) -> Scores:
    guesses_N = np.array([_number(text) for text in predictions])
    invalid_N = ~np.isfinite(guesses_N)
    guesses_N[invalid_N] = -1
    constant = any(np.unique(numbers).size == 1 for numbers in (answers, guesses_N))
    value = 0.0 if constant else of(answers, guesses_N).statistic
    return {name: 100 * float(value)} | _invalid(invalid_N)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _questions(
    answers: Sequence[Sequence[str]], predictions: Sequence[str], punctuation: dict[int, Any]
) -> Scores:
    """Exact match and F1 of normalised texts; `punctuation` says what becomes of it."""
    if not all(answers):
        raise UserError(_UNLABELLED)

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(punctuation)).split()

    def overlap(answer: list[str], guess: list[str]) -> float:
        common = (collections.Counter(answer) & collections.Counter(guess)).total()
        return 2 * common / (len(answer) + len(guess)) if common else 0.0

    pairs = [([words(one) for one in of], words(p)) for of, p in zip(answers, predictions)]
    return {
        "exact_match": _mean(guess in accepted for accepted, guess in pairs),
        "f1": _mean(max(overlap(one, guess) for one in accepted) for accepted, guess in pairs),
    }
