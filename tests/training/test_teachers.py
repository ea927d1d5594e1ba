"""Teachers: those that do not suit a student, their vocabulary, and their costs."""

import math
import re
from pathlib import Path

import jax
import pytest

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import config_to_dict
from switch_jax.data.vocabulary import BYTES, VOCABULARY_FILE
from switch_jax.data.vocabulary_builder import open_vocabulary
from switch_jax.distributed.hardware import CHIPS
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.performance import CompileTarget, compile_step, compile_table
from switch_jax.performance.cost_model import cost_summary, cost_table
from switch_jax.performance.mesh_search import suggest_meshes
from switch_jax.training import distill
from switch_jax.training.distill import check_distillation, teacher_config
from switch_jax.training.loop import train
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny
from tests.support.distillation import STUDENT, TEACHER, make_teacher


@pytest.fixture(scope="module")
def teacher_workdir(tmp_path_factory) -> str:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def one_sentence(error: pytest.ExceptionInfo) -> str:
    """Returns the message of an error, and asserts that it is one sentence."""
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert not re.search(r"[.?] ", message), message
    return message


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("soft_weight", -0.1, "distill.soft_weight must be from 0 to 1, not -0.1"),
        ("soft_weight", 1.5, "from 0 to 1, not 1.5"),
        ("temperature", 0.0, "distill.temperature must be above 0, not 0.0"),
        ("start_step", -1, "distill.start_step must be at least 0, not -1"),
    ],
)
def test_numbers_out_of_range_are_refused(key, value, words):
    with pytest.raises(UserError) as error:
        tiny(**{f"distill.{key}": value})
    assert words in one_sentence(error)


def teacher_config_file(folder: Path) -> str:
    """Writes a config file of the teacher; returns its path."""
    path = folder / "teacher.py"
    path.write_text(
        "from switch_jax.config import defaults\n\n"
        "def get_config(arg=''):\n    config = defaults()\n"
        f"    config.update({config_to_dict(tiny(**TEACHER))!r})\n    return config\n"
    )
    return str(path)


def test_unsuitable_teachers_are_refused(teacher_workdir, tmp_path):
    def assert_refused(words: str, overrides, teacher: str = teacher_workdir):
        with pytest.raises(UserError) as error:
            train(
                tiny(**STUDENT | {"distill.teacher": teacher} | overrides), Workdir(tmp_path / "x")
            )
        assert words in one_sentence(error)
        assert not (tmp_path / "x").exists()

    assert_refused("none does not exist; name a WORKDIR", {}, str(tmp_path / "none"))
    assert_refused(
        "has 32 logits and the student 64; set model.vocab_size=32", {"model.vocab_size": 64}
    )
    assert_refused("has model.start_id=0 and the student 5; set", {"model.start_id": 5})
    assert_refused("Of the teacher, moe.num_experts=4 does not divide", {"mesh.expert": 8})
    assert_refused("Of the teacher, A encoder group", {"mesh.data": 8, "moe.group_size": 256})
    assert_refused(
        "teacher.py is a config and cannot answer; train it", {}, teacher_config_file(tmp_path)
    )


def test_a_teacher_of_another_vocabulary_is_refused(teacher_workdir, monkeypatch):
    config = tiny(**STUDENT | {"distill.teacher": teacher_workdir, "data.reader": "store"})
    source = distill.find_pretrained(teacher_workdir)._replace(vocabulary=b"another")
    monkeypatch.setattr(distill, "find_pretrained", lambda path: source)
    vocabulary = type("", (), {"content": b"own"})
    monkeypatch.setattr(distill, "open_vocabulary", lambda config: vocabulary)
    with pytest.raises(UserError, match="another vocabulary than"):
        check_distillation(config)
    vocabulary.content = b"another"
    check_distillation(config)


def test_a_student_without_a_vocabulary_gets_the_teachers(tmp_path):
    (tmp_path / VOCABULARY_FILE).write_bytes(BYTES.encode())
    settings = {"distill.teacher": str(tmp_path), "data.reader": "store", "model.vocab_size": 512}
    assert open_vocabulary(tiny(**settings)).name == BYTES


def test_reports_count_the_teachers_memory_and_flops(teacher_workdir):
    mesh = {"mesh.data": 1, "mesh.expert": 4}
    config = tiny(**STUDENT | mesh | {"distill.teacher": teacher_workdir})
    teacher = teacher_config(config)
    size = sum(
        math.prod(x.shape)
        for x in TrainProgram(config, make_mesh(config), teacher).abstract_teacher.values()
    )
    student, both = cost_summary(config), cost_summary(config, teacher)
    assert student["teacher"] is None
    assert both["teacher"]["params"] == size
    assert both["teacher"]["bytes"] == 4 * size
    assert both["state_bytes"] == student["state_bytes"]
    passes = both["teacher"]["flops_per_sequence_computed"]
    assert both["train_flops_per_step"] - student["train_flops_per_step"] == passes * 16
    assert f"{size:,}" in cost_table(both)

    chip = CHIPS["TPU v5"]
    (with_teacher,) = [
        s for s in suggest_meshes(config, chip, 4, 1, teacher) if s.mesh["expert"] == 4
    ]
    (without_teacher,) = [s for s in suggest_meshes(config, chip, 4) if s.mesh["data"] == 4]
    assert without_teacher.memory_bytes["teacher"] == 0
    assert size < with_teacher.memory_bytes["teacher"] < 4 * size
    flops = both["train_flops_per_step"]
    assert with_teacher.seconds["compute"] == pytest.approx(flops / 4 / chip.flops)
    assert with_teacher.seconds["compute"] > without_teacher.seconds["compute"]


def test_a_compile_report_has_the_teachers_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path / "cache"))
    student = {"distill.teacher": teacher_config_file(tmp_path), "optimizer.name": "sgd"}
    monkeypatch.setattr(CompileTarget, "devices", lambda target: jax.devices()[:1])
    target = CompileTarget("cpu:1")
    results = [
        compile_step(tiny(**STUDENT | student | {"distill.soft_weight": weight}), target)
        for weight in (0.0, 0.25)
    ]
    assert results[0]["teacher_bytes"] == 0
    params = cost_summary(tiny(**TEACHER))["params"]
    assert results[1]["teacher_bytes"] == 4 * params
    assert results[1]["argument_bytes"] == results[0]["argument_bytes"] + 4 * params
    assert "teacher" in compile_table(results[1]) and "teacher" not in compile_table(results[0])
