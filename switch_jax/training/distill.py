"""Teacher of a distillation run: its config, checks against the student, and its parameters.

The train step runs the teacher (`TrainProgram`), and the loss is in `model/loss.py`. Initial
parameters of the student come from `init_from`, as in any other run.
"""

import dataclasses

import jax

from switch_jax.checkpoint import find_pretrained
from switch_jax.config import Config, is_config_spec, load_config, validate
from switch_jax.data import open_vocabulary
from switch_jax.errors import UserError
from switch_jax.training.step import TrainProgram


def teacher_config(config: Config) -> Config | None:
    """Returns the run's config with the teacher's model; None where the run has no teacher.

    `distill.teacher` is a model or, for compiling and inspecting, the config file of a teacher
    that is not trained yet. The teacher routes as in evaluation: without noise, and its
    `moe.eval_capacity_factor` becomes `moe.capacity_factor`. Its groups are made of the run's
    batches, and so have the run's `moe.group_size`.

    Raises `UserError` where there is no such model, where its vocabulary has another size than the
    student's or other special ids, or where it does not fit the run's batches.
    """
    if not config.distilled:
        return None
    path = _teacher_path(config)
    is_config_file = is_config_spec(path)
    source = load_config(path) if is_config_file else find_pretrained(path).config
    teacher_size, student_size = source.model.vocab_size, config.model.vocab_size
    if teacher_size != student_size:
        raise UserError(
            f"The teacher {path} has {teacher_size} logits and the student {student_size}; set"
            f" model.vocab_size={teacher_size}, or take a teacher of the same vocabulary."
        )
    for key in ("pad_id", "eos_id", "start_id"):
        ids = getattr(source.model, key), getattr(config.model, key)
        if ids[0] != ids[1]:
            raise UserError(
                f"The teacher {path} has model.{key}={ids[0]} and the student {ids[1]}; set"
                f" model.{key}={ids[0]}, or take a teacher of the same vocabulary."
            )
    moe = dataclasses.replace(
        source.moe,
        capacity_factor=source.moe.eval_capacity_factor,
        group_size=config.moe.group_size,
    )
    teacher = dataclasses.replace(config, model=source.model, moe=moe, lora=source.lora)
    try:
        validate(teacher)
    except UserError as error:
        raise UserError(f"The teacher {path} cannot answer this run's batches: {error}") from error
    return teacher


def check_distillation(config: Config) -> None:
    """Raises `UserError` where a teacher is not trained yet, or has another vocabulary."""
    if not config.distilled:
        return
    path = _teacher_path(config)
    if is_config_spec(path):
        raise UserError(
            f"The teacher {path} is a config and cannot answer; train it, and set distill.teacher"
            " to its WORKDIR."
        )
    source = find_pretrained(path)
    if config.data.reader == "synthetic" or source.vocabulary is None:
        return
    if source.vocabulary != open_vocabulary(config).content:
        raise UserError(
            f"The teacher {path} was trained with another vocabulary than"
            " data.vocabulary or data.data_dir gives; set data.vocabulary to the teacher's, and"
            " pack the data with it."
        )


def teacher_parameters(program: TrainProgram) -> dict[str, jax.Array]:
    """Returns the teacher's parameters on the mesh, by path; empty without a teacher.

    All processes must call it. Raises `UserError` where the parameters cannot be read.
    """
    if not program.abstract_teacher:
        return {}
    source = find_pretrained(_teacher_path(program.config), together=True)
    return source.restore(program.abstract_teacher)


def _teacher_path(config: Config) -> str:
    assert config.distill.teacher is not None
    return config.distill.teacher
