"""Vocabularies: T5's ids, sentinels in text, training on first use."""

import dataclasses
import io
import re

import pytest
import sentencepiece

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_vocabulary, vocabulary, vocabulary_builder
from switch_jax.data.mixture import find_sources
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.vocabulary import PAD, UNK, VOCABULARY_FILE, ByteVocabulary, read_vocabulary
from switch_jax.data.vocabulary_builder import sample_texts, train_vocabulary
from switch_jax.errors import UserError
from tests.support import runs

SIZE = 900


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in python_documents()[:15]]


@pytest.fixture(scope="module", autouse=True)
def training_text(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(runs, "TEXT", runs.write_text(folder, train=texts, validation=texts), False)
        yield


def config(vocab_size=SIZE, **data):
    data = {"mixture": runs.TEXT} | data
    return Config(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(**data))


def test_ids_equal_t5():
    v = open_vocabulary(config())
    assert v.size == SIZE
    assert (v.sentinel(0), v.sentinel(99)) == (SIZE - 1, SIZE - 100)
    assert v.encode("<extra_id_0><extra_id_99>") == [SIZE - 1, SIZE - 100]
    assert PAD == 0 and vocabulary.EOS == 1 and UNK == 2
    assert max(v.encode("any text at all")) < SIZE - 100


@pytest.mark.parametrize(
    "text",
    [
        "The import statement",
        "a <extra_id_0> b",
        "<extra_id_0> of the <extra_id_1>",
        "<extra_id_12> <extra_id_13>",
        "naïve 日本語 🙂 bytes",
        "",
    ],
)
def test_text_with_sentinels_round_trips(text):
    v = open_vocabulary(config())
    assert v.decode(v.encode(text)) == text


def test_a_sentinel_is_one_id_between_the_pieces_around_it():
    v = open_vocabulary(config())
    assert v.encode("a <extra_id_0> b") == [*v.encode("a"), v.sentinel(0), *v.encode("b")]
    assert v.sentinel(0) not in v.encode("<extra_id_100> <extra_id_x>")


def test_padding_eos_and_ids_past_the_end_decode_to_nothing():
    v = open_vocabulary(config())
    ids = [*v.encode("to be"), vocabulary.EOS, 0, 0, SIZE, SIZE + 27]
    assert v.decode(ids) == "to be"


def test_training_is_deterministic(tmp_path, texts):
    for name in "ab":
        train_vocabulary(texts, tmp_path / name, SIZE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (
        read_vocabulary(tmp_path / "a").fingerprint == read_vocabulary(tmp_path / "b").fingerprint
    )
    train_vocabulary(texts, tmp_path / "c", SIZE + 1)
    assert (
        read_vocabulary(tmp_path / "c").fingerprint != read_vocabulary(tmp_path / "a").fingerprint
    )


def test_first_use_trains_with_one_line_and_later_uses_are_silent(capfd):
    size = SIZE + 10
    first = open_vocabulary(config(size))
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "Training a vocabulary of 910 pieces" in error
    assert open_vocabulary(config(size)).name == first.name
    assert capfd.readouterr().err == ""


def test_vocabularies_for_t5_sizes_leave_the_padding_unused(monkeypatch):
    sizes, trained = [], open_vocabulary(config())

    def train(texts, path, size):
        sizes.append(size)
        path.write_bytes(trained.content)

    monkeypatch.setattr(vocabulary_builder, "train_vocabulary", train)
    for vocab_size in (32128, 250112, 4096):
        open_vocabulary(config(vocab_size))
    assert sizes == [32100, 250100, 4096]


def test_a_size_too_small_is_refused_with_the_least_size(tmp_path, texts):
    with pytest.raises(UserError, match=r"set model\.vocab_size to at least (\d+)") as caught:
        train_vocabulary(texts, tmp_path / "v", 200)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    train_vocabulary(texts, tmp_path / "v", least)
    assert read_vocabulary(tmp_path / "v").size == least


def test_more_ids_than_the_text_has_pieces_give_a_smaller_vocabulary(tmp_path):
    train_vocabulary(["to be or not to be"], tmp_path / "v", 4000)
    assert 356 < read_vocabulary(tmp_path / "v").size < 500


def test_a_vocabulary_must_fit_the_model():
    path = open_vocabulary(config()).name
    assert open_vocabulary(config(SIZE + 28, vocabulary=path)).size == SIZE
    with pytest.raises(UserError, match=r"has 900 ids.*model\.vocab_size=899; set it to 1024"):
        open_vocabulary(config(SIZE - 1, vocabulary=path))


def test_unusable_files_are_refused_by_name(tmp_path, texts):
    with pytest.raises(UserError, match=r"no\.model' cannot be read"):
        open_vocabulary(config(vocabulary=str(tmp_path / "no.model")))
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        read_vocabulary(tmp_path / "text")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "other").write_bytes(model.getvalue())
    other = read_vocabulary(tmp_path / "other")
    assert (other.pad, other.eos, other.unk) == (None, 2, 0)
    for ids, sentence in (
        ({}, "no id for padding, and model.pad_id=0 is its piece '<unk>'"),
        ({"pad_id": 1}, "2 stands for the end of a text, and model.eos_id=1; set it to 2"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_vocabulary(tmp_path / "other", ModelConfig(**ids))
    read_vocabulary(tmp_path / "other", ModelConfig(pad_id=1, eos_id=2))


def test_a_token_store_provides_its_vocabulary(tmp_path):
    own = open_vocabulary(config())
    (tmp_path / VOCABULARY_FILE).write_bytes(own.content)
    packed = dataclasses.replace(config().data, mixture="elsewhere", data_dir=str(tmp_path))
    opened = open_vocabulary(dataclasses.replace(config(), data=packed))
    assert opened.fingerprint == own.fingerprint


def test_byte_vocabulary(tmp_path):
    v = open_vocabulary(config(vocabulary="bytes"))
    assert isinstance(v, ByteVocabulary) and (v.size, v.padded_size) == (359, 384)
    text = "naïve 日本語 <extra_id_0> x"
    assert v.decode(v.encode(text)) == text
    assert v.encode("aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3]
    assert [v.piece(i) for i in (0, 1, 100, 3 + 10, 358)] == [
        *("<pad>", "</s>", "a", "<0x0A>", "<extra_id_0>")
    ]
    (tmp_path / "vocabulary.model").write_bytes(v.content)
    assert read_vocabulary(tmp_path / "vocabulary.model").fingerprint == v.fingerprint


def test_a_sample_has_the_share_of_every_source(tmp_path, texts):
    long, short = ("l" * 1000 + "\n", "s" * 10 + "\n")
    for name, text in (("long", long), ("short", short)):
        runs.write_text(tmp_path / name, train=[text] * 400)
        (tmp_path / name / "text-train.jsonl").rename(tmp_path / f"{name}.jsonl")
    data = DataConfig(mixture=f"{tmp_path}/long.jsonl=1, {tmp_path}/short.jsonl=3")
    sources = find_sources(data)
    sample = "".join(sample_texts(data, sources, 4000))
    assert 1000 <= sample.count("l") <= 2000 and 2700 < sample.count("s") < 2800
    everything = "".join(sample_texts(data, sources, 10**9))
    assert everything.count("l") > 390_000 and everything.count("s") > 3_900


def test_long_lines_count(tmp_path):
    train_vocabulary(["wonderful " * 1000], tmp_path / "v", 500)
    v = read_vocabulary(tmp_path / "v")
    assert len(v.encode("wonderful wonderful")) <= 4


def test_impossible_settings_are_refused(tmp_path):
    for size, coverage in ((500, 2.0), (500, float("nan")), (100, 1.0)):
        with pytest.raises(UserError, match=r"--coverage|model\.vocab_size"):
            train_vocabulary(["to be"], tmp_path / "v", size, coverage)


def test_characters_beyond_the_coverage_are_encoded_as_bytes(tmp_path):
    text = ["aaaa bbbb cccc dddd " * 50 + "日"]
    train_vocabulary(text, tmp_path / "some", 420, coverage=0.98)
    train_vocabulary(text, tmp_path / "all", 420, coverage=1.0)
    pieces = [
        [
            read_vocabulary(tmp_path / name).piece(i)
            for i in read_vocabulary(tmp_path / name).encode("日")
        ]
        for name in ("some", "all")
    ]
    assert "<0xE6>" in pieces[0] and "日" in "".join(pieces[1])
