"""Vocabularies: the ids of pieces of text, of padding, EOS and unknown pieces, and of sentinels.

A vocabulary's file is a SentencePiece model, or the word `bytes` or `byt5`. Every token store and
every WORKDIR contains its own copy, so that it can be moved to another machine.

Sentinels `<extra_id_0>`, `<extra_id_1>`, … mark the spans of span corruption. A SentencePiece model
that has pieces of these names, as mT5's, has its sentinels there. Behind the pieces of any other,
as T5's, follow 100 sentinels in descending order: `<extra_id_0>` has the last id.
"""

import abc
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable
from itertools import groupby

import sentencepiece
from etils import epath

from switch_jax.config import ModelConfig
from switch_jax.errors import UserError

PAD, EOS, UNK = 0, 1, 2  # of vocabularies that are trained here, and of bytes; as T5's
NUM_SENTINELS = 100  # behind the pieces of a vocabulary whose file has none
VOCABULARY_FILE = "vocabulary.model"  # in a WORKDIR and in a token store
HUGGING_FACE_VOCABULARY_FILE = "spiece.model"  # in a Hugging Face folder
BYTES = "bytes"  # the byte vocabulary: value of `data.vocabulary` and content of its file
_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,8})>")


class Vocabulary(abc.ABC):
    """Pieces of text and their ids.

    Attributes:
      name: path, or the name of a vocabulary of bytes, for messages.
      content: the bytes of its file.
      size: number of ids, sentinels included; every id is smaller.
      sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, …; empty if the vocabulary has none.
      pad: id of padding; None if the vocabulary has none.
      eos: id of the end of a text; None if the vocabulary has none.
      unk: id of what the vocabulary cannot write; None if it can write everything.
      fingerprint: hash of the content, 32 hexadecimal digits.
    """

    def __init__(
        self,
        name: str,
        content: bytes,
        size: int,
        sentinels: Iterable[int],
        *,
        pad: int | None,
        eos: int | None,
        unk: int | None,
    ):
        self.name = name
        self.content = content
        self.size = size
        self.sentinels = tuple(sentinels)
        self.pad, self.eos, self.unk = pad, eos, unk
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        self._sentinel_names = {
            token: f"<extra_id_{number}>" for number, token in enumerate(self.sentinels)
        }

    @property
    def num_pieces(self) -> int:
        """Number of ids that are no sentinels."""
        return self.size - len(self.sentinels)

    @property
    def padded_size(self) -> int:
        """The recommended `model.vocab_size`: `size` rounded up to a multiple of 128, as in T5."""
        return -(-self.size // 128) * 128

    def sentinel(self, number: int) -> int:
        """Returns the id of `<extra_id_NUMBER>`."""
        return self.sentinels[number]

    def piece(self, token: int) -> str:
        """Returns an id as text: `▁the` with `▁` for a space, `</s>`, `<0x0A>`, `<extra_id_0>`;
        `#900` for an id outside the vocabulary.
        """
        if not 0 <= token < self.size:
            return f"#{token}"
        return self._sentinel_names.get(token) or self._piece(token)

    def encode(self, text: str) -> list[int]:
        """Returns ids without EOS; `<extra_id_0>` and its other sentinels become one id each."""
        ids: list[int] = []
        start = 0
        for match in _SENTINEL.finditer(text):
            if int(match[1]) < len(self.sentinels):
                ids += self._encode(text[start : match.start()])
                ids.append(self.sentinels[int(match[1])])
                start = match.end()
        return ids + self._encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns text with sentinels as `<extra_id_0>`, without padding and EOS.

        Ids outside the vocabulary are left out.
        """
        known = [token for token in map(int, ids) if 0 <= token < self.size]
        parts = []
        for are_sentinels, group in groupby(known, self._sentinel_names.__contains__):
            if are_sentinels:
                parts += [self._sentinel_names[token] for token in group]
            else:
                parts.append(self._decode(list(group)).strip())
        return " ".join(filter(None, parts))

    @abc.abstractmethod
    def is_control(self, token: int) -> bool:
        """Whether an id is in no text: padding, EOS, or another mark."""

    @abc.abstractmethod
    def _piece(self, token: int) -> str: ...
    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def named_sentinels(token_id: Callable[[str], int | None]) -> tuple[int, ...]:
    """Returns the ids of `<extra_id_0>`, `<extra_id_1>`, …, up to a missing one.

    Args:
      token_id: returns the id of a piece of that name, or None. `▁` may come before the name.
    """
    sentinels: list[int] = []
    for number in itertools.count():
        name = f"<extra_id_{number}>"
        ids = [token for token in map(token_id, ("▁" + name, name)) if token is not None]
        if not ids:
            return tuple(sentinels)
        sentinels.append(ids[0])
    raise AssertionError


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model; raises `UserError` if the content is none."""

    def __init__(self, name: str, content: bytes):
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                f"Vocabulary {name!r} is not a SentencePiece model; set data.vocabulary to one."
            ) from error
        size = processor.get_piece_size()
        sentinels = named_sentinels(self._find)
        self.has_own_sentinels = bool(sentinels)
        if not sentinels:
            sentinels = tuple(range(size + NUM_SENTINELS - 1, size - 1, -1))
            size += NUM_SENTINELS
        pad, eos, unk = (
            None if token < 0 else token
            for token in (processor.pad_id(), processor.eos_id(), processor.unk_id())
        )
        super().__init__(name, content, size, sentinels, pad=pad, eos=eos, unk=unk)

    def is_control(self, token: int) -> bool:
        return self._processor.is_control(token)

    def _find(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def _piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class ByteVocabulary(Vocabulary):
    """The 256 bytes of UTF-8, from id 3 on, and 100 sentinels behind them."""

    _FIRST = 3

    def __init__(self):
        pieces = self._FIRST + 256
        size = pieces + NUM_SENTINELS
        sentinels = range(size - 1, pieces - 1, -1)
        super().__init__(BYTES, BYTES.encode(), size, sentinels, pad=PAD, eos=EOS, unk=UNK)

    def is_control(self, token: int) -> bool:
        return token < self._FIRST

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


def check_vocabulary(vocabulary: Vocabulary, model: ModelConfig) -> None:
    """Raises `UserError` where a model cannot be used with a vocabulary.

    The vocabulary has more ids than the model, or another padding or EOS; an id that the model uses
    as one of them without the vocabulary's knowing must not be in any text.
    """
    name = vocabulary.name
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"Vocabulary {name!r} has {vocabulary.size} ids, sentinels included, and"
            f" model.vocab_size={model.vocab_size}; set it to {vocabulary.padded_size}, or"
            " data.vocabulary to the model's own."
        )
    for key, meaning, own, used in (
        ("pad_id", "padding", vocabulary.pad, model.pad_id),
        ("eos_id", "the end of a text", vocabulary.eos, model.eos_id),
    ):
        if own not in (None, used):
            raise UserError(
                f"In vocabulary {name!r}, {own} stands for {meaning}, and model.{key}={used}; set"
                f" it to {own}, or data.vocabulary to the model's own."
            )
        if own is None and used < vocabulary.size and not vocabulary.is_control(used):
            raise UserError(
                f"Vocabulary {name!r} has no id for {meaning}, and model.{key}={used} is its piece"
                f" {vocabulary.piece(used)!r}; set it to an id that is in no text."
            )
