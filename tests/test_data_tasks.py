"""switch_jax.data.tasks: the seqio reader makes what the store makes, and resumes exactly."""

import numpy as np
import pytest
from conftest import share

from switch_jax.data import corpus, open_batches, open_vocabulary, spans
from switch_jax.data.batch import feature_shapes
from switch_jax.errors import UserError
from switch_jax.schema import Config, DataConfig, ModelConfig

SIZE = 900


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    pytest.importorskip("seqio")
    documents = {split: list(corpus.documents("python_docs", split)) for split in corpus.SPLITS}
    tiny = {"train": documents["train"][:20], "validation": documents["validation"][:4]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(corpus.MIXTURES, "tiny", lambda split: tiny[split])
        yield


def config(**data):
    defaults = dict(
        mixture="tiny", reader="seqio", inputs_length=64, targets_length=20, batch_size=8
    )
    return Config(model=ModelConfig(vocab_size=SIZE), data=DataConfig(**(defaults | data)))


def take(it, count):
    return [next(it) for _ in range(count)]


def same(a, b):
    return all(x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x) for x, y in zip(a, b))


@pytest.mark.parametrize("pack", [False, True])
def test_batches_have_the_format_of_the_store(pack):
    c = config(pack=pack, targets_length=24)
    ours = next(open_batches(config(pack=pack, targets_length=24, reader="store"), "train"))
    batch = next(open_batches(c, "train"))
    assert set(batch) == set(ours)
    for name, (shape, dtype) in feature_shapes(c).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name
    # Decoder inputs and weights follow from the targets, in both readers alike.
    for b in (batch, ours):
        targets = b["decoder_target_tokens"]
        starts = b["decoder_positions"] == 0 if pack else np.arange(24) == 0
        expected = np.where(starts, 0, np.roll(targets, 1, axis=1))
        assert (b["decoder_input_tokens"] == expected)[b["decoder_loss_weights"] > 0].all()
        assert ((targets > 0) == (b["decoder_loss_weights"] > 0)).all()
        if pack:
            assert ((b["decoder_segment_ids"] > 0) == (targets > 0)).all()


def test_corruption_is_equal_in_distribution_to_the_store():
    """Full rows have the same counts; each span's length, kept or cut, has the same mean."""
    first = open_vocabulary(config()).sentinel(0)
    lengths = spans.span_lengths(64, 20)
    noise, count = spans.noise_and_spans(lengths.tokens)
    sizes = {}
    for reader in ("seqio", "store"):
        batches = take(open_batches(config(reader=reader, batch_size=64, seed=1), "train"), 12)
        targets = np.concatenate([b["decoder_target_tokens"] for b in batches])
        inputs = np.concatenate([b["encoder_input_tokens"] for b in batches])
        full = (inputs > 0).sum(1) == lengths.inputs
        assert full.mean() > 0.95
        for name, side in (("kept", inputs[full]), ("cut", targets[full])):
            marks = np.argwhere(side > first - 100)[:, 1].reshape(-1, count)
            assert (np.take_along_axis(side, marks, 1) == first - np.arange(count)).all()
            sizes[name, reader] = np.diff(marks, axis=1) - 1
        assert ((targets[full] > 0).sum(1) == noise + count + 1).all()
        assert (targets[full, lengths.targets - 1] == spans.EOS).all()
    for name in ("kept", "cut"):
        a, b = sizes[name, "seqio"], sizes[name, "store"]
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all()
        assert (np.abs(a.std(0) / b.std(0) - 1) < 0.2).all()


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
    with pytest.raises(UserError, match=r"as many processes .* data\.reader=store"):
        open_batches(config(), "train").restore(tmp_path)
    with pytest.raises(UserError, match="other packing"):
        open_batches(config(pack=True), "train", share(0, 2)).restore(tmp_path)


def test_processes_read_different_documents():
    parts = [take(open_batches(config(), "validation", share(p, 2)), 2) for p in range(2)]
    assert not same(*parts)
    with pytest.raises(UserError, match="fewer documents"):
        open_batches(config(), "validation", share(0, 8))


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="needs 14"):
        open_batches(config(targets_length=13), "train")
