"""A vocabulary of words, which writes every id but EOS."""

from collections.abc import Sequence

from switch_jax.data.vocabulary import EOS, PAD, Vocabulary


class WordVocabulary(Vocabulary):
    """Words separated by spaces. The first is padding, the second EOS; others may be sentinels."""

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        sentinels = sorted(word for word in words if word.startswith("<extra_id_"))
        ids = [self._words.index(sentinel) for sentinel in sentinels]
        content = " ".join(words).encode()
        super().__init__("words", content, len(words), ids, pad=PAD, eos=EOS, unk=None)

    def is_control(self, token: int) -> bool:
        return token == EOS

    def _piece(self, token: int) -> str:
        return self._words[token]

    def _encode(self, text: str) -> list[int]:
        return [self._words.index(word) for word in text.split()]

    def _decode(self, ids: list[int]) -> str:
        return " ".join(self._words[i] for i in ids if i != EOS)
