"""The teacher of a run: which model it is, whether it suits the student, and its parameters.

What a step does with it is in `teacher.py` and `losses.py`. The weights that a student begins with
are `init_from`'s business, as in any other run (`transfer.py`).
"""

import dataclasses
import re

import jax

from switch_jax.checkpoint import find_pretrained
from switch_jax.config import Config, load_config, validate
from switch_jax.data import open_vocabulary
from switch_jax.errors import UserError
from switch_jax.training.step import TrainProgram

_CONFIG_FILE = re.compile(r".+\.py(:.*)?")


def teacher_config(config: Config) -> Config | None:
    """A run's config with its teacher as the model; None where no teacher takes part.

    `distill.teacher` may be a config file as well, of a teacher that is yet to be trained: enough
    to compile and to inspect. The teacher routes as in evaluation, without noise and at its
    evaluation capacity, because its best answers are wanted; what its groups are made of follows
    from the run's batches, and so from the run's `moe.group_size`.

    Raises `UserError` where there is no such model, or it writes in other ids than the student.
    """
    if not config.distilled:
        return None
    path = _path(config)
    described = _CONFIG_FILE.fullmatch(path)
    made_with = load_config(path) if described else find_pretrained(path).config
    theirs, ours = made_with.model.vocab_size, config.model.vocab_size
    if theirs != ours:
        raise UserError(
            f"The teacher {path} has {theirs} logits and the student {ours}; set"
            f" model.vocab_size={theirs}, or take a teacher of the same vocabulary."
        )
    moe = dataclasses.replace(
        made_with.moe,
        capacity_factor=made_with.moe.eval_capacity_factor,
        group_size=config.moe.group_size,
    )
    made = dataclasses.replace(config, model=made_with.model, moe=moe, lora=made_with.lora)
    try:
        validate(made)
    except UserError as error:
        raise UserError(f"The teacher {path} cannot answer this run's batches: {error}") from error
    return made


def check_distillation(config: Config) -> None:
    """Raises `UserError` where a teacher has no parameters yet, or was trained on other ids."""
    if not config.distilled:
        return
    path = _path(config)
    if _CONFIG_FILE.fullmatch(path):
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
    """The teacher's parameters on the mesh, for `train_step`; none without a teacher.

    All processes must call it. Raises `UserError` where they cannot be read.
    """
    if not program.abstract_teacher:
        return {}
    source = find_pretrained(_path(program.config), together=True)
    return source.restore(program.abstract_teacher)


def _path(config: Config) -> str:
    assert config.distill.teacher is not None
    return config.distill.teacher
