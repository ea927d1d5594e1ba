"""Rows of a token store: every token once an epoch, the same rows on any number of processes."""

import functools
import itertools

import numpy as np
import pytest

from switch_jax.config.schema import Config, DataConfig, ModelConfig
from switch_jax.data import open_batches, open_epoch_by_source, open_vocabulary
from switch_jax.data.batch import (
    FEATURES,
    PACKED_FEATURES,
    ProcessRows,
    SyntheticIterator,
    feature_shapes,
)
from switch_jax.data.objectives import open_objective
from switch_jax.data.peek import examples_text
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.sources.source import SPLITS
from switch_jax.data.token_store.open_store import open_store
from switch_jax.data.token_store.sequence_packing import cached_row_plan, plan_rows
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from tests.support import runs
from tests.support.configs import share, tiny
from tests.support.objectives import objective, restored, text_length

SIZE = 900


@pytest.fixture(scope="module")
def texts():
    documents = [document.text for document in python_documents()]
    # Short and long documents, so that packed rows have several segments.
    short = [text[: 40 + 17 * i] for i, text in enumerate(documents[12:30])]
    return {"train": documents[:12] + short, "validation": documents[40:41]}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        mixture = runs.write_text(tmp_path_factory.mktemp("text"), **texts)
        patch.setattr(runs, "TEXT", mixture, raising=False)
        yield


def config(**data):
    defaults = dict(mixture=runs.TEXT, inputs_length=64, targets_length=20, batch_size=8, seed=3)
    return Config(model=ModelConfig(vocab_size=SIZE), data=DataConfig(**(defaults | data)))


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def stored_tokens(split="train"):
    """Opens the tokens of a split."""
    return open_store(config().data, open_vocabulary(config())).tokens("text", split)


def all_tokens(tokens):
    return tokens.take(np.zeros(1, int), len(tokens))[0]


def uncorrupted(inputs, targets):
    """Returns the tokens of one corrupted sequence, sentinels replaced by their spans."""
    first = open_vocabulary(config()).sentinel(0)
    assert inputs[-1] == targets[-1] == EOS
    cuts, current = {}, None
    for token in targets[:-1]:
        if token > first - 100:
            current = cuts[token] = []
        else:
            current.append(token)
    return [t for i in inputs[:-1] for t in cuts.get(i, [i])]


def joined_rows(batch):
    for row in range(len(batch["encoder_input_tokens"])):
        inputs = batch["encoder_input_tokens"][row]
        targets = batch["decoder_target_tokens"][row][batch["decoder_loss_weights"][row] > 0]
        yield uncorrupted(inputs[inputs > 0].tolist(), targets.tolist())


def packed_segments(batch):
    for row in range(len(batch["encoder_input_tokens"])):
        for segment in range(1, batch["encoder_segment_ids"][row].max() + 1):
            inputs = batch["encoder_input_tokens"][row][
                batch["encoder_segment_ids"][row] == segment
            ]
            targets = batch["decoder_target_tokens"][row][
                batch["decoder_segment_ids"][row] == segment
            ]
            yield uncorrupted(inputs.tolist(), targets.tolist())


def test_the_store_holds_every_document(texts):
    vocabulary = open_vocabulary(config())
    for split in SPLITS:
        opened = stored_tokens(split)
        for i, text in enumerate(texts[split]):
            ids = all_tokens(opened)[opened.offsets[i] : opened.offsets[i + 1]]
            assert ids.dtype == np.uint16 and ids.tolist() == vocabulary.encode(text)
        assert len(opened.offsets) == len(texts[split]) + 1


@pytest.mark.parametrize("reader", ["store", "synthetic"])
def test_seeds_change_training_rows_but_not_validation_rows(reader):
    train, validation = (
        [next(open_batches(config(reader=reader, seed=seed), split)) for seed in (1, 2)]
        for split in ("train", "validation")
    )
    assert same(*validation) and not same(*train)


@pytest.mark.parametrize("reader", ["store", "synthetic"])
@pytest.mark.parametrize("pack", [False, True])
def test_batches_have_the_documented_features(reader, pack):
    c = config(reader=reader, pack=pack, targets_length=30, batch_size=200)
    batch = next(open_batches(c, "train"))
    assert set(batch) == set(FEATURES + (PACKED_FEATURES if pack else ()))
    for name, (shape, dtype) in feature_shapes(c).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name
    targets, inputs = batch["decoder_target_tokens"], batch["decoder_input_tokens"]
    starts = batch["decoder_positions"] == 0 if pack else np.arange(targets.shape[1]) == 0
    shifted = np.roll(targets, 1, axis=1)
    assert (inputs == np.where(starts, 0, shifted))[batch["decoder_loss_weights"] > 0].all()
    assert set(np.unique(batch["decoder_loss_weights"])) <= {0, 1}
    assert all(batch[name].max() < SIZE for name in FEATURES)


def test_synthetic_batches_have_no_padding_and_two_segments():
    batch = next(open_batches(config(reader="synthetic", pack=True), "train"))
    assert batch["encoder_input_tokens"].min() > 0 and batch["decoder_loss_weights"].min() == 1
    for stack in ("encoder", "decoder"):
        assert (np.unique(batch[f"{stack}_segment_ids"]) == [1, 2]).all()
        assert ((batch[f"{stack}_positions"] == 0).sum(1) == 2).all()
    assert len(np.unique(batch["encoder_input_tokens"], axis=0)) == 8


def test_an_epoch_has_every_chunk_once_in_another_order():
    tokens = all_tokens(stored_tokens())
    length = text_length(64, 20)
    chunks = len(tokens) // length
    it = open_batches(config(batch_size=chunks), "train")
    expected = sorted(map(tuple, tokens[: chunks * length].reshape(chunks, length).tolist()))
    epochs = [[tuple(row) for row in joined_rows(next(it))] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert sum(a == b for a, b in zip(*epochs)) < 10


def test_epochs_corrupt_other_spans():
    chunks = len(stored_tokens()) // text_length(64, 20)
    it = open_batches(config(batch_size=chunks), "train")
    first, second = (set(map(tuple, next(it)["encoder_input_tokens"].tolist())) for _ in range(2))
    assert len(first & second) < 0.05 * chunks


@pytest.mark.parametrize("reader", ["store", "synthetic"])
@pytest.mark.parametrize("pack", [False, True])
def test_processes_share_the_same_global_batch(reader, pack):
    c = config(reader=reader, pack=pack)
    alone = open_batches(c, "train")
    together = [open_batches(c, "train", share(p, 4)) for p in range(4)]
    for _ in range(3):
        batch, parts = next(alone), [next(it) for it in together]
        assert same(batch, {name: np.concatenate([p[name] for p in parts]) for name in batch})


def test_a_process_may_read_parts_that_are_not_consecutive():
    batch = next(open_batches(config(), "train"))
    part = next(open_batches(config(), "train", ProcessRows(4, (1, 3), 1, 2)))
    assert same(part, {name: rows[[2, 3, 6, 7]] for name, rows in batch.items()})


@pytest.mark.parametrize("reader", ["store", "synthetic"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_position_is_restored_exactly_with_any_number_of_processes(tmp_path, reader, pack):
    c = config(reader=reader, pack=pack)
    writers = [open_batches(c, "train", share(p, 2)) for p in range(2)]
    for it in writers:
        for _ in range(37):  # into another epoch
            next(it)
        it.save(tmp_path / "it")
    assert [p.name for p in (tmp_path / "it").iterdir()] == ["position.json"]
    expected = [[next(it) for it in writers] for _ in range(3)]
    one = open_batches(c, "train")
    one.restore(tmp_path / "it")
    for parts in expected:
        batch = next(one)
        assert same(batch, {name: np.concatenate([p[name] for p in parts]) for name in batch})


def test_positions_in_other_data_are_refused(tmp_path):
    with pytest.raises(OSError):
        open_batches(config(), "train").restore(tmp_path)
    open_batches(config(), "validation").save(tmp_path)
    with pytest.raises(UserError, match="belongs to other text"):
        open_batches(config(), "train").restore(tmp_path)
    (tmp_path / "position.json").write_text("{")
    with pytest.raises(ValueError):
        open_batches(config(), "train").restore(tmp_path)


@pytest.mark.parametrize("targets_length", [14, 45])
def test_packed_rows_have_every_token_and_separate_documents(targets_length):
    opened, tokens, length = (
        stored_tokens(),
        all_tokens(stored_tokens()),
        text_length(64, 20),
    )
    pieces = [
        tuple(tokens[i : min(i + length, end)].tolist())
        for begin, end in zip(opened.offsets, opened.offsets[1:])
        for i in range(begin, end, length)
    ]
    plan = plan_rows(opened.offsets, 64, targets_length, objective(), 0)
    rows = len(plan.row_offsets) - 1
    assert rows < len(pieces)
    batch = next(
        open_batches(config(pack=True, targets_length=targets_length, batch_size=rows), "train")
    )
    assert sorted(tuple(s) for s in packed_segments(batch)) == sorted(pieces)
    for stack, name in (
        ("encoder", "encoder_input_tokens"),
        ("decoder", "decoder_target_tokens"),
    ):
        ids, positions = batch[f"{stack}_segment_ids"], batch[f"{stack}_positions"]
        for row in range(rows):
            used = np.count_nonzero(ids[row])
            assert (np.isin(np.diff(ids[row][:used]), [0, 1])).all() and ids[row][0] == 1
            assert not ids[row][used:].any() and not positions[row][used:].any()
            assert not batch[name][row][used:].any()
            for segment in range(1, ids[row].max() + 1):
                inside = positions[row][ids[row] == segment]
                assert (inside == np.arange(len(inside))).all()
    assert (batch["encoder_segment_ids"].max(1) == batch["decoder_segment_ids"].max(1)).all()
    assert ((batch["decoder_segment_ids"] > 0) == (batch["decoder_loss_weights"] > 0)).all()
    assert batch["encoder_segment_ids"].max() > 2


def readable(config, batch):
    """Yields inputs and targets of the texts of a batch, without padding."""
    packed = config.data.pack
    for row in range(len(batch["encoder_input_tokens"])):
        sides = []
        for stack, tokens in (("encoder", "input"), ("decoder", "target")):
            ids = batch[f"{stack}_{tokens}_tokens"][row]
            segments = batch[f"{stack}_segment_ids"][row] if packed else (ids > 0).astype(int)
            sides.append([ids[segments == s].tolist() for s in range(1, segments.max() + 1)])
        yield from zip(*sides, strict=True)


OTHERS = {"iid_denoising": (64, 60), "prefix_lm": (64, 64), "ul2": (64, 50)}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pack", [False, True])
def test_other_objectives_have_every_token_once_an_epoch(name, pack):
    inputs, targets = OTHERS[name]
    c = config(objective=name, inputs_length=inputs, targets_length=targets, pack=pack)
    chosen = open_objective(c, open_vocabulary(c))
    length, stored = chosen.text_length(inputs, targets), all_tokens(stored_tokens())
    if pack:
        offsets = stored_tokens().offsets
        pieces = [
            stored[i : min(i + length, end)].tolist()
            for begin, end in itertools.pairwise(offsets)
            for i in range(begin, end, length)
        ]
    else:
        pieces = [stored[i : i + length].tolist() for i in range(0, len(stored) - length, length)]
    epoch = list(open_epoch_by_source(c, "train")["text"])
    first = open_vocabulary(c).sentinels[0]
    texts, places = [], set()
    for inputs_ids, targets_ids in (pair for batch in epoch for pair in readable(c, batch)):
        mode = next((m for m in filter(None, chosen.modes) if m == inputs_ids[: len(m)]), [])
        assert bool(mode) == (name == "ul2")
        sides = inputs_ids[len(mode) : -1], targets_ids[:-1]
        texts.append(restored(*sides, is_sentinel=lambda token: token > first - 100))
        places.add(tuple(map(len, sides)))
    assert sorted(texts) == sorted(pieces)
    assert len(places) > 10
    if pack and name != "iid_denoising":  # rows are full, though sizes are random
        rows = np.concatenate([b["encoder_segment_ids"] for b in epoch])
        assert (rows > 0).mean() > (0.6 if name == "ul2" else 0.45)


@pytest.mark.parametrize("pack", [False, True])
def test_another_objective_is_another_position(tmp_path, pack):
    shape = dict(inputs_length=64, targets_length=64, pack=pack)
    open_batches(config(**shape), "train").save(tmp_path)
    for name in OTHERS:
        with pytest.raises(UserError, match="belongs to other text"):
            open_batches(config(**shape, objective=name), "train").restore(tmp_path)


def test_longer_targets_are_padding_without_weight():
    batch = next(open_batches(config(targets_length=33), "train"))
    needed = objective().largest(text_length(64, 33)).targets
    assert (batch["decoder_loss_weights"] == (np.arange(33) < needed)).all()
    assert not batch["decoder_target_tokens"][:, needed:].any()


def test_a_split_smaller_than_a_batch_is_repeated():
    assert len(stored_tokens("validation")) < 300 * 64
    batch = next(open_batches(config(batch_size=300), "validation"))
    rows = list(map(tuple, joined_rows(batch)))
    assert len(rows) == 300 > len(set(rows)) > 1


@pytest.mark.parametrize("data", [dict(targets_length=13), dict(inputs_length=2)])
def test_lengths_that_do_not_fit_are_refused(data):
    with pytest.raises(UserError, match=r"data\.(targets|inputs)_length"):
        open_batches(config(**data), "train")


def test_a_split_shorter_than_a_row_is_one_short_row(tmp_path, texts):
    vocabulary = open_vocabulary(config())
    short = texts["validation"][0][:600]
    mixture = runs.write_text(tmp_path, train=texts["train"][-1:], validation=[short])
    long = config(
        mixture=mixture,
        vocabulary=vocabulary.name,
        inputs_length=600,
        targets_length=600,
        batch_size=2,
    )
    batch = next(open_batches(long, "validation"))
    lengths = objective().largest(len(vocabulary.encode(short)))
    assert ((batch["encoder_input_tokens"] > 0).sum(1) == lengths.inputs).all()
    assert (batch["decoder_loss_weights"].sum(1) == lengths.targets).all()
    assert (batch["encoder_input_tokens"][0] != batch["encoder_input_tokens"][1]).any()


def test_rows_with_more_spans_than_sentinels_are_refused():
    with pytest.raises(UserError, match=r"has 114 spans, and .* has 100 sentinels to mark them"):
        open_batches(config(inputs_length=2048, targets_length=500), "train")


def test_processes_must_divide_the_batch():
    for reader in ("store", "synthetic"):
        with pytest.raises(UserError, match=r"data\.batch_size=8 .* 3 parts"):
            open_batches(config(reader=reader), "train", share(0, 3))


@pytest.mark.parametrize("pack", [False, True])
def test_peek_shows_text_padding_and_speed(pack, monkeypatch):
    monkeypatch.setattr("switch_jax.data.peek._TIMED_SECONDS", 0.01)
    text = examples_text(config(pack=pack, batch_size=2), 3)
    assert "text, example 3" in text and "example 4" not in text
    assert "<extra_id_0>" in text and "tokens per second" in text
    assert "Padding: 0.0% of the inputs" in text or pack
    assert ("inputs 1" in text) == pack


def test_a_damaged_plan_in_the_cache_is_refused_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path))
    plan = functools.partial(plan_rows, objective=objective(), first_number=0)
    arguments = ("key", plan, np.array([0, 90, 200]), 64, 20)
    assert cached_row_plan(*arguments).lengths.sum() == 200
    [path] = (tmp_path / "plans").glob("*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:-30]), b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"key\.npz is damaged .*; delete it"):
            cached_row_plan(*arguments)


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": "s", "next_row": "7"}', "{", "7"])
def test_a_damaged_position_is_a_value_error(tmp_path, content):
    """`restore_state` sets the checkpoint aside for it."""
    (tmp_path / "position.json").write_text(content)
    with pytest.raises(ValueError):
        SyntheticIterator(tiny()).restore(tmp_path)
