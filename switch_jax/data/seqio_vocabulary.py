"""Vocabularies as seqio has them, to encode text in a tf.data pipeline."""

from collections.abc import Sequence

import numpy as np

from switch_jax.data.seqio_import import seqio, tf
from switch_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary


def seqio_vocabulary(vocabulary: Vocabulary, eos_id: int) -> seqio.Vocabulary:
    """Returns a vocabulary for seqio: one of its own, which encodes in C++, where it has one."""
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=vocabulary.size - seqio.ByteVocabulary().vocab_size)
    if isinstance(vocabulary, SentencePieceVocabulary) and vocabulary.eos == eos_id:
        extra_ids = 0 if vocabulary.has_own_sentinels else len(vocabulary.sentinels)
        return seqio.SentencePieceVocabulary(vocabulary.name, extra_ids=extra_ids)
    return _PythonVocabulary(vocabulary, eos_id)


class _PythonVocabulary(seqio.Vocabulary):
    """A vocabulary that encodes in Python, one text at a time."""

    def __init__(self, vocabulary: Vocabulary, eos_id: int):
        super().__init__(extra_ids=0)
        self._vocabulary = vocabulary
        self._eos_id = eos_id

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def unk_id(self) -> int | None:
        return self._vocabulary.unk

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            return np.array(self._vocabulary.encode(text.decode("utf-8", "replace")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PythonVocabulary) and (
            self._vocabulary.fingerprint,
            self._eos_id,
        ) == (other._vocabulary.fingerprint, other._eos_id)

    def __hash__(self) -> int:
        return hash((self._vocabulary.fingerprint, self._eos_id))
