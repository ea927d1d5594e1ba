"""Vocabularies with T5's ids: 0 padding, 1 EOS, 2 unknown, 100 sentinels at the end.

A file holds a vocabulary: a SentencePiece model, or the word `bytes`. Packed text and every
WORKDIR keep one, so that what was trained can be read anywhere.
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

PAD, UNK = 0, 2
NUM_SENTINELS = 100
FILE_NAME = "vocabulary.model"  # in a WORKDIR and in a folder of packed text
HUGGING_FACE_NAME = "spiece.model"  # the same in a folder of theirs
BYTES = "bytes"  # what a config, and a file, call the vocabulary of bytes
_SENTINEL = re.compile(r"<extra_id_(\d{1,2})>")


class Vocabulary(abc.ABC):
    """Pieces of text and their ids, followed by 100 sentinels in descending order.

    Attributes:
      name: what messages call it.
      content: the bytes of its file.
      size: pieces and sentinels; every id is below it.
      fingerprint: 32 hexadecimal digits that change with the content.
    """

    def __init__(self, name: str, content: bytes, pieces: int):
        self.name = name
        self.content = content
        self.size = pieces + NUM_SENTINELS
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    @property
    def padded_size(self) -> int:
        """The size that a model should have: a multiple of 128, as T5's and mT5's."""
        return -(-self.size // 128) * 128

    def sentinel(self, number: int) -> int:
        """The id of `<extra_id_NUMBER>`, counting down from the last."""
        return self.size - 1 - number

    def piece(self, token: int) -> str:
        """How an id is written: `▁the` with `▁` for a space, `</s>`, `<0x0A>`, `<extra_id_0>`;
        `#900` past the end.
        """
        if token >= self.size:
            return f"#{token}"
        if token >= self.size - NUM_SENTINELS:
            return f"<extra_id_{self.size - 1 - token}>"
        return self._piece(token)

    def encode(self, text: str) -> list[int]:
        """Ids without EOS; `<extra_id_0>` … `<extra_id_99>` in the text become sentinels."""
        ids: list[int] = []
        for i, part in enumerate(_SENTINEL.split(text)):
            if i % 2:
                ids.append(self.sentinel(int(part)))
            else:
                ids += self._encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text with sentinels written out; padding, EOS and ids past the end say nothing."""
        parts = []
        for is_piece, run in groupby(map(int, ids), lambda i: i < self.size - NUM_SENTINELS):
            if is_piece:
                parts.append(self._decode(list(run)).strip())
            else:
                parts += [f"<extra_id_{self.size - 1 - i}>" for i in run if i < self.size]
        return " ".join(filter(None, parts))

    @abc.abstractmethod
    def _piece(self, token: int) -> str: ...
    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model's pieces; raises `UserError` where it is none, or has other ids."""

    def __init__(self, name: str, content: bytes):
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                f"Vocabulary {name!r} is not a SentencePiece model; set data.vocabulary to one."
            ) from error
        ids = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id())
        if ids != (PAD, EOS, UNK):
            raise UserError(
                f"Vocabulary {name!r} has pad, EOS and unknown at {ids}, not at (0, 1, 2) as"
                " T5's; train one with `switch-jax data vocab`."
            )
        super().__init__(name, content, self._pieces.get_piece_size())

    def _piece(self, token: int) -> str:
        return self._pieces.id_to_piece(token)

    def _encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)


class ByteVocabulary(Vocabulary):
    """The 256 bytes of UTF-8, from id 3 on, as ByT5 has them."""

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
    """The vocabulary that a file holds; `bytes` is the one without a file.

    Raises `UserError` for a file that is missing or holds none.
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
    """The vocabulary of a file's content; raises `UserError` where it is none."""
    return ByteVocabulary() if content == BYTES.encode() else SentencePieceVocabulary(name, content)


EOS = 1
