"""Checkpoints that come without a vocabulary: none is trained for them, and one can be given."""

import shutil

import pytest
from sentencepiece import sentencepiece_model_pb2

from switch_jax.checkpoint.interop.t5x_import import read_t5x
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config.load import override_config
from switch_jax.data.vocabulary import hugging_face_file_name
from switch_jax.data.vocabulary_builder import open_vocabulary, train_vocabulary
from switch_jax.errors import UserError
from switch_jax.evaluation import check_vocabulary
from tests.support.configs import tiny
from tests.support.t5x import random_model, t5x_arrays, write_legacy

TEXTS = ["the quick brown fox jumps over the lazy dog " * 9] * 20


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_vocabulary(TEXTS, path, 500)
    return path


@pytest.fixture(scope="module")
def t5x(tmp_path_factory):
    """A T5X checkpoint, with a vocabulary two folders above it that is not its own."""
    folder = tmp_path_factory.mktemp("t5x")
    (folder / "vocabulary.model").write_bytes(b"bytes")
    model = random_model("t5-1.0", **{"model.vocab_size": 512})
    return write_legacy(folder / "t5x" / "checkpoint_7", t5x_arrays(model))


@pytest.fixture(scope="module")
def converted(t5x, tmp_path_factory):
    """A WORKDIR without a vocabulary."""
    run = tmp_path_factory.mktemp("converted") / "run"
    assert main(["convert", "from-t5x", str(t5x), str(run)]) == 0
    return run


def with_source(**keys):
    return override_config(tiny(**{"model.vocab_size": 512}), {k: str(v) for k, v in keys.items()})


@pytest.mark.parametrize("key", ["init_from", "distill.teacher"])
def test_no_vocabulary_is_trained_for_a_checkpoint(key, t5x, converted, vocabulary, tmp_path):
    for source in (t5x, converted, converted / "checkpoints" / "0"):
        with pytest.raises(
            UserError, match=rf"{key}={source} comes without a vocabulary; set data"
        ):
            open_vocabulary(with_source(**{key: source}))
        given = with_source(**{key: source, "data.vocabulary": vocabulary})
        assert open_vocabulary(given).content == vocabulary.read_bytes()

    # The vocabulary of a token store may have been trained on its text.
    (tmp_path / "vocabulary.model").write_bytes(vocabulary.read_bytes())
    with pytest.raises(UserError, match="comes without a vocabulary"):
        open_vocabulary(with_source(**{key: t5x, "data.data_dir": tmp_path}))
    with pytest.raises(UserError, match=f"{key}=nowhere does not exist"):
        open_vocabulary(with_source(**{key: "nowhere"}))


def test_the_config_file_of_a_teacher_has_no_vocabulary(vocabulary, tmp_path):
    """`data pack` may be run before the teacher is trained."""
    (tmp_path / "vocabulary.model").write_bytes(vocabulary.read_bytes())
    config = with_source(
        **{"distill.teacher": "switch_base.py:num_experts=8", "data.data_dir": tmp_path}
    )
    assert open_vocabulary(config).content == vocabulary.read_bytes()


def test_a_run_without_a_vocabulary_is_not_evaluated_with_another(converted, vocabulary):
    workdir = Workdir(converted)
    with pytest.raises(UserError, match=f"{converted} has no vocabulary; set data.vocabulary"):
        check_vocabulary(workdir, workdir.config())
    check_vocabulary(
        workdir, override_config(workdir.config(), {"data.vocabulary": str(vocabulary)})
    )


def test_generate_asks_for_the_vocabulary_and_uses_it(converted, vocabulary, tmp_path, capsys):
    command = ["generate", "--workdir", str(converted), "--text", "a ___", "--max_length=2"]
    assert main(command) == 2
    assert "set --vocabulary to the one" in capsys.readouterr().err
    assert main([*command, "--vocabulary", str(vocabulary)]) == 0
    assert main([*command, "--vocabulary", str(tmp_path / "none")]) == 2


def test_conversions_take_a_vocabulary(t5x, converted, vocabulary, tmp_path, capsys):
    for verb, source, *flags in (
        ("from-t5x", t5x),
        ("upcycle", converted, "--config.moe.num_experts=2", "--config.moe.every=1"),
    ):
        output = tmp_path / verb
        command = ["convert", verb, str(source), str(output), *flags]
        if verb == "from-t5x":
            assert main(command) == 0
            assert "There is no vocabulary: set --vocabulary" in capsys.readouterr().out
            shutil.rmtree(output)
        assert main([*command, "--vocabulary", str(vocabulary)]) == 0
        assert "no vocabulary" not in capsys.readouterr().out
        workdir = Workdir(output)
        assert workdir.vocabulary.read_bytes() == vocabulary.read_bytes()
        assert open_vocabulary(workdir.config()).content == vocabulary.read_bytes()


def test_the_end_of_a_text_is_that_of_the_given_vocabulary(t5x, vocabulary, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.read_bytes())
    proto.pieces[1].piece, proto.pieces[2].piece = proto.pieces[2].piece, proto.pieces[1].piece
    proto.pieces[1].type, proto.pieces[2].type = proto.pieces[2].type, proto.pieces[1].type
    proto.trainer_spec.eos_id, proto.trainer_spec.unk_id = 2, 1
    other = tmp_path / "other.model"
    other.write_bytes(proto.SerializeToString())
    model = read_t5x(t5x).with_vocabulary(str(other)).config.model
    assert (model.pad_id, model.eos_id, model.start_id) == (0, 2, 0)
    assert read_t5x(t5x).with_vocabulary(str(vocabulary)).config.model.eos_id == 1


def test_a_vocabulary_that_does_not_fit_is_refused(t5x, tmp_path, capsys):
    big = tmp_path / "big.model"
    train_vocabulary([f"{chr(97 + i % 26)}{i} " * 9 for i in range(999)], big, 900)
    for file, words in ((big, "model.vocab_size=512"), (tmp_path / "none", "cannot be read")):
        command = [
            "convert",
            "from-t5x",
            str(t5x),
            str(tmp_path / "out"),
            "--vocabulary",
            str(file),
        ]
        assert main(command) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_vocabularies_have_the_file_names_of_hugging_face(vocabulary):
    assert hugging_face_file_name(vocabulary.read_bytes()) == "spiece.model"
    assert hugging_face_file_name(b' {"version": "1.0"}') == "tokenizer.json"
    assert hugging_face_file_name(b"bytes") is None
