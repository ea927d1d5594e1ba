"""switch_jax.predict: answers on any mesh, what is written, and the checkpoint kept for them."""

import json

import jax
import numpy as np
import pytest
import tasks as miniature
from conftest import tiny

from switch_jax import checkpoint, cli, predict
from switch_jax import config as config_lib
from switch_jax.data import open_batches, open_vocabulary
from switch_jax.data.downstream import TASKS
from switch_jax.errors import UserError
from switch_jax.evaluate import evaluate_checkpoint
from switch_jax.sharding import make_mesh
from switch_jax.step import Program
from switch_jax.train import train
from switch_jax.workdir import Workdir

INPUTS = [f"glue rte: number {i}, {'longer and ' * i}" for i in range(7)]  # batches of 4
CLASSES = ["yes", "no", "perhaps"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Bytes, two tasks and somebody's own pairs; steps that learn something."""
    root, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    for name in ("glue.rte", "glue.mrpc"):
        for rows in TASKS[name].splits.values():
            of = [miniature.record(TASKS[name], rng) for _ in range(5)]
            miniature.write_jsonl(root / TASKS[name].dataset / f"{rows.split}.jsonl", of)
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


def opinionated(program):
    """Parameters far from those that training begins with, whose answers differ."""
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


def test_evaluating_alone_gives_what_training_saw(run, config):
    [folder] = [f for f in run.checkpoints.iterdir() if f.name == "6"]
    alone = evaluate_checkpoint(run, folder, config)
    during = evaluations(run)[6]
    for name, value in alone.items():
        if name != "unigram_entropy":
            assert value == pytest.approx(during[name], rel=1e-6), name


def test_the_verb_shows_a_table(run, capsys):
    assert cli.main(["eval", "--workdir", str(run.path)]) == 0
    out = capsys.readouterr().out
    during = evaluations(run)[6]
    for task in ("glue.rte", "glue.mrpc", "pairs.twice"):
        [line] = [line for line in out.splitlines() if line.startswith(task)]
        assert float(line.split()[1]) == pytest.approx(during[f"{task}/score"], abs=0.01)
    assert predict.render({"cross_entropy": 1.0, "python_docs/accuracy": 0.5}) == ""


def answered(config, **mesh):
    """What is written for INPUTS, and which class is chosen."""
    changed = config_lib.override(config, {f"mesh.{k}": str(v) for k, v in mesh.items()})
    program = Program(changed, make_mesh(changed))
    predictor = predict.Predictor(program, open_vocabulary(changed))
    params = opinionated(program)
    return predictor.write(params, INPUTS), predictor.rank(params, INPUTS, CLASSES), predictor


@pytest.fixture(scope="module")
def on_one_device(config):
    return answered(config)


@pytest.mark.parametrize("mesh", [{"expert": 2, "model": 2}, {"data": 4, "fsdp": True}])
def test_answers_are_the_same_on_any_mesh(config, on_one_device, mesh):
    written, ranked, _ = answered(config, **mesh)
    assert written == on_one_device[0] and len(set(written)) > 1
    assert ranked == on_one_device[1] and set(ranked) <= set(CLASSES)


def test_an_answer_does_not_depend_on_its_neighbours(config, on_one_device):
    written, _, predictor = on_one_device
    params = opinionated(Program(config, make_mesh(config)))
    assert written == [predictor.write(params, [text])[0] for text in INPUTS]


def test_the_likeliest_class_is_that_of_the_model(config, on_one_device):
    program, vocabulary = Program(config, make_mesh(config)), open_vocabulary(config)
    params = opinionated(program)
    source_BxS = np.array([[*vocabulary.encode(INPUTS[0]), 1]])
    log_likelihoods = {}
    for name in CLASSES:
        target = [*vocabulary.encode(name), 1]
        inputs_BxT = np.zeros((1, 9), np.int32)
        inputs_BxT[0, 1 : len(target)] = target[:-1]  # what follows is not seen from before
        logits_BxTxV = jax.jit(program.model(params).__call__)(source_BxS, inputs_BxT)
        log_probs_TxV = jax.nn.log_softmax(logits_BxTxV[0])
        log_likelihoods[name] = sum(float(log_probs_TxV[i, t]) for i, t in enumerate(target))
    assert on_one_device[1][0] == max(log_likelihoods, key=log_likelihoods.get)


# The best checkpoint ------------------------------------------------------------------------


def test_the_best_checkpoint_stays_beside_the_newest(config, tmp_path):
    workdir = Workdir(tmp_path)
    program = Program(config, make_mesh(config))
    state, batches = program.init(), open_batches(config, "train")
    quality = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.1}

    def open_again():
        return checkpoint.Checkpoints(workdir, keep=2, goodness=lambda m: m.get("quality", -1.0))

    checkpoints = open_again()
    for step, value in quality.items():
        state = jax.tree.map(lambda x: x, state)
        state = type(state)(state.step * 0 + step, state.tokens, state.params, state.opt_state)
        checkpoints.save(state, batches, None if value is None else {"quality": value})
        if step == 3:  # continued by another process
            checkpoints.close()
            checkpoints = open_again()
    assert checkpoints.best() == (2, {"quality": 0.9})
    checkpoints.close()
    assert {folder.name for folder in workdir.checkpoints.iterdir()} == {"2", "4", "5"}


def test_training_keeps_the_best_by_its_metric(run, config):
    found = {step: line["pairs.twice/cross_entropy"] for step, line in evaluations(run).items()}
    best = min(found, key=found.get)
    assert {folder.name for folder in run.checkpoints.iterdir()} == {str(best), "6"}


@pytest.mark.parametrize(
    "metric, hint",
    [
        ("glue.mrpc/f2", "did you mean glue.mrpc/f1"),
        ("bleu", "use one of cross_entropy, .*glue.rte/score"),
    ],
)
def test_a_metric_that_does_not_exist_is_told_before_training(config, tmp_path, metric, hint):
    wrong = config_lib.override(config, {"train.keep_best": metric})
    with pytest.raises(UserError, match=f"no metric '{metric}' for train.keep_best; {hint}"):
        train(wrong, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_best_of_checkpoints_without_evaluations_is_refused(config):
    with pytest.raises(UserError, match=r"checkpoint_every=3 is not a multiple of train\.eval_eve"):
        config_lib.override(config, {"train.checkpoint_every": "3"})
