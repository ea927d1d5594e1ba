"""Vocabularies with sentinels, padding, EOS and unknown at other ids than T5's; both readers."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import (
    open_batches,
    open_epoch_by_source,
    open_vocabulary,
    read_vocabulary,
    text_file_batches,
)
from switch_jax.data.vocabulary import hugging_face_file_name, parse_vocabulary
from switch_jax.errors import UserError
from switch_jax.model import token_masks
from tests.support import runs
from tests.support.vocabularies import train_sentencepiece

TEXT = "the name of the object is a string, or another name of that object 日 "
PIECES = 60
MADLAD = {"pad_id": 1, "eos_id": 2, "start_id": 7}  # unknown: 0
NEW_ID = np.array([1, 2, 0, *range(3, 200)])  # of padding, EOS, unknown and pieces


def model_proto() -> sentencepiece_model_pb2.ModelProto:
    """Returns a small SentencePiece model with T5's ids, to which 日 is unknown."""
    model = train_sentencepiece([TEXT.replace("日", "")] * 20, PIECES)
    return sentencepiece_model_pb2.ModelProto.FromString(model)


def with_own_sentinels(count: int) -> bytes:
    """Returns a model laid out as mT5's, with its sentinels in descending order at the end."""
    proto = model_proto()
    for number in reversed(range(count)):
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=4)
    return proto.SerializeToString()


def with_other_ids() -> bytes:
    """Returns the model with unknown 0, padding 1 and EOS 2, as MADLAD's."""
    proto = model_proto()
    pieces = [proto.pieces[i] for i in (2, 0, 1)] + list(proto.pieces)[3:]
    spec = proto.trainer_spec
    spec.unk_id, spec.pad_id, spec.eos_id = 0, 1, 2
    copies = [
        sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(piece.SerializeToString())
        for piece in pieces
    ]
    del proto.pieces[:]
    proto.pieces.extend(copies)
    return proto.SerializeToString()


def tokenizer_json(**changes) -> bytes:
    """Returns a `tokenizer.json` with the pieces of the model and sentinels behind them."""
    vocab = [[piece.piece, piece.score] for piece in model_proto().pieces]
    vocab += [[f"<extra_id_{number}>", 0.0] for number in reversed(range(100))]
    unigram = {"type": "Unigram", "unk_id": 2, "vocab": vocab}
    return json.dumps({"version": "1.0", "model": unigram} | changes).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "t5.model").write_bytes(model_proto().SerializeToString())
    (folder / "own.model").write_bytes(with_own_sentinels(100))
    (folder / "other.model").write_bytes(with_other_ids())
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(folder / "cache"))
        runs.write_text(folder, train=[TEXT * n for n in range(3, 30)], validation=[TEXT * 9])
        yield folder


def config(folder, vocabulary: str, ids=None, **data) -> Config:
    data = {"inputs_length": 32, "targets_length": 14, "batch_size": 8, "seed": 3} | data
    data |= {"mixture": f"{folder}/text-{{split}}.jsonl", "vocabulary": str(folder / vocabulary)}
    return Config(model=ModelConfig(vocab_size=256, **(ids or {})), data=DataConfig(**data))


def test_sentinels_are_the_pieces_of_their_name(folder):
    t5, own = (read_vocabulary(folder / name) for name in ("t5.model", "own.model"))
    assert own.size == t5.size and own.sentinels == t5.sentinels
    assert own.sentinels == tuple(range(own.size - 1, own.size - 101, -1))
    right = sentencepiece.SentencePieceProcessor(model_file=str(folder / "own.model"))
    ids = own.encode("the name of <extra_id_0> is a<extra_id_99>")
    assert ids == [
        *right.encode("the name of"),
        right.piece_to_id("▁<extra_id_0>"),
        *right.encode("is a"),
        right.piece_to_id("▁<extra_id_99>"),
    ]
    assert own.decode(ids) == "the name of <extra_id_0> is a <extra_id_99>"
    assert [own.piece(own.sentinels[i]) for i in (0, 99)] == ["<extra_id_0>", "<extra_id_99>"]


def test_a_vocabulary_of_mt5s_size_fits_its_model():
    proto = model_proto()
    for number in range(250_000 - len(proto.pieces)):
        proto.pieces.add(piece=f"zq{number}", score=-30.0)
    for number in reversed(range(100)):
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=4)
    mt5 = parse_vocabulary("mt5", proto.SerializeToString(), ModelConfig(vocab_size=250_112))
    assert (mt5.size, mt5.sentinels[0], mt5.sentinels[99]) == (250_100, 250_099, 250_000)


def test_a_model_of_as_many_ids_as_pieces_has_no_sentinels(folder):
    pieces = len(model_proto().pieces)
    tight = config(folder, "t5.model")
    tight = dataclasses.replace(tight, model=ModelConfig(vocab_size=pieces))
    assert (open_vocabulary(tight).size, open_vocabulary(tight).sentinels) == (pieces, ())
    with pytest.raises(UserError, match="has 0 sentinels to mark them"):
        open_batches(tight, "train")
    (folder / "pairs.jsonl").write_text('{"inputs": "a <extra_id_0>", "targets": "name"}\n' * 8)
    pairs = dataclasses.replace(tight.data, mixture=f"pairs:{folder}/pairs.jsonl", batch_size=2)
    batch = next(open_batches(dataclasses.replace(tight, data=pairs), "train"))
    assert batch["encoder_input_tokens"].max() < pieces
    with pytest.raises(UserError, match=f"has {pieces + 100} ids, sentinels included"):
        read_vocabulary(folder / "t5.model", ModelConfig(vocab_size=pieces + 99))


def test_fewer_sentinels_are_enough_for_short_rows_only(folder, tmp_path):
    (tmp_path / "own.model").write_bytes(with_own_sentinels(2))
    few = config(folder, "own.model")
    few = dataclasses.replace(
        few, data=dataclasses.replace(few.data, vocabulary=str(tmp_path / "own.model"))
    )
    batch = next(open_batches(few, "train"))
    tokens = np.concatenate([batch["encoder_input_tokens"], batch["decoder_target_tokens"]], 1)
    first, second = open_vocabulary(few).sentinels
    assert (first, second) == (tokens.max(), tokens.max() - 1) and (tokens == second).any(1).all()
    longer = dataclasses.replace(few.data, inputs_length=64, targets_length=20)
    with pytest.raises(UserError, match=r"has 3 spans, and .* has 2 sentinels"):
        open_batches(dataclasses.replace(few, data=longer), "train")


@pytest.mark.parametrize("reader, pack", [("store", False), ("store", True), ("seqio", True)])
def test_batches_with_other_ids_are_the_same_text(folder, reader, pack):
    if reader == "seqio":
        pytest.importorskip("seqio")
    options = {"reader": reader, "pack": pack}
    configs = [
        config(folder, "t5.model", **options),
        config(folder, "other.model", MADLAD, **options),
    ]
    t5, other = (next(open_batches(c, "train")) for c in configs)
    tokens = set()
    for name in ("encoder_input_tokens", "decoder_target_tokens"):
        np.testing.assert_array_equal(other[name], NEW_ID[t5[name]])
        tokens |= set(other[name].ravel())
    assert {0, 1, 2} <= tokens  # unknown, padding and EOS
    np.testing.assert_array_equal(other["decoder_loss_weights"], t5["decoder_loss_weights"])
    np.testing.assert_array_equal(token_masks(other, configs[1])[0], token_masks(t5, configs[0])[0])
    positions = other["decoder_positions"] if pack else np.tile(np.arange(14), (8, 1))
    shifted = np.roll(other["decoder_target_tokens"], 1, axis=1)
    expected = np.where(positions == 0, MADLAD["start_id"], shifted)
    np.testing.assert_array_equal(other["decoder_input_tokens"], expected)


@pytest.mark.parametrize("source", ["store", "seqio", "file"])
def test_rows_behind_the_last_are_padding(folder, source, tmp_path):
    if source == "seqio":
        pytest.importorskip("seqio")
    if source == "file":
        (tmp_path / "text.txt").write_text(TEXT * 9)
        c = config(folder, "other.model", MADLAD)
        last = text_file_batches(tmp_path / "text.txt", open_vocabulary(c), c)[-1]
    else:
        c = config(folder, "other.model", MADLAD, reader=source)
        *_, last = open_epoch_by_source(c, "validation")["text"]
    inputs, targets = token_masks(last, c)
    assert not targets[-1].any() and targets[0].any()
    np.testing.assert_array_equal(inputs.any(1), targets.any(1))


def test_other_special_ids_must_be_the_models(folder):
    for ids, sentence in (
        ({}, r"1 stands for padding, and model\.pad_id=0; set it to 1"),
        (MADLAD | {"eos_id": 3}, r"2 stands for the end of a text, and model\.eos_id=3"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_vocabulary(config(folder, "other.model", ids))
    other = open_vocabulary(config(folder, "other.model", MADLAD))
    assert (other.unk, other.pad, other.eos) == (0, 1, 2)
    assert other.decode([*other.encode("the name"), 2, 1, 1]) == "the name"


def test_tokenizer_json_gives_the_ids_of_its_model(folder):
    pytest.importorskip("tokenizers")
    t5, read = (read_vocabulary(folder / name) for name in ("t5.model", "tokenizer.json"))
    for text in ("the name of the object", " is <extra_id_0> a  string<extra_id_99>", ""):
        ids = read.encode(text)
        assert ids == t5.encode(text)
        assert read.decode([*ids, read.eos, 0, 0]) == t5.decode(ids)
    assert (read.size, read.sentinels, read.pad, read.eos, read.unk) == (
        t5.size,
        t5.sentinels,
        0,
        1,
        2,
    )
    assert read.is_control(0) and not read.is_control(t5.encode("the")[0])
    for name, content in (("spiece.model", t5.content), ("tokenizer.json", read.content)):
        assert hugging_face_file_name(content) == name
    with pytest.raises(UserError, match=r"'x' is not a tokenizer\.json"):
        parse_vocabulary("x", tokenizer_json(model={"type": "unheard-of"}))


def test_added_tokens_of_tokenizer_json_are_sentinels_and_marks():
    pytest.importorskip("tokenizers")
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0]]}
    names = {2: "<extra_id_1>", 3: "<extra_id_0>", 4: "<pad>", 5: "</s>", 6: "<mask>"}
    added = [
        {
            "id": i,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, name in names.items()
    ]
    read = parse_vocabulary("x", tokenizer_json(model=unigram, added_tokens=added))
    assert (read.size, read.sentinels, read.pad, read.eos, read.unk) == (7, (3, 2), 4, 5, 0)
    assert read.encode("a <extra_id_1> a") == [1, 2, 1]
    assert read.is_control(6) and not read.is_control(3)
    assert read.decode([1, 6, 3, 1, 5, 4, 9]) == "a <extra_id_0> a"
    with pytest.raises(UserError, match="numbers '<extra_id_0>' as 2, and the file as 3"):
        parse_vocabulary("x", tokenizer_json(model=unigram, added_tokens=added[1:]))


def test_tokenizer_json_without_its_library_is_refused(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers; install switch_jax\["):
        read_vocabulary(folder / "tokenizer.json")


def test_seqio_reads_with_tokenizer_json(folder):
    pytest.importorskip("tokenizers")
    pytest.importorskip("seqio")
    batches = [
        next(open_batches(config(folder, name, reader="seqio", pack=True), "train"))
        for name in ("t5.model", "tokenizer.json")
    ]
    for name, expected in batches[0].items():
        np.testing.assert_array_equal(batches[1][name], expected)


def test_the_last_bytes_are_sentinels_of_byt5():
    byt5 = read_vocabulary("byt5")
    assert (byt5.size, byt5.sentinels[0], byt5.sentinels[99]) == (259, 258, 159)
    text = "naïve 日本語 <extra_id_0> x <extra_id_61> ö"
    assert byt5.encode("a<extra_id_1>") == [ord("a") + 3, 257]
    assert byt5.decode([0, *byt5.encode(text), 1]) == text
    assert [byt5.piece(i) for i in (258, 0xC3 + 3)] == ["<extra_id_0>", "<0xC3>"]
    assert hugging_face_file_name(byt5.content) is None
