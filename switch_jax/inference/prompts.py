"""Prompts: texts with a forced beginning of their answer, as tokens of a model and back."""

from collections.abc import Iterable
from typing import NamedTuple

from switch_jax.config import Config
from switch_jax.data import Vocabulary
from switch_jax.errors import UserError
from switch_jax.inference.fill_blanks import (
    fill_sentinels,
    has_blanks,
    is_trained_on_blanks,
    number_blanks,
)


class Prompt(NamedTuple):
    """Input of a model as text.

    text: the input.
    prefix: text with which the answer must begin; empty: any answer.
    place: its name in errors, such as "/data/a.jsonl, line 3".
    """

    text: str
    prefix: str = ""
    place: str = "The text"


class EncodedPrompt(NamedTuple):
    """A prompt as tokens.

    text: the input, its blanks numbered as sentinels where they are to be filled.
    source: ids of the input, EOS included.
    prefix: ids with which the answer begins.
    """

    text: str
    source: list[int]
    prefix: list[int]


class PromptCodec:
    """Conversion of prompts to tokens, and of tokens to answers.

    Attributes:
      fill_blanks: whether an answer is the input with its blanks filled.
      eos_id: id of the end of a text.
      max_length: maximum number of tokens of an answer.
      vocabulary: the model's.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        max_length: int = 128,
        fill_blanks: bool | None = None,
    ):
        """`config`: the model's; `fill_blanks=None`: if the model was pretrained on that."""
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.fill_blanks = is_trained_on_blanks(config) if fill_blanks is None else fill_blanks
        self.eos_id = config.model.eos_id

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Returns a prompt as tokens.

        Raises `UserError` for a text with more blanks than the vocabulary has sentinels, and for a
        prefix beside blanks, that leaves no room for a token behind it, or that the vocabulary
        cannot write.
        """
        text, place = prompt.text, prompt.place
        if self.fill_blanks and has_blanks(text):
            if prompt.prefix:
                raise UserError(
                    f"{place} has blanks and a prefix; leave one of them out, or set"
                    " --no-fill_blanks."
                )
            count = len(self.vocabulary.sentinels)
            numbered = number_blanks(text, count)
            if numbered is None:
                raise UserError(
                    f"{place} has more blanks than the vocabulary has sentinels ({count}); split"
                    " it."
                )
            text = numbered
        source = [*self.vocabulary.encode(text), self.eos_id]
        return EncodedPrompt(text, source, self._encode_prefix(prompt))

    def decode(self, prompt: EncodedPrompt, tokens: Iterable[int]) -> str:
        """Returns the answer that output tokens [L] are: the text with its blanks filled, or text.

        The output itself is the answer to a text without blanks, where it has a text for none of
        them, and where blanks are not filled. It begins with the prefix. A blank for which the
        output has no text becomes `___`.
        """
        output = self.vocabulary.decode(tokens)
        if self.fill_blanks and has_blanks(prompt.text):
            return fill_sentinels(prompt.text, output)
        return output

    def _encode_prefix(self, prompt: Prompt) -> list[int]:
        tokens = self.vocabulary.encode(prompt.prefix) if prompt.prefix else []
        if len(tokens) >= self.max_length:
            raise UserError(
                f"{prompt.place} has a prefix of {len(tokens)} tokens, and max_length="
                f"{self.max_length} must be more; shorten the prefix, or make max_length larger."
            )
        if (written := self.vocabulary.decode(tokens)) != prompt.prefix:
            raise UserError(
                f"{prompt.place} has the prefix {prompt.prefix!r}, which the vocabulary writes as"
                f" {written!r}; change it to that, or to other characters."
            )
        return tokens
