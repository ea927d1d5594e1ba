"""Answers to texts: their scores, order, prefixes and windows, with a model of 16 words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from switch_jax.inference.answer_file import write_answers
from switch_jax.inference.answers import WINDOW, answer_texts
from switch_jax.inference.decoding import SamplingOptions
from switch_jax.inference.prompt_file import PromptRecord
from switch_jax.inference.prompts import Prompt, PromptCodec
from switch_jax.model.transformer import SwitchTransformer
from tests.support.configs import tiny
from tests.support.words import WordVocabulary

LENGTH = 6  # tokens of an answer
WORDS = WordVocabulary(("<pad>", "</s>", *"abcdefghijklmn"))
# With tied embeddings, every token would be its own most probable successor.
CONFIG = tiny(
    **{"model.vocab_size": 16, "model.init_scale": 3.0, "model.tied_embeddings": False},
    **{"moe.num_experts": 2, "model.num_decoder_layers": 4},
)
CODEC = PromptCodec(CONFIG, WORDS, LENGTH, fill_blanks=False)
OPTIONS = {
    "greedy": SamplingOptions(),
    "beams": SamplingOptions(beam_size=4, num_return=3),
    "samples": SamplingOptions(temperature=1.5, top_k=12, num_return=3, seed=5),
}


@pytest.fixture(scope="module")
def model():
    """Random weights whose outputs differ from text to text; some end early."""
    return SwitchTransformer(CONFIG, jax.random.key(0))


def random_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Texts of up to 20 words; half of them with a prefix of up to three."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(list("abcdefghijklmn"), rng.integers(0, most, endpoint=True)))

    return [Prompt(words(20), words(3) if i % 2 else "") for i in range(count)]


@jax.jit
def teacher_forced(model, source, target):
    """[N, L] log probabilities of the tokens of targets [N, L], by the whole decoder."""
    shifted = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
    batch = {"encoder_input_tokens": source, "decoder_input_tokens": shifted}
    logp = jax.nn.log_softmax(model.forward(batch, capacity_factor=None)[0])
    return jnp.take_along_axis(logp, target[..., None], -1)[..., 0]


def pad(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_have_their_prefix_their_score_and_their_order(model, options):
    prompts = random_prompts(60)
    answers = list(answer_texts(model, CODEC, prompts, options))
    assert [len(of_text) for of_text in answers] == [options.num_return] * len(prompts)
    source, target, is_scored, scores = [], [], [], []
    for prompt, of_text in zip(prompts, answers):
        for answer in of_text:
            assert answer.text.startswith(prompt.prefix)
            tokens = WORDS.encode(answer.text) + [EOS] * answer.ended
            assert answer.ended or len(tokens) == LENGTH
            source.append(pad([*WORDS.encode(prompt.text), EOS], 24))
            target.append(pad(tokens, LENGTH))
            position = np.arange(LENGTH)
            is_scored.append(
                (len(WORDS.encode(prompt.prefix)) <= position) & (position < len(tokens))
            )
            scores.append(answer.score)
            if options.beam_size > 1:
                penalty = ((5 + len(tokens)) / 6) ** options.length_penalty
                assert answer.normalized_score == pytest.approx(answer.score / penalty, abs=1e-5)
            else:
                assert answer.normalized_score is None
    logp = teacher_forced(model, np.array(source), np.array(target))
    np.testing.assert_allclose(scores, np.where(is_scored, logp, 0).sum(1), atol=1e-4)
    ended = [answer.ended for of_text in answers for answer in of_text]
    assert (
        0.1 < np.mean(ended) < 0.95 and len({a.text for of_text in answers for a in of_text}) > 40
    )
    if options.beam_size > 1:
        for of_text in answers:
            ranks = [(answer.ended, answer.normalized_score) for answer in of_text]
            assert ranks == sorted(ranks, reverse=True)
            assert len({(answer.text, answer.ended) for answer in of_text}) == len(of_text)


def test_greedy_answers_are_the_most_probable_words_behind_the_prefix(model):
    prompts = random_prompts(20, seed=1)
    (ours,) = zip(*answer_texts(model, CODEC, prompts))
    source = np.array([pad([*WORDS.encode(p.text), EOS], 24) for p in prompts])
    tokens = [WORDS.encode(answer.text) + [EOS] * answer.ended for answer in ours]
    target = np.array([pad(ids, LENGTH) for ids in tokens])
    best = (
        np.stack(
            [
                teacher_forced(model, source, np.where(np.arange(LENGTH) == n, w, target))[:, n]
                for n in range(LENGTH)
                for w in range(16)
            ],
            1,
        )
        .reshape(len(prompts), LENGTH, 16)
        .argmax(-1)
    )
    for prompt, ids, best_L in zip(prompts, tokens, best):
        begin = len(WORDS.encode(prompt.prefix))
        assert ids[begin:] == best_L[begin : len(ids)].tolist()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_do_not_depend_on_the_other_texts(model, options):
    """In other company, a text at the same place has the same answers."""
    prompts = random_prompts(2 * WINDOW + 40)
    expected = list(answer_texts(model, CODEC, prompts, options))

    @settings(max_examples=3)
    @given(seed=st.integers(1, 99), kept=st.sets(st.integers(0, len(prompts) - 1), min_size=40))
    def check(seed, kept):
        others = random_prompts(len(prompts), seed)
        company = [prompts[i] if i in kept else other for i, other in enumerate(others)]
        for i, answers in enumerate(answer_texts(model, CODEC, company, options)):
            if i in kept:
                assert [a.text for a in answers] == [a.text for a in expected[i]]
                np.testing.assert_allclose(
                    [a.score for a in answers], [a.score for a in expected[i]], atol=1e-4
                )

    check()


def test_equal_texts_have_samples_of_their_own(model):
    prompts = [Prompt("a b")] * (WINDOW + 32)
    answers = list(answer_texts(model, CODEC, prompts, OPTIONS["samples"]))
    assert len({tuple(answer.text for answer in of_text) for of_text in answers}) > WINDOW + 24


def test_texts_are_read_by_windows(model):
    read = []

    def lazy():
        for prompt in random_prompts(WINDOW + 1):
            read.append(prompt)
            yield prompt

    next(answer_texts(model, CODEC, lazy()))
    assert len(read) == WINDOW


def records(count: int) -> list[PromptRecord]:
    prompts = random_prompts(count)
    return [PromptRecord(p, {"id": i, "text": p.text}) for i, p in enumerate(prompts)]


def write(path, model, *, count=2 * WINDOW + 40, options=OPTIONS["samples"], checkpoint=1):
    """Yields as `write_answers`; the answers to random texts."""
    identity = {"checkpoint": checkpoint}
    return write_answers(path, records(count), CODEC, options, identity, lambda: model)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_interrupted_file_is_continued_and_ends_with_the_same_bytes(tmp_path, model, options):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert list(write(whole, model, options=options))[-1] == 2 * WINDOW + 40
    partial = tmp_path / "answers.jsonl.partial" / "answers.jsonl"
    interrupted = write(path, model, options=options)
    assert [next(interrupted), next(interrupted)] == [0, WINDOW]
    interrupted.close()
    assert partial.read_bytes().count(b"\n") == WINDOW and not path.exists()
    with partial.open("ab") as file:  # as a kill amid writing the next window leaves it
        file.write(b"".join(whole.read_bytes().splitlines(True)[WINDOW : WINDOW + 9]) + b'{"id": ')
    assert list(write(path, model, options=options)) == [WINDOW, 2 * WINDOW, 2 * WINDOW + 40]
    assert path.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole.jsonl", "answers.jsonl"}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"options": SamplingOptions(temperature=1.5, top_k=12, num_return=3, seed=6)}, "seed"),
        ({"count": 2 * WINDOW + 41}, "texts"),
        ({"checkpoint": 2}, "checkpoint"),
    ],
)
def test_a_file_of_other_arguments_is_not_continued(tmp_path, model, change, word):
    path = tmp_path / "answers.jsonl"
    begun = write(path, model)
    next(begun), next(begun)
    begun.close()
    before = (tmp_path / "answers.jsonl.partial" / "answers.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"was made with another value of {word};"):
        list(write(path, model, **change))
    assert (tmp_path / "answers.jsonl.partial" / "answers.jsonl").read_bytes() == before


def test_an_answers_field_of_the_input_is_refused(tmp_path, model):
    record = PromptRecord(Prompt("a", "", "f.jsonl, line 1"), {"text": "a", "answers": []})
    with pytest.raises(UserError, match=r"f\.jsonl, line 1 has a field 'answers'"):
        next(write_answers(tmp_path / "o", [record], CODEC, SamplingOptions(), {}, lambda: model))
    assert not list(tmp_path.iterdir())
