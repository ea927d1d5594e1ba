"""Vocabularies with T5's ids: 0 padding, 1 EOS, 2 unknown, 100 sentinels at the end.

A vocabulary's file is a SentencePiece model, or the word `bytes`. Every token store and every
WORKDIR contains its own copy, so that it can be moved to another machine.
"""

import abc
import hashlib
import os
import re
from collections.abc import Iterable
from itertools import groupby

import sentencepiece
from etils import epath

from switch_jax.errors import UserError

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
VOCABULARY_FILE = "vocabulary.model"  # in a WORKDIR and in a token store
HUGGING_FACE_VOCABULARY_FILE = "spiece.model"  # in a Hugging Face folder
BYTES = "bytes"  # the byte vocabulary: value of `data.vocabulary` and content of its file
_SENTINEL = re.compile(r"<extra_id_(\d{1,2})>")


class Vocabulary(abc.ABC):
    """Pieces of text and their ids, followed by 100 sentinels in descending order.

    Attributes:
      name: path or `bytes`, for messages.
      content: the bytes of its file.
      size: number of pieces and sentinels; every id is smaller.
      fingerprint: hash of the content, 32 hexadecimal digits.
    """

    def __init__(self, name: str, content: bytes, pieces: int):
        self.name = name
        self.content = content
        self.size = pieces + NUM_SENTINELS
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    @property
    def padded_size(self) -> int:
        """The recommended `model.vocab_size`: `size` rounded up to a multiple of 128, as in T5."""
        return -(-self.size // 128) * 128

    def sentinel(self, number: int) -> int:
        """Returns the id of `<extra_id_NUMBER>`; sentinel 0 has the last id."""
        return self.size - 1 - number

    def piece(self, token: int) -> str:
        """Returns an id as text: `▁the` with `▁` for a space, `</s>`, `<0x0A>`, `<extra_id_0>`;
        `#900` for an id past the end.
        """
        if token >= self.size:
            return f"#{token}"
        if token >= self.size - NUM_SENTINELS:
            return f"<extra_id_{self.size - 1 - token}>"
        return self._piece(token)

    def encode(self, text: str) -> list[int]:
        """Returns ids without EOS; `<extra_id_0>` to `<extra_id_99>` become sentinels."""
        ids: list[int] = []
        for i, part in enumerate(_SENTINEL.split(text)):
            if i % 2:
                ids.append(self.sentinel(int(part)))
            else:
                ids += self._encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns text with sentinels as `<extra_id_0>`, without padding, EOS, ids past the end."""
        parts = []
        for are_pieces, group in groupby(map(int, ids), lambda i: i < self.size - NUM_SENTINELS):
            if are_pieces:
                parts.append(self._decode(list(group)).strip())
            else:
                parts += [f"<extra_id_{self.size - 1 - i}>" for i in group if i < self.size]
        return " ".join(filter(None, parts))

    @abc.abstractmethod
    def _piece(self, token: int) -> str: ...
    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model.

    Raises `UserError` if the content is no such model, or its special ids differ from T5's.
    """

    def __init__(self, name: str, content: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                f"Vocabulary {name!r} is not a SentencePiece model; set data.vocabulary to one."
            ) from error
        ids = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if ids != (PAD, EOS, UNK):
            raise UserError(
                f"Vocabulary {name!r} has pad, EOS and unknown at {ids}, not at (0, 1, 2) as"
                " T5's; train one with `switch-jax data vocab`."
            )
        super().__init__(name, content, self._processor.get_piece_size())

    def _piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class ByteVocabulary(Vocabulary):
    """The byte vocabulary of ByT5: the 256 bytes of UTF-8, from id 3 on."""

    _FIRST = 3

    def __init__(self):
        super().__init__(BYTES, BYTES.encode(), self._FIRST + 256)

    def _piece(self, token: int) -> str:
        if token < self._FIRST:
            return ("<pad>", "</s>", "<unk>")[token]
        character = chr(token - self._FIRST)
        return character if "!" <= character <= "~" else f"<0x{token - self._FIRST:02X}>"

    def _encode(self, text: str) -> list[int]:
        return [byte + self._FIRST for byte in text.encode("utf-8", "replace")]

    def _decode(self, ids: list[int]) -> str:
        data = bytes(i - self._FIRST for i in ids if i >= self._FIRST)
        return data.decode("utf-8", "replace")


def read_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """Reads a vocabulary file; the path `bytes` means the byte vocabulary.

    Raises `UserError` for a file that is missing or contains no vocabulary.
    """
    if str(path) == BYTES:
        return ByteVocabulary()
    file = epath.Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"Vocabulary {str(file)!r} cannot be read ({error.strerror or error}); set"
            f" data.vocabulary to a SentencePiece model, to {BYTES}, or to None for one of the"
            " mixture's own."
        ) from error
    return parse_vocabulary(str(file), content)


def parse_vocabulary(name: str, content: bytes) -> Vocabulary:
    """Returns the vocabulary of a file's content; raises `UserError` if it is not a vocabulary."""
    return ByteVocabulary() if content == BYTES.encode() else SentencePieceVocabulary(name, content)
