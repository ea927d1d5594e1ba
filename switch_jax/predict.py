"""What a model writes for the examples of fine-tuning tasks, and how good that is.

B rows of a batch    S input tokens    T output tokens    N examples    C classes
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switch_jax import losses, metrics, sharding
from switch_jax.data import downstream, open_examples, open_vocabulary
from switch_jax.data.batch import padded_batch
from switch_jax.data.spans import EOS
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.decode import generate
from switch_jax.files import write_whole
from switch_jax.step import OnMesh, Program
from switch_jax.workdir import Workdir

_BUCKET = 64  # inputs are padded to multiples, each of which is a program of its own


class Predictor:
    """Lets a model answer, on the mesh of its program; all processes must call it alike."""

    def __init__(self, program: Program, vocabulary: Vocabulary):
        self._program = program
        self._vocabulary = vocabulary
        self._feed = sharding.feed(program.mesh).rows(program.config.data.batch_size)
        whole = sharding.replicated(program.mesh)
        self._generate = OnMesh(program.mesh, self._write, out_shardings=whole)
        self._score = OnMesh(program.mesh, self._likelihood, out_shardings=whole)

    def write(self, params: Mapping[str, jax.Array], inputs: Sequence[str]) -> list[str]:
        """What the model writes for each of N inputs."""
        outputs: list[str] = [""] * len(inputs)
        for numbers, source_BxS in self._sources(inputs):
            tokens_BxT = np.asarray(self._generate(params, source_BxS))
            for number, tokens_T in zip(numbers, tokens_BxT):
                ended = np.flatnonzero(tokens_T == EOS)
                kept = tokens_T[: ended[0]] if len(ended) else tokens_T
                outputs[number] = self._vocabulary.decode(kept.tolist())
        return outputs

    def rank(
        self, params: Mapping[str, jax.Array], inputs: Sequence[str], classes: Sequence[str]
    ) -> list[str]:
        """Of C classes, the one whose text is the most likely for each of N inputs."""
        longest = self._program.config.data.targets_length
        targets_C = [self._encoded(name, longest) for name in classes]
        likelihood_NxC = np.empty((len(inputs), len(classes)))
        for numbers, source_BxS in self._sources(inputs):
            for c, target in enumerate(targets_C):
                rows = np.tile(np.array(target, np.int32), (len(self._feed), 1))
                batch = padded_batch(rows[:, :1], rows, self._program.config.data)
                batch.pop("encoder_input_tokens")
                put = {name: self._put(value) for name, value in batch.items()}
                likelihood_B = np.asarray(
                    self._score(params, put | {"encoder_input_tokens": source_BxS})
                )
                likelihood_NxC[numbers, c] = likelihood_B[: len(numbers)]
        return [classes[c] for c in likelihood_NxC.argmax(-1)]

    def _write(self, params, source_BxS):
        config = self._program.config
        model = self._program.model(params)
        return generate(
            model,
            source_BxS,
            max_length=config.data.targets_length,
            beam_size=config.eval.beam_size,
        )

    def _likelihood(self, params, batch):
        model = self._program.model(params)
        decoded, _ = model.route(batch, factor=None)
        return -losses.row_cross_entropy(*model.factors(decoded), batch)

    def _sources(self, inputs: Sequence[str]) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Batches of inputs of similar lengths, as global arrays, and which ones they are."""
        B, longest = self._program.config.data.batch_size, self._program.config.data.inputs_length
        encoded = [self._encoded(text, longest) for text in inputs]
        order = np.argsort([len(ids) for ids in encoded], kind="stable")
        for begin in range(0, len(order), B):
            numbers = order[begin : begin + B]
            length = min(-(-len(encoded[numbers[-1]]) // _BUCKET) * _BUCKET, longest)
            source_BxS = np.zeros((B, length), np.int32)
            source_BxS[:, 0] = EOS  # rows behind the last example are texts without a word
            for row, number in enumerate(numbers):
                source_BxS[row, : len(encoded[number])] = encoded[number]
            yield numbers, self._put(source_BxS[self._feed])

    def _put(self, rows: np.ndarray) -> jax.Array:
        shape = (self._program.config.data.batch_size, *rows.shape[1:])
        where = sharding.batch_sharding(self._program.mesh)
        return jax.make_array_from_process_local_data(where, rows, shape)

    def _encoded(self, text: str, longest: int) -> list[int]:
        return [*self._vocabulary.encode(text)[: longest - 1], EOS]


class Scorer:
    """The fine-tuning tasks of a mixture: answers to their validation examples, and metrics.

    Without tasks in the mixture, it does nothing. All processes must call it alike.
    """

    def __init__(self, program: Program, workdir: Workdir):
        self._config = program.config
        self._folder = workdir.predictions
        self._examples = open_examples(program.config)
        if self._examples:
            self._predictor = Predictor(program, open_vocabulary(program.config))

    def names(self) -> list[str]:
        """Of all metrics that a call gives."""
        return list(self._scores({name: [""] * len(of) for name, of in self._examples.items()}))

    def __call__(self, params: Mapping[str, jax.Array], step: int) -> dict[str, float]:
        """`<task>/<metric>` in per cent, `<task>/score` as the paper reports it, and of a mixture
        `average`, the paper's; predictions go to `predictions/STEP/<task>.jsonl`.
        """
        predictions = {}
        for name, examples in self._examples.items():
            predictions[name] = self._answered(params, name, examples)
            if jax.process_index() == 0:
                _write(self._folder / str(step) / f"{name}.jsonl", examples, predictions[name])
        return self._scores(predictions)

    def _scores(self, predictions: Mapping[str, Sequence[str]]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, examples in self._examples.items():
            values |= _scored(name, examples, predictions[name])
        mixture = downstream.MIXTURES.get(self._config.data.mixture)
        if mixture is not None:
            groups = [[values[f"{task}/score"] for task in group] for group in mixture.average]
            values["average"] = float(np.mean([np.mean(group) for group in groups]))
        return values

    def _answered(self, params: Any, name: str, examples: Sequence[Mapping]) -> list[str]:
        inputs = [example["inputs"] for example in examples]
        classes = downstream.task(name).classes
        if self._config.eval.method == "rank" and classes:
            return self._predictor.rank(params, inputs, classes)
        return self._predictor.write(params, inputs)


def render(values: Mapping[str, float]) -> str:
    """A table of what a `Scorer` gave, in lines; empty where there were no tasks."""
    of_tasks: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        task, _, metric = key.rpartition("/")
        of_tasks.setdefault(task, {})[metric] = value
    scored = {task: of for task, of in of_tasks.items() if "score" in of}
    if not scored:
        return ""
    lines = [f"{'task':30} {'score':>7}\n"]
    for task, of in scored.items():
        detail = [f"{name} {of[name]:.2f}" for name in of if name not in _BESIDE]
        if of.get("invalid"):
            detail.append(f"{of['invalid']:.0f} answers invalid")
        lines.append(f"{task:30} {of['score']:7.2f}  {', '.join(detail)}\n")
    if "average" in values:
        lines.append(f"{'average':30} {values['average']:7.2f}\n")
    return "".join(lines)


# What is no metric of a task's answers.
_BESIDE = ("score", "invalid", "cross_entropy", "neg_log_perplexity")


def _write(path: Path, examples: Sequence[Mapping], predictions: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({**example, "prediction": prediction}, ensure_ascii=False) + "\n"
        for example, prediction in zip(examples, predictions)
    ]
    write_whole(path, "".join(lines).encode())


# What metrics compare with, from `Example.answer` as JSON has it.
_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "multirc": lambda x: metrics.MultircAnswer(x["value"], tuple(x["group"])),
    "record": lambda x: metrics.RecordAnswer(x["value"], tuple(x["group"])),
    "wsc": lambda x: metrics.WscAnswer(x["referent"], x["value"] == "True"),
}


def _scored(name: str, examples: Sequence[Mapping], predictions: Sequence[str]) -> dict[str, float]:
    task = downstream.task(name)
    known = [i for i, example in enumerate(examples) if example["answer"] is not None]
    if not task.metrics or not known:
        return {}
    read = _ANSWERS.get(task.metrics[0], lambda x: x)
    answers = [read(examples[i]["answer"]) for i in known]
    # Summaries and answers in the text's own words have no classes; WSC compares with a noun.
    classes = () if task.metrics == ("wsc",) else task.classes
    values = metrics.score(task.metrics, answers, [predictions[i] for i in known], classes)
    counted = (
        [values[task.reported]]
        if task.reported
        else [value for key, value in values.items() if key != "invalid"]
    )
    values["score"] = float(np.mean(counted))
    return {f"{name}/{key}": value for key, value in values.items()}
