"""Task predictions on any mesh, their scores and files, and the best checkpoint."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_jax.analysis.run_plots import draw_run_plots, read_runs, score_metrics
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.metrics_log import sort_key
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config.load import override_config
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.data.batch import ALL_ROWS
from switch_jax.data.finetuning.task import custom_task
from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.evaluation.task_predictions import Predictor
from switch_jax.evaluation.task_scores import TaskScorer, _score_task, scores_table
from switch_jax.evaluation.validation_loss import evaluate, evaluate_checkpoint, validation_batches
from switch_jax.model import ShardedModel
from switch_jax.training.loop import train
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support import tasks as miniature
from tests.support.configs import tiny
from tests.support.vocabularies import write_letters

INPUTS = [f"glue rte: number {i}, {'longer and ' * i}" for i in range(7)]  # batches of 4
CLASSES = ["yes", "no", "perhaps"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two tasks and a user's own pairs, with the byte vocabulary, for a few training steps."""
    root, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    for name in ("glue.rte", "glue.mrpc"):
        for rows in TASKS[name].splits.values():
            records = [miniature.random_record(TASKS[name], rng) for _ in range(5)]
            miniature.write_jsonl(root / TASKS[name].dataset / f"{rows.split}.jsonl", records)
    for split in ("train", "validation"):
        pairs = [{"inputs": f"twice {i}", "targets": f"{i} {i}"} for i in range(5)]
        miniature.write_jsonl(root / "twice" / f"{split}.jsonl", pairs)
    mixture = f"glue.rte=1, glue.mrpc=1, pairs:{root}/twice/{{split}}.jsonl=1"
    return tiny(
        **{
            "model.vocab_size": 384,
            "data.mixture": mixture,
            "data.data_dir": str(root),
            "data.vocabulary": "bytes",
            "data.inputs_length": 128,
            "data.batch_size": 4,
            "moe.group_size": 8,
            "mesh.data": 1,
            "train.steps": 6,
            "train.log_every": 2,
            "train.eval_every": 2,
            "train.eval_batches": 1,
            "train.checkpoint_every": 2,
            "train.keep_checkpoints": 1,
            "train.keep_best": "pairs.twice/cross_entropy",
        }
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "run")
    assert train(config, workdir) is None
    return workdir


def spread_parameters(program):
    """Parameters far from the initial ones, so that predictions differ between inputs."""
    params = program.init().params
    keys = jax.random.split(jax.random.key(1), len(params))
    for key, name in zip(keys, sorted(params)):
        if "attention" in name:
            old = params[name]
            params[name] = jax.device_put(old + jax.random.normal(key, old.shape), old.sharding)
    return params


def evaluations(workdir):
    lines = map(json.loads, workdir.metrics_file.read_text().splitlines())
    return {line["step"]: line for line in lines if line["split"] == "eval"}


def test_every_evaluation_writes_its_predictions(run):
    for step in (2, 4, 6):
        for task in ("glue.rte", "glue.mrpc", "pairs.twice"):
            lines = (run.predictions / str(step) / f"{task}.jsonl").read_text().splitlines()
            assert len(lines) == 5
            assert {"inputs", "targets", "answer", "prediction"} == set(json.loads(lines[0]))
    last = evaluations(run)[6]
    assert {"glue.mrpc/f1", "glue.mrpc/score", "pairs.twice/accuracy"} < set(last)
    assert last["glue.mrpc/score"] == np.mean([last["glue.mrpc/f1"], last["glue.mrpc/accuracy"]])
    scores = [last[f"{task}/score"] for task in ("glue.rte", "glue.mrpc", "pairs.twice")]
    assert last["average"] == pytest.approx(np.mean(scores))


def test_eval_of_a_checkpoint_equals_the_evaluation_during_training(run, config):
    [folder] = [f for f in run.checkpoints.iterdir() if f.name == "6"]
    alone = evaluate_checkpoint(run, folder, config)
    during = evaluations(run)[6]
    for name, value in alone.items():
        if name != "unigram_entropy":
            assert value == pytest.approx(during[name], rel=1e-6), name
    before = (run.predictions / "6" / "glue.rte.jsonl").read_text()
    assert (run.predictions / "eval-6" / "glue.rte.jsonl").read_text() == before


def test_validation_loss_counts_every_example_once(config):
    """Five examples of a task in batches of four, with `train.eval_batches=3`."""
    many = override_config(config, {"train.eval_batches": "3"})
    for name, batches in validation_batches(many, ALL_ROWS).items():
        assert len(batches) == 2, name
        rows = np.concatenate([batch["encoder_input_tokens"] for batch in batches])
        weights = np.concatenate([batch["decoder_loss_weights"] for batch in batches])
        assert rows.any(1).tolist() == weights.any(1).tolist() == [True] * 5 + [False] * 3
        assert len({row.tobytes() for row in rows[:5]}) == 5
    program = TrainProgram(many, make_mesh(many))
    metrics = evaluate(program.sharded, program.init().params, validation_batches(many, ALL_ROWS))
    alone = override_config(many, {"data.batch_size": "1", "train.eval_batches": "9"})
    program = TrainProgram(alone, make_mesh(alone))
    expected = evaluate(program.sharded, program.init().params, validation_batches(alone, ALL_ROWS))
    for source in ("glue.rte", "glue.mrpc", "pairs.twice"):
        name = f"{source}/cross_entropy"
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5)


def test_examples_without_an_answer_are_predicted_but_not_scored(config, tmp_path):
    rng = np.random.default_rng(0)
    records = [miniature.random_record(TASKS["glue.rte"], rng) for _ in range(6)]
    for split in ("train", "validation"):
        path = tmp_path / "glue" / "rte" / f"{split}.jsonl"
        miniature.write_jsonl(path, [*records[:4], *({**r, "label": -1} for r in records[4:])])
        ax = tmp_path / "glue" / "ax" / "test.jsonl"
        inference = {"premise": "It is.", "hypothesis": "It was.", "label": -1}
        miniature.write_jsonl(ax, [inference] * 3)
    changes = {"data.mixture": "glue.rte, glue.ax", "data.data_dir": str(tmp_path)}
    some = override_config(config, changes | {"train.keep_best": "none"})
    program = TrainProgram(some, make_mesh(some))
    scorer = TaskScorer(program.sharded)
    scores = scorer(program.init().params, tmp_path / "predictions")
    assert set(scores) == {"glue.rte/accuracy", "glue.rte/invalid", "glue.rte/score", "average"}
    assert scorer.metric_names == list(scores)
    lines = {p.stem: p.read_text().count("\n") for p in (tmp_path / "predictions").iterdir()}
    assert lines == {"glue.rte": 6, "glue.ax": 3}
    assert set(validation_batches(some, ALL_ROWS)) == {"glue.rte"}
    [batch] = validation_batches(some, ALL_ROWS)["glue.rte"]
    assert batch["decoder_loss_weights"].any(1).all()


def test_there_is_no_average_if_a_task_of_the_mixture_has_no_score(config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, key in (("arc.easy", "A"), ("arc.challenge", "")):
        records = [miniature.random_record(TASKS[name], rng) | {"answerKey": key} for _ in range(3)]
        for split in ("train", "validation"):
            labelled = (
                records if split == "validation" else [{**r, "answerKey": "A"} for r in records]
            )
            miniature.write_jsonl(tmp_path / TASKS[name].dataset / f"{split}.jsonl", labelled)
    changes = {"data.mixture": "arc", "data.data_dir": str(tmp_path), "train.keep_best": "none"}
    some = override_config(config, changes)
    names = TaskScorer(ShardedModel(some, make_mesh(some))).metric_names
    assert names == ["arc.easy/accuracy", "arc.easy/score"]
    assert "There is no average: arc.challenge has no labelled" in capsys.readouterr().err


def test_free_text_targets_are_compared_as_the_vocabulary_decodes_them(config, tmp_path, capsys):
    pairs = [{"inputs": "say it", "targets": text} for text in ("longer than rows", "1  2")]
    for split in ("train", "validation"):
        miniature.write_jsonl(tmp_path / f"{split}.jsonl", pairs)
    changes = {"data.mixture": f"pairs:{tmp_path}/{{split}}.jsonl", "train.keep_best": "none"}
    some = override_config(config, changes | {"data.data_dir": "none"})
    scorer = TaskScorer(ShardedModel(some, make_mesh(some)))
    assert "1 of 2 validation targets are longer than data.targets_length=8" in (
        capsys.readouterr().err
    )

    class FoldsBlanks:
        def encode(self, text):
            return text.split()

        def decode(self, ids):
            return " ".join(ids)

    task, [_, example] = custom_task("pairs.x"), next(iter(scorer._examples.values()))
    scores = _score_task(task, [example], ["1 2"], FoldsBlanks(), "accuracy")
    assert scores["accuracy"] == 100


def test_targets_that_the_vocabulary_cannot_write_are_told_and_scored_as_they_are(
    config, tmp_path, capsys
):
    targets = ("{<name>}", "{<value>}", "{<object>}", "list")
    for split in ("train", "validation"):
        pairs = [{"inputs": "say it", "targets": text} for text in targets]
        miniature.write_jsonl(tmp_path / f"{split}.jsonl", pairs)
    changes = {
        "data.mixture": f"pairs:{tmp_path}/{{split}}.jsonl",
        "train.keep_best": "none",
        "data.data_dir": "none",
        "data.vocabulary": str(write_letters(tmp_path / "letters.model")),
    }
    some = override_config(config, changes)
    scorer = TaskScorer(ShardedModel(some, make_mesh(some)))
    assert (
        "3 of 4 validation targets have characters that the vocabulary cannot write, so that no"
        " prediction equals them; the first is '{<name>}' and becomes '⁇ name ⁇'."
    ) in capsys.readouterr().err
    [examples], vocabulary = scorer._examples.values(), open_vocabulary(some)
    predictions = [vocabulary.decode(vocabulary.encode(text)) for text in targets]
    assert predictions == ["⁇ name ⁇", "⁇ value ⁇", "⁇ object ⁇", "list"]
    scores = _score_task(
        custom_task("pairs.x"), examples, predictions, vocabulary, "accuracy, token_f1"
    )
    assert scores["accuracy"] == scores["score"] == 25 and scores["f1"] > 50


def test_an_unwritable_folder_of_predictions_is_an_error_before_predicting(config, tmp_path):
    (tmp_path / "file").write_text("")
    scorer = TaskScorer(ShardedModel(config, make_mesh(config)))
    with pytest.raises(UserError, match=r"Predictions cannot be written to .*file"):
        scorer({}, tmp_path / "file" / "6")


def test_the_eval_command_prints_a_table_of_scores(run, capsys):
    assert main(["eval", "--workdir", str(run.path)]) == 0
    out = capsys.readouterr().out
    during = evaluations(run)[6]
    for task in ("glue.rte", "glue.mrpc", "pairs.twice"):
        [line] = [line for line in out.splitlines() if line.startswith(task)]
        assert float(line.split()[1]) == pytest.approx(during[f"{task}/score"], abs=0.01)
    assert scores_table({"cross_entropy": 1.0, "python_docs/accuracy": 0.5}) == ""


def predictions_on_mesh(config, **mesh):
    """Generated texts and chosen classes for INPUTS, and the predictor."""
    changed = override_config(config, {f"mesh.{k}": str(v) for k, v in mesh.items()})
    program = TrainProgram(changed, make_mesh(changed))
    predictor = Predictor(program.sharded, open_vocabulary(changed))
    params = spread_parameters(program)
    generated = predictor.generate(params, INPUTS)
    chosen = predictor.most_probable_class(params, INPUTS, CLASSES)
    return generated, chosen, predictor


@pytest.fixture(scope="module")
def on_one_device(config):
    return predictions_on_mesh(config)


def test_task_scores_are_plotted(run, tmp_path):
    figures = {path.name for path in draw_run_plots(read_runs([run, run]), tmp_path)}
    assert "tasks.png" in figures
    lines = [{"step": 1, "split": "eval", "average": 1.0, "squad/score": 1.0}]
    assert score_metrics({"a": lines}) == ["squad/score"]
    assert score_metrics({"a": [*lines, {"xsum/score": 2.0}]})[0] == "average"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"expert": 2, "model": 2}, {"data": 4, "fsdp": True}])
def test_predictions_are_the_same_on_any_mesh(config, on_one_device, mesh):
    generated, chosen, _ = predictions_on_mesh(config, **mesh)
    assert generated == on_one_device[0] and len(set(generated)) > 1
    assert chosen == on_one_device[1] and set(chosen) <= set(CLASSES)


def test_a_prediction_does_not_depend_on_other_inputs(config, on_one_device):
    generated, _, predictor = on_one_device
    params = spread_parameters(TrainProgram(config, make_mesh(config)))
    assert generated == [predictor.generate(params, [text])[0] for text in INPUTS]


def test_the_chosen_class_has_the_highest_log_likelihood(config, on_one_device):
    program, vocabulary = TrainProgram(config, make_mesh(config)), open_vocabulary(config)
    params = spread_parameters(program)
    source_BxS = np.array([[*vocabulary.encode(INPUTS[0]), 1]])
    log_likelihoods = {}
    for name in CLASSES:
        target = [*vocabulary.encode(name), 1]
        inputs_BxT = np.zeros((1, 9), np.int32)
        inputs_BxT[0, 1 : len(target)] = target[:-1]  # later tokens are masked
        logits_BxTxV = jax.jit(program.sharded.model(params).__call__)(source_BxS, inputs_BxT)
        log_probs_TxV = jax.nn.log_softmax(logits_BxTxV[0])
        log_likelihoods[name] = sum(float(log_probs_TxV[i, t]) for i, t in enumerate(target))
    assert on_one_device[1][0] == max(log_likelihoods, key=log_likelihoods.get)


# The best checkpoint ------------------------------------------------------------------------


def test_the_best_checkpoint_stays_beside_the_newest(config, tmp_path):
    workdir = Workdir(tmp_path)
    program = TrainProgram(config, make_mesh(config))
    state, batches = program.init(), open_batches(config, "train")
    quality = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.1}

    def open_again():
        return Checkpointer(workdir, keep=2, sort_key=lambda m: m.get("quality", -1.0))

    checkpoints = open_again()
    for step, value in quality.items():
        state = dataclasses.replace(state, step=jnp.int32(step))
        save_state(checkpoints, state, batches, None if value is None else {"quality": value})
        if step == 3:  # continued by another process
            checkpoints.close()
            checkpoints = open_again()
    assert checkpoints.best() == (2, {"quality": 0.9})
    checkpoints.close()
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"2", "4", "5"}


def test_training_keeps_the_best_by_its_metric(run, config):
    losses = {step: line["pairs.twice/cross_entropy"] for step, line in evaluations(run).items()}
    best = min(losses, key=losses.get)
    assert {folder.name for folder in run.checkpoints.iterdir()} == {str(best), "6"}


@pytest.mark.parametrize(
    "metric, hint",
    [
        ("glue.mrpc/f2", "did you mean glue.mrpc/f1"),
        ("bleu", "use one of cross_entropy, .*glue.rte/score"),
    ],
)
def test_an_unknown_metric_is_an_error_before_training(config, tmp_path, metric, hint):
    wrong = override_config(config, {"train.keep_best": metric})
    with pytest.raises(UserError, match=f"no metric '{metric}' for train.keep_best; {hint}"):
        train(wrong, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_not_finite_is_never_the_best(config, tmp_path):
    rank = functools.partial(sort_key, "accuracy")
    assert rank({"accuracy": float("nan")}) == rank({}) == -float("inf") < rank({"accuracy": 0.0})
    assert rank({"accuracy": None}) == -float("inf")
    assert sort_key("cross_entropy", {"cross_entropy": 2.0}) == -2.0
    workdir, program = Workdir(tmp_path), TrainProgram(config, make_mesh(config))
    state, batches = program.init(), open_batches(config, "train")
    checkpoints = Checkpointer(workdir, keep=1, sort_key=rank)
    for step, value in enumerate((0.3, np.nan, 0.9, 0.5, np.nan, 0.1), start=1):
        state = dataclasses.replace(state, step=jnp.int32(step))
        save_state(checkpoints, state, batches, {"accuracy": float(value)})
    assert checkpoints.best() == (3, {"accuracy": 0.9})
    checkpoints.close()
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"3", "6"}


def test_keep_best_needs_an_evaluation_at_every_checkpoint(config):
    with pytest.raises(UserError, match=r"checkpoint_every=3 is not a multiple of train\.eval_eve"):
        override_config(config, {"train.checkpoint_every": "3"})
