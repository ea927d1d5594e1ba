"""Distillation: soft loss, and train step on any mesh."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_jax.checkpoint.checkpoint_reader import parameter_shapes, restore_params
from switch_jax.checkpoint.metrics_log import read_metrics
from switch_jax.checkpoint.pretrained import load
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import override_config
from switch_jax.distributed.mesh import make_mesh
from switch_jax.model import ShardedModel, loss
from switch_jax.model.loss import LossSums, loss_denominators, loss_terms, token_losses
from switch_jax.model.parameters import named_parameters, with_parameters
from switch_jax.model.transformer import SwitchTransformer
from switch_jax.training.distill import teacher_config, teacher_parameters
from switch_jax.training.initial_state import make_initial_state
from switch_jax.training.loop import train
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny
from tests.support.distillation import STUDENT, TEACHER, make_teacher

STEPS = 3
MESHES = {
    "expert=4, accumulate=4": {"mesh.expert": 4, "train.accumulate": 4},
    "fsdp, data=2 expert=2 model=2": {
        "mesh.data": 2,
        "mesh.expert": 2,
        "mesh.model": 2,
        "mesh.fsdp": True,
    },
}


@pytest.fixture(scope="module")
def teacher_workdir(tmp_path_factory) -> str:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def make_program(overrides) -> TrainProgram:
    config = tiny(**overrides)
    teacher = teacher_config(config)
    return TrainProgram(config, make_mesh(config, teacher=teacher), teacher)


def logits(*shape: int, seed: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def soft_sum(student, teacher, weights, temperature: float) -> float:
    """Returns Σ over targets of -Σ p log q, from the formula."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float((weights * -(p * np.log(q)).sum(-1)).sum())


@pytest.fixture(scope="module")
def batch_and_logits():
    """A batch with padding, and random logits of a student and a teacher."""
    batch = make_batch(tiny(**STUDENT))
    shape = (*batch["decoder_target_tokens"].shape, 32)
    assert 0 < (batch["decoder_loss_weights"] == 0).mean() < 1
    return batch, logits(*shape, seed=1), logits(*shape, seed=2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_the_soft_cross_entropy_follows_the_formula(
    batch_and_logits, temperature, in_chunks, monkeypatch
):
    batch, student, teacher = batch_and_logits
    if in_chunks:
        monkeypatch.setattr(loss, "LOGITS_BYTES", 2 * student.nbytes // 3)
    eye = jnp.eye(32)
    sums = token_losses(student, eye, batch, (teacher, eye), temperature)
    expected = soft_sum(student, teacher, batch["decoder_loss_weights"], temperature)
    np.testing.assert_allclose(sums.soft, expected, rtol=1e-5)
    without_teacher = token_losses(student, eye, batch)
    assert without_teacher.soft is None
    np.testing.assert_allclose(sums[:3], without_teacher[:3], rtol=1e-6)
    # With itself as the teacher, a model reaches the entropy, the minimum.
    minimum = token_losses(student, eye, batch, (student, eye), temperature)
    assert minimum.soft < token_losses(teacher, eye, batch, (student, eye), temperature).soft


def test_only_the_student_has_a_gradient_and_its_scale_does_not_depend_on_the_temperature(
    batch_and_logits,
):
    batch, student, teacher = batch_and_logits
    weights, T = batch["decoder_loss_weights"][..., None], 3.0

    def soft(student, teacher):
        return token_losses(student, jnp.eye(32), batch, (teacher, jnp.eye(32)), T).soft

    student_gradient, teacher_gradient = jax.grad(soft, argnums=(0, 1))(student, teacher)
    assert not teacher_gradient.any()
    expected = weights * (softmax(student / T) - softmax(teacher / T)) / T
    np.testing.assert_allclose(student_gradient, expected, atol=1e-6)

    config = tiny(**STUDENT | {"distill.temperature": T})
    denominators = loss_denominators(batch, config)
    sums = LossSums(*map(jnp.float32, (10.0, 5.0, 1.0, 8.0)))
    terms = loss_terms(sums, {}, denominators, config, 0.4)
    np.testing.assert_allclose(terms["cross_entropy"], 0.6 * 10 / denominators.targets, rtol=1e-6)
    np.testing.assert_allclose(
        terms["distillation"], 0.4 * T**2 * 8 / denominators.targets, rtol=1e-6
    )
    np.testing.assert_allclose(terms["z_loss"], 1e-4 * 5 / denominators.targets, rtol=1e-6)


def train_steps(program: TrainProgram, step, start) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Returns metrics of each step from the state `start`, and the parameters after the last."""
    state, metrics = jax.device_put(start, program.state_sharding), []
    teacher = teacher_parameters(program)
    for seed in range(STEPS):
        batch = program.sharded.shard_batch(make_batch(program.config, seed=seed))
        state, m, _ = step(state, batch, teacher)
        metrics.append(jax.device_get(m))
    return metrics, jax.device_get(state.params)


@pytest.fixture(scope="module")
def runs(teacher_workdir):
    """Mesh → run with a sparse teacher and a dense student, and the state they all start from."""
    cases = {"one device": {}, "no teacher": {}} | MESHES
    programs = {name: STUDENT | mesh for name, mesh in cases.items()}
    for name in programs.keys() - {"no teacher"}:
        programs[name] = programs[name] | {"distill.teacher": teacher_workdir}
    programs = {name: make_program(overrides) for name, overrides in programs.items()}
    start = jax.device_get(programs["one device"].init())

    def compile_step(p: TrainProgram):
        return p.train_step.lower(p.abstract_state, p.abstract_batch, p.abstract_teacher).compile()

    with ThreadPoolExecutor(2) as pool:
        steps = dict(zip(programs, pool.map(compile_step, programs.values())))
    return {name: train_steps(p, steps[name], start) for name, p in programs.items()}, start


def test_the_step_adds_the_soft_loss_of_the_teacher_in_evaluation_mode(runs, teacher_workdir):
    (metrics, _), start = runs[0]["one device"], runs[1]
    plain = runs[0]["no teacher"][0]
    # distill.start_step is 1: the first step ignores the teacher.
    assert metrics[0]["distillation"] == 0
    np.testing.assert_allclose(metrics[0]["loss"], plain[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics[1]["cross_entropy"], plain[1]["cross_entropy"], rtol=1e-5)
    assert "distillation" not in plain[1]
    for m in metrics[1:]:
        loss = 0.6 * m["cross_entropy"] + m["distillation"] + m["z_loss"]
        np.testing.assert_allclose(m["loss"], loss, rtol=1e-6)

    # Without dropout in the student, the soft loss follows from both models' logits.
    deterministic = {"model.dropout_rate": 0.0, "distill.start_step": 0}
    program = make_program(STUDENT | {"distill.teacher": teacher_workdir} | deterministic)
    batch, params = make_batch(program.config), start.params
    student = program.sharded.model(params).forward(batch, capacity_factor=None)[0]
    loaded = load(teacher_workdir)
    moe = dataclasses.replace(loaded.config.moe, group_size=32)
    config = dataclasses.replace(loaded.config, moe=moe)
    teacher_model = with_parameters(
        SwitchTransformer(config, jax.random.key(0)), named_parameters(loaded)
    )
    teacher = teacher_model.forward(batch, capacity_factor=0.75)[0]
    _, m, _ = program.train_step(
        jax.device_put(start, program.state_sharding),
        program.sharded.shard_batch(batch),
        teacher_parameters(program),
    )
    weights = batch["decoder_loss_weights"]
    expected = 0.4 * 2.0**2 * soft_sum(student, teacher, weights, 2.0) / weights.sum()
    np.testing.assert_allclose(m["distillation"], expected, rtol=1e-5)
    training_capacity = teacher_model.forward(batch, capacity_factor=0.25)[0]
    wrong = 0.4 * 2.0**2 * soft_sum(student, training_capacity, weights, 2.0) / weights.sum()
    assert abs(wrong - expected) > 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_depend_neither_on_the_mesh_nor_on_accumulation(runs, mesh):
    (metrics, params), (expected, expected_params) = runs[0][mesh], runs[0]["one device"]
    assert expected[1]["distillation"] > 0.1
    for m, e in zip(metrics, expected):
        assert m.keys() == e.keys()
        for key in e:
            np.testing.assert_allclose(m[key], e[key], rtol=1e-4, atol=1e-6, err_msg=key)
    for name, value in expected_params.items():
        np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-5, err_msg=name)
    plain = runs[0]["no teacher"][1]
    assert max(np.abs(plain[name] - expected_params[name]).max() for name in plain) > 1e-4


def test_a_soft_weight_of_zero_compiles_to_plain_training(tmp_path):
    missing = str(tmp_path / "none")
    settings = {"distill.teacher": missing, "distill.soft_weight": 0.0}
    programs = [make_program(STUDENT), make_program(STUDENT | settings)]
    texts = [p.train_step.lower(p.abstract_state, p.abstract_batch).as_text() for p in programs]
    assert texts[0] == texts[1]


def test_the_teacher_has_the_same_sharding_rules_and_is_not_in_the_state(teacher_workdir):
    program = make_program(
        STUDENT | MESHES["fsdp, data=2 expert=2 model=2"] | {"distill.teacher": teacher_workdir}
    )
    experts = program.abstract_teacher["encoder/runs/0/layers/1/mlp/experts/wi"]
    assert experts.shape == (1, 4, 16, 48)
    assert experts.sharding.shard_shape(experts.shape) == (1, 2, 8, 24)
    assert not [name for name in program.abstract_state.params if "experts" in name]
    params = teacher_parameters(program)
    assert {n: (p.shape, p.sharding) for n, p in params.items()} == {
        n: (p.shape, p.sharding) for n, p in program.abstract_teacher.items()
    }


def test_init_from_the_teacher_copies_all_but_expert_weights(teacher_workdir):
    config = {"model.init_scale": 1.0, "model.d_ff": 48, "distill.teacher": teacher_workdir}
    student = override_config(tiny(**STUDENT | config), {"init_from": teacher_workdir})
    program = TrainProgram(student, make_mesh(student), teacher_config(student))
    fresh, teacher = jax.device_get((program.init().params, teacher_parameters(program)))
    initial = jax.device_get(make_initial_state(program).params)
    for stack in ("encoder", "decoder"):
        # The student has blocks of one layer, the teacher of a dense and a sparse one.
        student_layer = f"{stack}/runs/0/layers/0"
        for layer in (0, 1):
            teacher_layer = f"{stack}/runs/0/layers/{layer}"
            name = "self_attention/query"
            np.testing.assert_array_equal(
                initial[f"{student_layer}/{name}"][layer], teacher[f"{teacher_layer}/{name}"][0]
            )
        wi = initial[f"{student_layer}/mlp/wi"]
        np.testing.assert_array_equal(wi[0], teacher[f"{stack}/runs/0/layers/0/mlp/wi"][0])
        np.testing.assert_array_equal(wi[1], fresh[f"{student_layer}/mlp/wi"][1])
    np.testing.assert_array_equal(initial["embedding"], teacher["embedding"])


@pytest.mark.slow
def test_a_continued_run_ends_with_the_same_bits(teacher_workdir, tmp_path):
    settings = {
        "distill.teacher": teacher_workdir,
        "train.steps": 4,
        "train.checkpoint_every": 2,
        "train.log_every": 1,
        "train.eval_every": 4,
        "train.eval_batches": 1,
    }
    final_params = {}
    for name, stops in {"whole": (4,), "stopped": (2, 4)}.items():
        workdir = Workdir(tmp_path / name)
        for steps in stops:
            train(tiny(**STUDENT | settings | {"train.steps": steps}), workdir)
        folder = workdir.checkpoints / "4"
        shapes = parameter_shapes(folder)
        assert not [n for n in shapes if "experts" in n]
        program = make_program(STUDENT | settings)
        final_params[name] = restore_params(folder, program.abstract_state.params)
        lines = read_metrics(workdir)
        distillation = [m["distillation"] for m in lines if m["split"] == "train"]
        assert len(distillation) == 4 and distillation[0] == 0 < min(distillation[1:])
        assert "distillation" not in [m for m in lines if m["split"] == "eval"][-1]
    for name, value in final_params["whole"].items():
        np.testing.assert_array_equal(final_params["stopped"][name], value)


def test_a_teacher_may_have_lora_adapters():
    config = tiny(**TEACHER | {"lora.rank": 2})
    program, batch = TrainProgram(config, make_mesh(config)), make_batch(config)
    fresh = program.init().params
    params = {n: p + 0.1 if n.endswith("lora_b") else p for n, p in fresh.items()}
    teacher = ShardedModel(config, program.mesh)
    assert teacher.abstract_params.keys() == params.keys()

    @jax.jit
    def forward(params):
        return teacher.model(params).forward(batch, capacity_factor=config.moe.capacity_factor)[0]

    logits = [forward(p) for p in (params, fresh)]
    expected, _ = program.sharded.model(params).forward(
        batch, capacity_factor=config.moe.capacity_factor
    )
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits[1] - expected).max() > 0.01
