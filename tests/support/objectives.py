"""Objectives with a vocabulary that knows the modes of UL2 and T5's sentinels, and no pieces."""

import itertools
from typing import NamedTuple

from switch_jax.data.objectives import Objective
from switch_jax.data.vocabulary import EOS

FIRST_SENTINEL = 31_999
MODES = {"[NLU]": [901], "[NLG]": [902, 903], "[S2S]": [904]}


class Pieces(NamedTuple):
    """The part of a vocabulary that objectives use."""

    sentinels: range = range(FIRST_SENTINEL, FIRST_SENTINEL - 100, -1)
    name: str = "pieces"

    def encode(self, text):
        return MODES[text]


T5 = Pieces()


def objective(name="span_corruption", seed=0, vocabulary=T5):
    return Objective(name, seed, vocabulary, EOS)


def text_length(inputs_length, targets_length):
    """Returns the number of tokens of a row under span corruption."""
    return objective().text_length(inputs_length, targets_length)


def restored(inputs, targets, is_sentinel=lambda token: token > FIRST_SENTINEL - 100):
    """Restores a text from its inputs and targets, without mode and EOS.

    Runs of the inputs and runs of the targets follow each other in turn. The side that begins with
    a sentinel omits the beginning of the text.
    """

    def runs(side):
        found = [[]]
        for token in side:
            if is_sentinel(token):
                found.append([])
            else:
                found[-1].append(token)
        return found

    first, second = runs(inputs), runs(targets)
    if targets and is_sentinel(targets[0]):
        second = second[1:]
    elif inputs and is_sentinel(inputs[0]):
        first, second = second, first[1:]
    return [
        token
        for pair in itertools.zip_longest(first, second, fillvalue=[])
        for run in pair
        for token in run
    ]
