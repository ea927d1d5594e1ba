"""Metrics of the paper's fine-tuning tasks, from predicted texts.

The values equal those of T5 (`t5.evaluation.metrics` and `t5.data.postprocessors` of t5 0.9.4), in
per cent. `invalid` is the number of predictions that are no answer, such as a text that names no
class. As in T5, an invalid prediction is wrong; for `f1` it counts as the class that is not the
answer, for `matthews` as a separate class, and for correlations as the number -1.

Axis letters: N examples · C classes.
"""

import collections
import itertools
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
ROUGE = ("rouge1", "rouge2", "rougeLsum")
_DETERMINERS = re.compile(
    "a|an|few|her|his|each|every|many|much|my|our|some|that|the|their|these|this|those|which|whose"
    "|your"
)


class MultircAnswer(NamedTuple):
    """Label of one possible answer to a question of MultiRC."""

    label: str  # class name
    group: Hashable  # question


class RecordAnswer(NamedTuple):
    """Answers to a query of ReCoRD; a query may have one example per answer."""

    answers: Sequence[str]  # all answers to the query
    group: Hashable  # query


class WscAnswer(NamedTuple):
    """A noun and whether a pronoun refers to it; the prediction is the pronoun's referent."""

    referent: str  # noun
    label: bool


def compute_metrics(
    metrics: Sequence[str],
    answers: Sequence[Any],
    predictions: Sequence[str],
    classes: Sequence[str] = (),
) -> Scores:
    """Computes several metrics.

    Args:
      metrics: names in `METRICS`.
      answers: of N examples; `METRICS` has the type for each metric.
      predictions: N texts.
      classes: class names of a classification in T5's order; of two, the second is the positive
        class of `f1` and `multirc`. Without classes, `accuracy` compares free text.

    Raises `UserError` if a metric is unknown or there are no answers.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    if len(answers) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers")
    if not answers:
        raise UserError("There is nothing to score; take a split that has examples.")
    class_argument = (classes,) if classes else ()
    scores: Scores = {}
    for name in metrics:
        scores |= METRICS[name](answers, predictions, *class_argument)
    return scores


def benchmark_average(
    scores_by_task: Mapping[str, Mapping[str, float]], members: Mapping[str, Sequence[str]]
) -> float:
    """Returns the average over the members of a benchmark such as GLUE, in the scores' unit.

    A member is one task, or several that count as one (MNLI matched and mismatched); its score is
    the mean of all metrics of its tasks, except `invalid`.

    Args:
      scores_by_task: metrics of each task.
      members: tasks of each member.

    Raises `UserError` if a task has no scores.
    """
    missing = sorted({task for tasks in members.values() for task in tasks} - scores_by_task.keys())
    if missing:
        raise UserError(f"The average needs {', '.join(missing)} too; evaluate all its tasks.")

    def member_score(tasks: Sequence[str]) -> float:
        scores = [scores_by_task[task].items() for task in tasks]
        return float(np.mean([x for task in scores for name, x in task if name != "invalid"]))

    return float(np.mean([member_score(tasks) for tasks in members.values()]))


def accuracy(
    answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str] = ()
) -> Scores:
    """Computes the share of predictions that equal their answers, letter by letter."""
    scores = {"accuracy": _mean_percent(a == p for a, p in zip(answers, predictions))}
    if not classes:
        return scores
    _, predicted_N = _class_indices(answers, predictions, classes)
    return scores | _count_invalid(predicted_N < 0)


def f1(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """Computes F1 of the second of two classes; 0 if neither answers nor predictions have it."""
    if len(classes) != 2:
        raise ValueError(f"f1 is of two classes, not of {classes}")
    answers_N, predicted_N = _class_indices(answers, predictions, classes)
    valid_N = np.where(predicted_N < 0, 1 - answers_N, predicted_N)
    return {"f1": 100 * _f1_of_class(answers_N, valid_N, 1)} | _count_invalid(predicted_N < 0)


def macro_f1(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """Computes the mean of the F1 of all classes; F1 of a class that never occurs is 0."""
    answers_N, predicted_N = _class_indices(answers, predictions, classes)
    f1_C = [_f1_of_class(answers_N, predicted_N, index) for index in range(len(classes))]
    return {"macro_f1": 100 * float(np.mean(f1_C))} | _count_invalid(predicted_N < 0)


def matthews(answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> Scores:
    """Computes Matthews correlation, -100 to 100; 0 if all answers or all predictions are equal."""
    indices = _class_indices(answers, predictions, classes)
    one_hot = [index_N[:, None] == np.arange(-1, len(classes)) for index_N in indices]
    a_NxC, b_NxC = (x_NxC - x_NxC.mean(0) for x_NxC in one_hot)
    scale = math.sqrt(np.sum(a_NxC**2) * np.sum(b_NxC**2))
    value = float(np.sum(a_NxC * b_NxC)) / scale if scale else 0.0
    return {"matthews": 100 * value} | _count_invalid(indices[1] < 0)


def pearson(answers: Sequence[float], predictions: Sequence[str]) -> Scores:
    """Computes Pearson correlation, -100 to 100; 0 (NaN in T5) if either side is constant."""
    return _correlation("pearson", scipy.stats.pearsonr, answers, predictions)


def spearman(answers: Sequence[float], predictions: Sequence[str]) -> Scores:
    """Computes Spearman correlation, -100 to 100; 0 (NaN in T5) if either side is constant."""
    return _correlation("spearman", scipy.stats.spearmanr, answers, predictions)


def multirc(
    answers: Sequence[MultircAnswer], predictions: Sequence[str], classes: Sequence[str]
) -> Scores:
    """Computes `f1` over all answers (F1a), and `exact_match`.

    `exact_match` is the share of questions with correct predictions for all of their answers.
    """
    correct_by_question = collections.defaultdict(list)
    for answer, prediction in zip(answers, predictions):
        correct_by_question[answer.group].append(answer.label == prediction)
    exact_match = _mean_percent(all(correct) for correct in correct_by_question.values())
    scores = f1([answer.label for answer in answers], predictions, classes)
    return scores | {"exact_match": exact_match}


def record(answers: Sequence[RecordAnswer], predictions: Sequence[str]) -> Scores:
    """Computes `squad` over the first example of each query."""
    first_examples: dict[Hashable, tuple[Sequence[str], str]] = {}
    for answer, prediction in zip(answers, predictions):
        first_examples.setdefault(answer.group, (answer.answers, prediction))
    return squad(*zip(*first_examples.values()))


def squad(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """Computes `exact_match` and `f1` of words with the best of a question's answers.

    As in SQuAD's own program, case, punctuation and articles are removed: "U.S." is "us".
    """
    remove_punctuation = str.maketrans("", "", string.punctuation)
    return _exact_match_and_f1(answers, predictions, remove_punctuation)


def trivia_qa(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """Computes `exact_match` and `f1` as `squad`, but with punctuation as blanks: "U.S." is "u s".

    TriviaQA's own program does the same.
    """
    punctuation_to_blank = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
    return _exact_match_and_f1(answers, predictions, punctuation_to_blank)


def rouge(answers: Sequence[str], predictions: Sequence[str]) -> Scores:
    """Computes `rouge1`, `rouge2` and `rougeLsum`: F of words, word pairs and common subsequences.

    Each is the median of 1000 bootstrap means. T5 samples them with a new seed at every evaluation;
    here the seed is NumPy's 0. Words consist of ASCII letters and digits. For `rougeLsum`,
    sentences end at " . " or at the end of a line. Raises `UserError` if rouge-score is not
    installed.
    """
    scorer = rouge_scorer()
    texts = ([text.replace(" . ", " .\n") for text in pair] for pair in zip(answers, predictions))
    examples = [scorer.score(answer, prediction) for answer, prediction in texts]
    random = np.random.RandomState(0)

    def bootstrap(values_N: np.ndarray) -> float:
        N = len(values_N)
        return float(np.median([values_N[random.randint(0, N, N)].mean() for _ in range(1000)]))

    by_kind = {kind: np.array([scores[kind].fmeasure for scores in examples]) for kind in ROUGE}
    return {kind: 100 * bootstrap(values_N) for kind, values_N in by_kind.items()}


def rouge_scorer() -> Any:
    """Returns rouge-score's scorer of `ROUGE`; raises `UserError` if it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError('ROUGE needs rouge-score: pip install "switch_jax[metrics]".') from error
    return RougeScorer(ROUGE)


def bleu(answers: Sequence[str], predictions: Sequence[str]) -> Scores:
    """Computes BLEU of the corpus, with sacrebleu's international tokens.

    Raises `UserError` if sacrebleu is not installed.
    """
    return {"bleu": corpus_bleu([[text] for text in answers], predictions, tokenize="intl")}


def corpus_bleu(
    references: Sequence[Sequence[str]], predictions: Sequence[str], tokenize: str
) -> float:
    """Returns sacrebleu's BLEU of a corpus, 0 to 100; examples may differ in their references.

    Raises `UserError` if sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError('BLEU needs sacrebleu: pip install "switch_jax[metrics]".') from error
    # One stream for each position among the references; None where an example has fewer.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    return sacrebleu.corpus_bleu(list(predictions), streams, tokenize=tokenize).score


def wsc(answers: Sequence[WscAnswer], predictions: Sequence[str]) -> Scores:
    """Computes `accuracy` of whether the prediction matches the referent, by T5's rule.

    They match if, without determiners, the words of one are a subset of the words of the other
    ("the fuzzy bunny" matches "bunny") and both or neither have an apostrophe ("Bob's hat" does not
    match "Bob").
    """

    def remove_determiners(text: str) -> str:
        # As in T5, there is an empty word between two spaces.
        words = text.strip().lower().split(" ")
        return " ".join(word for word in words if not _DETERMINERS.fullmatch(word))

    def matches(prediction: str, referent: str) -> bool:
        predicted_words, words = set(prediction.split(" ")), set(referent.split(" "))
        same_apostrophes = ("'" in prediction) == ("'" in referent)
        return same_apostrophes and (predicted_words <= words or words <= predicted_words)

    cleaned = [remove_determiners(prediction) for prediction in predictions]
    correct = [
        bool(text) and matches(text, remove_determiners(answer.referent)) == answer.label
        for answer, text in zip(answers, cleaned)
    ]
    return {"accuracy": _mean_percent(correct)} | _count_invalid([not text for text in cleaned])


# Functions of (answers, predictions), and of classes for a classification. Behind each: the type of
# an answer.
METRICS: dict[str, Callable[..., Scores]] = {
    "accuracy": accuracy,  # str
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
    "bleu": bleu,  # str
    "wsc": wsc,  # WscAnswer
}


def _mean_percent(values: Any) -> float:
    """Returns the mean of numbers from 0 to 1, in per cent."""
    return 100 * float(np.mean(list(values)))


def _count_invalid(is_invalid: Any) -> Scores:
    return {"invalid": int(np.sum(is_invalid))}


def _class_indices(
    answers: Sequence[str], predictions: Sequence[str], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices in `classes` of answers [N] and predictions [N]; -1: not a class."""
    index_of = {name: index for index, name in enumerate(classes)}
    answers_N, predicted_N = (
        np.array([index_of.get(text, -1) for text in texts]) for texts in (answers, predictions)
    )
    if -1 in answers_N:
        raise UserError(_UNLABELLED)
    return answers_N, predicted_N


def _f1_of_class(answers_N: np.ndarray, predicted_N: np.ndarray, index: int) -> float:
    """Returns F1 of one class, 0 to 1."""
    is_answer_N, is_predicted_N = answers_N == index, predicted_N == index
    total = np.sum(is_answer_N) + np.sum(is_predicted_N)
    return float(2 * np.sum(is_answer_N & is_predicted_N) / total) if total else 0.0


def _correlation(
    name: str, statistic: Callable, answers: Sequence[float], predictions: Sequence[str]
) -> Scores:
    predicted_N = np.array([parse_number(text) for text in predictions])
    invalid_N = ~np.isfinite(predicted_N)
    predicted_N[invalid_N] = -1
    constant = any(np.unique(numbers).size == 1 for numbers in (answers, predicted_N))
    value = 0.0 if constant else statistic(answers, predicted_N).statistic
    return {name: 100 * float(value)} | _count_invalid(invalid_N)


def parse_number(text: str) -> float:
    """Returns the number, or NaN if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _exact_match_and_f1(
    answers: Sequence[Sequence[str]], predictions: Sequence[str], punctuation: dict[int, Any]
) -> Scores:
    """Computes exact match and F1 of normalised texts.

    `punctuation` is a translation table for `str.translate`. Raises `UserError` if an example has
    no answers.
    """
    if not all(answers):
        raise UserError(_UNLABELLED)

    def normalised_words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(punctuation)).split()

    def word_f1(answer: list[str], predicted: list[str]) -> float:
        common = (collections.Counter(answer) & collections.Counter(predicted)).total()
        return 2 * common / (len(answer) + len(predicted)) if common else 0.0

    pairs = [
        ([normalised_words(answer) for answer in accepted], normalised_words(prediction))
        for accepted, prediction in zip(answers, predictions)
    ]
    return {
        "exact_match": _mean_percent(predicted in accepted for accepted, predicted in pairs),
        "f1": _mean_percent(
            max(word_f1(answer, predicted) for answer in accepted) for accepted, predicted in pairs
        ),
    }
