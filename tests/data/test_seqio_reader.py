"""The seqio reader: T5's examples, token for token, and exact positions."""

from pathlib import Path

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches, open_epoch_by_source, open_vocabulary
from switch_jax.data.batch import ALL_ROWS, feature_shapes
from switch_jax.data.denoising import IidDenoising, PrefixLM, SpanCorruption
from switch_jax.data.objectives import OBJECTIVES, WeightedDenoiser, open_objective
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from tests.support import runs
from tests.support.configs import share
from tests.support.objectives import Pieces, objective, text_length
from tests.support.paths import GOLDEN

SIZE = 900

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

GOLDEN = np.load(GOLDEN / "t5_denoising.npz")


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    documents = [document.text for document in python_documents()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("text")
        mixture = runs.write_text(folder, train=documents[:20], validation=documents[30:34])
        patch.setattr(runs, "TEXT", mixture, raising=False)
        yield


def config(**data):
    defaults = dict(
        mixture=runs.TEXT, reader="seqio", inputs_length=64, targets_length=20, batch_size=8
    )
    return Config(model=ModelConfig(vocab_size=SIZE), data=DataConfig(**(defaults | data)))


def take(it, count):
    return [next(it) for _ in range(count)]


def same(a, b):
    return all(x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x) for x, y in zip(a, b))


def golden(name):
    """Returns the rows of a ragged array in the reference."""
    return np.split(GOLDEN[name], np.cumsum(GOLDEN[f"{name}_lengths"])[:-1])


def as_dataset(documents):
    ragged = tf.RaggedTensor.from_row_lengths(
        np.concatenate(documents), [len(row) for row in documents]
    )
    return tf.data.Dataset.from_tensor_slices({"targets": ragged})


def test_noise_masks_equal_t5_bit_for_bit():
    from switch_jax.data.seqio_denoising import noise_mask

    masks = golden("spans/masks")
    assert len(masks) > 50
    for mask, seeds in zip(masks, GOLDEN["spans/mask_seeds"]):
        ours = noise_mask(SpanCorruption(), tf.constant(len(mask)), tf.constant(seeds))
        assert (ours.numpy() == mask).all()


@pytest.mark.parametrize(
    "case, source, seed, denoiser",
    [
        ("spans", "spans/tokens", 0, SpanCorruption()),
        ("chain", "chain/segments", 7, SpanCorruption()),
        ("iid", "spans/tokens", 0, IidDenoising()),
        ("prefix", "spans/tokens", 0, PrefixLM()),
        ("prefix_quarter", "spans/tokens", 0, PrefixLM(0.25)),
    ],
)
def test_noise_equals_t5_token_for_token(monkeypatch, case, source, seed, denoiser):
    from switch_jax.data.seqio_denoising import add_noise

    monkeypatch.setitem(OBJECTIVES, "one", (WeightedDenoiser(1.0, denoiser),))
    sentinels = tuple(range(32_099, 0, -1))
    texts = golden(source)
    with seqio.map_seed_manager(seed):
        one = objective("one", vocabulary=Pieces(sentinels))
        examples = list(add_noise(as_dataset(texts), objective=one, sentinels=sentinels))
    assert len(examples) == len(texts) > 50
    for example, inputs, targets in zip(
        examples, golden(f"{case}/inputs"), golden(f"{case}/targets"), strict=True
    ):
        assert example["inputs"].numpy().tolist() == inputs.tolist()
        assert example["targets"].numpy().tolist() == targets.tolist()


def test_rows_equal_t5():
    from switch_jax.data.seqio_preprocessors import (
        concatenate_documents,
        select_random_chunk,
        split_into_rows,
    )

    documents = golden("chain/documents")
    assert max(map(len, documents)) > 65_536 and min(map(len, documents)) == 0
    with seqio.map_seed_manager(3):
        chunks = select_random_chunk(as_dataset(documents))
    pieces = list(split_into_rows(concatenate_documents(chunks), text_length(512, 114)))
    expected = golden("chain/segments")
    assert len(pieces) == len(expected)
    for piece, row in zip(pieces, expected):
        assert (piece["targets"].numpy() == row).all()


@pytest.mark.parametrize("pack", [False, True])
def test_batches_have_the_features_of_the_token_store(pack):
    c = config(pack=pack, targets_length=24)
    ours = next(open_batches(config(pack=pack, targets_length=24, reader="store"), "train"))
    batch = next(open_batches(c, "train"))
    assert set(batch) == set(ours)
    for name, (shape, dtype) in feature_shapes(c).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name
    # In both readers, the targets determine decoder inputs and weights.
    for b in (batch, ours):
        targets = b["decoder_target_tokens"]
        starts = b["decoder_positions"] == 0 if pack else np.arange(24) == 0
        expected = np.where(starts, 0, np.roll(targets, 1, axis=1))
        assert (b["decoder_input_tokens"] == expected)[b["decoder_loss_weights"] > 0].all()
        assert ((targets > 0) == (b["decoder_loss_weights"] > 0)).all()
        if pack:
            assert ((b["decoder_segment_ids"] > 0) == (targets > 0)).all()


def test_corruption_has_the_distribution_of_the_token_store():
    """Full rows have the same counts; the length of each kept or noise span has the same mean."""
    first = open_vocabulary(config()).sentinel(0)
    length = text_length(64, 20)
    lengths, (noise, count) = objective().largest(length), SpanCorruption().counts(length)
    sizes = {}
    for reader in ("seqio", "store"):
        batches = take(open_batches(config(reader=reader, batch_size=64, seed=1), "train"), 12)
        targets = np.concatenate([b["decoder_target_tokens"] for b in batches])
        inputs = np.concatenate([b["encoder_input_tokens"] for b in batches])
        full = (inputs > 0).sum(1) == lengths.inputs
        assert full.mean() > 0.95
        for name, side in (("kept", inputs[full]), ("noise", targets[full])):
            marks = np.argwhere(side > first - 100)[:, 1].reshape(-1, count)
            assert (np.take_along_axis(side, marks, 1) == first - np.arange(count)).all()
            sizes[name, reader] = np.diff(marks, axis=1) - 1
        assert ((targets[full] > 0).sum(1) == noise + count + 1).all()
        assert (targets[full, lengths.targets - 1] == EOS).all()
    for name in ("kept", "noise"):
        a, b = sizes[name, "seqio"], sizes[name, "store"]
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all()
        assert (np.abs(a.std(0) / b.std(0) - 1) < 0.2).all()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["iid_denoising", "prefix_lm", "ul2"])
def test_other_objectives_have_the_distribution_of_the_token_store(name, pack):
    c = config(objective=name, targets_length=64, batch_size=64, seed=1, pack=pack)
    modes = open_objective(c, open_vocabulary(c)).modes
    rows, shares = {}, {}
    for reader in ("seqio", "store"):
        settings = Config(model=c.model, data=DataConfig(**{**vars(c.data), "reader": reader}))
        batches = take(open_batches(settings, "train"), 12)
        inputs = np.concatenate([b["encoder_input_tokens"] for b in batches])
        targets = np.concatenate([b["decoder_target_tokens"] for b in batches])
        rows[reader] = np.stack([(inputs > 0).sum(1), (targets > 0).sum(1)], axis=1)
        begins = np.array([[m == row[: len(m)].tolist() for m in modes] for row in inputs])
        shares[reader] = begins.mean(0)
    a, b = rows["seqio"], rows["store"]
    # Shuffled rows of twenty documents, packed in two ways.
    allowed = 0.15 * b.mean(0) if pack else 5 * np.sqrt(a.var(0) / len(a) + b.var(0) / len(b)) + 0.3
    assert (np.abs(a.mean(0) - b.mean(0)) < allowed).all()
    if name == "ul2":
        assert (np.abs(shares["seqio"] - shares["store"]) < 0.09).all()
        assert shares["store"].min() > 0.1


@pytest.mark.parametrize("pack", [False, True])
def test_a_position_is_restored_exactly(tmp_path, pack):
    it = open_batches(config(pack=pack), "train", share(1, 2))
    take(it, 7)
    it.save(tmp_path / "it")
    expected = take(it, 5)
    fresh = open_batches(config(pack=pack), "train", share(1, 2))
    fresh.restore(tmp_path / "it")
    assert same(take(fresh, 5), expected)
    assert not same(take(open_batches(config(pack=pack), "train", share(1, 2)), 5), expected)


def test_another_number_of_processes_or_other_data_is_refused(tmp_path):
    open_batches(config(), "train", share(0, 2)).save(tmp_path)
    with pytest.raises(UserError, match=r"as many processes .*data pack.* data\.reader=store"):
        open_batches(config(), "train").restore(tmp_path)
    for other in ({"pack": True}, {"batch_size": 4}, {"seed": 1}, {"vocabulary": "bytes"}):
        with pytest.raises(UserError, match="belongs to other text"):
            open_batches(config(**other), "train", share(0, 2)).restore(tmp_path)


def test_processes_read_different_documents():
    parts = [take(open_batches(config(), "validation", share(p, 2)), 2) for p in range(2)]
    assert not same(*parts)


def test_an_epoch_has_every_row_once_for_any_batch_size_and_processes():
    def rows(batch_size, *processes):
        c = config(batch_size=batch_size)
        epochs = [open_epoch_by_source(c, "validation", rows)["text"] for rows in processes]
        batches = [list(epoch) for epoch in epochs]
        assert len({len(of_process) for of_process in batches}) == 1
        tokens = np.concatenate([b["encoder_input_tokens"] for of in batches for b in of])
        return sorted(row.tobytes() for row in tokens if row.any())

    expected = rows(4, ALL_ROWS)
    assert len(expected) == len(set(expected)) > 32 and len(expected) % 16
    assert rows(16, share(0, 2), share(1, 2)) == expected


def test_a_process_without_a_document_is_refused():
    with pytest.raises(UserError, match=r"no text for process_7_of_8.*data\.reader=store"):
        next(open_batches(config(), "validation", share(7, 8)))
    with pytest.raises(UserError, match=r"python_docs has fewer documents .*\(1000\)"):
        many = config(mixture="python_docs", batch_size=1000, vocabulary="bytes")
        open_batches(many, "train", share(0, 1000))


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="needs 14"):
        open_batches(config(targets_length=13), "train")


def test_a_token_store_is_refused(tmp_path):
    store = runs.make_store(tmp_path)
    with pytest.raises(UserError, match=r"is packed text; set data\.reader=store"):
        open_batches(config(mixture="text", data_dir=str(store)), "train")


def test_byte_vocabulary():
    c = config(vocabulary="bytes", inputs_length=64)
    streamed = next(open_batches(c, "validation"))["encoder_input_tokens"]
    vocabulary = open_vocabulary(c)
    assert streamed.max() == vocabulary.sentinel(0) == 358
    words = vocabulary.decode(streamed[0][streamed[0] > 0])
    document = python_documents()[30].text
    assert all(part.strip() in document[:80] for part in words.split("<extra_id_")[0:1])


def test_bad_records_are_reported_once_and_the_rest_is_read(tmp_path, capfd):
    lines = Path(runs.TEXT.replace("{split}", "train")).read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines[:3], "{broken", '{"a": 1}', *lines[3:]]))
    mixture = str(tmp_path / "mine.jsonl")
    vocabulary = open_vocabulary(config()).name
    c = config(mixture=mixture, vocabulary=vocabulary)
    take(open_batches(c, "train"), 3)
    stderr = capfd.readouterr().err
    assert stderr.count("left out") == 1 and "mine.jsonl, line 4" in stderr
    strict = config(mixture=mixture, vocabulary=vocabulary, on_bad_record="error")
    with pytest.raises(UserError, match=r"mine\.jsonl, line 4 is not"):
        take(open_batches(strict, "train"), 3)


def test_sources_are_mixed_at_their_rates(tmp_path):
    mixtures = []
    for name, letter in (("a", "a"), ("b", "b")):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join([letter * 50] * 200))
        mixtures.append(str(path))
    c = config(mixture=f"{mixtures[0]}=0.8,{mixtures[1]}=0.2", vocabulary="bytes", batch_size=100)
    for reader in ("seqio", "store"):
        c = Config(model=c.model, data=DataConfig(**{**vars(c.data), "reader": reader}))
        batches = take(open_batches(c, "train"), 10)
        ids = np.concatenate([b["encoder_input_tokens"] for b in batches])
        of_a = (ids == ord("a") + 3).any(1)
        assert not (of_a & (ids == ord("b") + 3).any(1)).any()
        assert abs(of_a.mean() - 0.8) < 0.05, reader
        each = open_epoch_by_source(c, "train")
        assert list(each) == ["a", "b"]
        only_b = next(each["b"])["encoder_input_tokens"]
        assert not (only_b == ord("a") + 3).any() and (only_b == ord("b") + 3).any(1).all()
