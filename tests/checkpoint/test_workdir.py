"""WORKDIRs: files that are not those of the run."""

import pytest

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.errors import UserError
from tests.support.configs import tiny


def test_a_vocabulary_that_is_not_the_runs_is_refused(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.prepare(tiny(), b"vocabulary")
    assert workdir.config() == tiny()
    workdir.prepare(tiny(), None)  # keeps what is there
    workdir.vocabulary.write_bytes(b"vocabularx")
    with pytest.raises(UserError, match=r"vocabulary\.model is not the file"):
        workdir.config()
