"""Vocabularies: the ids of pieces of text, of padding, EOS and unknown pieces, and of sentinels.

A vocabulary's file is a SentencePiece model, a `tokenizer.json` of the library tokenizers, or the
word `bytes` or `byt5`; the content says which. Every token store and every WORKDIR contains its own
copy, so that it can be moved to another machine.

Sentinels `<extra_id_0>`, `<extra_id_1>`, … mark the spans of span corruption. mT5's model and every
`tokenizer.json` have pieces of these names, which are the sentinels. A SentencePiece model without
them, as T5's, is followed by 100 sentinels in descending order: `<extra_id_0>` has the last id.
There are none where the model has exactly as many ids as the file has pieces, as MADLAD's.
"""

import abc
import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from itertools import groupby

import sentencepiece

from switch_jax.config import ModelConfig
from switch_jax.errors import UserError
from switch_jax.files import as_path

PAD, EOS, UNK = 0, 1, 2  # of vocabularies that are trained here, and of bytes; as T5's
NUM_SENTINELS = 100  # behind the pieces of a vocabulary whose file has none
VOCABULARY_FILE = "vocabulary.model"  # in a WORKDIR and in a token store
HUGGING_FACE_VOCABULARY_FILES = ("spiece.model", "tokenizer.json")
"""Vocabulary files of a Hugging Face folder; the first that exists is used."""
BYTES = "bytes"  # as BYT5
BYT5 = "byt5"
"""Vocabulary of bytes as in ByT5: value of `data.vocabulary`, and content of its file."""
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
      unk: id of what the vocabulary cannot write; None if it has none.
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
        """Whether an id stands for no text: padding, EOS, or another mark."""

    @abc.abstractmethod
    def _piece(self, token: int) -> str: ...
    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def _named_sentinels(token_id: Callable[[str], int | None]) -> tuple[int, ...]:
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
    """A SentencePiece model; raises `UserError` if the content is none.

    Args:
      max_size: number of ids of the model that uses it; None: unknown.
    """

    def __init__(self, name: str, content: bytes, max_size: int | None = None):
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                f"Vocabulary {name!r} is not a SentencePiece model; set data.vocabulary to one."
            ) from error
        size = processor.get_piece_size()
        sentinels = _named_sentinels(self._find)
        self.has_own_sentinels = bool(sentinels)
        if not sentinels and size != max_size:
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


class TokenizerVocabulary(Vocabulary):
    """A `tokenizer.json`, which the library tokenizers reads.

    Ids are those of the library; so a `</s>` or another mark in a text is the mark, which it is not
    for a SentencePiece model. A unigram model that leaves it open how spaces are written has them
    as `▁` before each word, as T5's tokenizer has.

    Raises `UserError` if the content is none, or the library is not installed.
    """

    def __init__(self, name: str, content: bytes):
        try:
            from tokenizers import Tokenizer, decoders, pre_tokenizers
        except ImportError:
            raise UserError(
                f"Vocabulary {name!r} is a tokenizer.json and needs the package tokenizers; install"
                " switch_jax[interop]."
            ) from None
        try:
            self._tokenizer = tokenizer = Tokenizer.from_str(content.decode())
            raw = json.loads(content)
        except Exception as error:  # the library has no class of its own
            raise UserError(
                f"Vocabulary {name!r} is not a tokenizer.json that the package tokenizers reads"
                f" ({error}); set data.vocabulary to another file, or install a newer tokenizers."
            ) from error
        for entry in raw.get("added_tokens") or []:
            if (token := tokenizer.token_to_id(entry["content"])) != entry["id"]:
                raise UserError(  # it leaves no gaps
                    f"In vocabulary {name!r} the package tokenizers numbers {entry['content']!r}"
                    f" as {token}, and the file as {entry['id']}; set data.vocabulary to another"
                    " file."
                )
        model = raw["model"]
        if model.get("type") == "Unigram" and tokenizer.pre_tokenizer is None:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
            )
            tokenizer.decoder = decoders.Metaspace()
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        pad, eos = map(tokenizer.token_to_id, ("<pad>", "</s>"))
        unk = model.get("unk_id")
        if unk is None:
            unk = tokenizer.token_to_id(model.get("unk_token") or "<unk>")
        sentinels = _named_sentinels(tokenizer.token_to_id)
        added = tokenizer.get_added_tokens_decoder()
        marks = {pad, eos, *(token for token, entry in added.items() if entry.special)}
        self._controls = marks - {unk, *sentinels}
        super().__init__(name, content, size, sentinels, pad=pad, eos=eos, unk=unk)

    def is_control(self, token: int) -> bool:
        return token in self._controls

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"#{token}"

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        pieces = [token for token in ids if token not in self._controls]
        return self._tokenizer.decode(pieces, skip_special_tokens=False)


class ByteVocabulary(Vocabulary):
    """The 256 bytes of UTF-8, from id 3 on, and 100 sentinels behind them."""

    _FIRST = 3
    _BEHIND = _FIRST + 256

    def __init__(self, name: str = BYTES, size: int = _BEHIND + NUM_SENTINELS):
        sentinels = range(size - 1, size - 1 - NUM_SENTINELS, -1)
        super().__init__(name, name.encode(), size, sentinels, pad=PAD, eos=EOS, unk=UNK)

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


class ByT5Vocabulary(ByteVocabulary):
    """The vocabulary of ByT5: sentinels are the last 100 ids of the bytes, `<extra_id_0>` is 258.

    So an id may stand for a sentinel or for a part of a character. `decode` takes it for a sentinel
    where it is no part of a character.
    """

    def __init__(self):
        super().__init__(BYT5, self._BEHIND)
        in_no_text = range(0xF5 + self._FIRST, self._BEHIND)
        self._sentinel_names = {
            i: name for i, name in self._sentinel_names.items() if i in in_no_text
        }

    def decode(self, ids: Iterable[int]) -> str:
        data = bytes(i - self._FIRST for i in map(int, ids) if self._FIRST <= i < self._BEHIND)
        parts = re.split("(<extra_id_[0-9]+>)", data.decode("utf-8", _BYT5_SENTINELS))
        return " ".join(filter(None, (part.strip() for part in parts)))


_BYT5_SENTINELS = "switch_jax.byt5_sentinels"  # how errors in UTF-8 are decoded


def _decode_byt5_sentinel(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    number = 255 - error.object[error.start]
    return f"<extra_id_{number}>" if number < NUM_SENTINELS else "\ufffd", error.start + 1


codecs.register_error(_BYT5_SENTINELS, _decode_byt5_sentinel)


def read_vocabulary(
    path: str | os.PathLike, model: ModelConfig | None = None, max_size: int | None = None
) -> Vocabulary:
    """Reads a vocabulary file; the paths `bytes` and `byt5` mean these vocabularies.

    Args:
      model: must be usable with the vocabulary; None: any.
      max_size: number of ids of the model, where it is all that is known of it.

    Raises `UserError` for a file that is missing, contains no vocabulary or does not fit the model.
    """
    if str(path) in (BYTES, BYT5):
        return parse_vocabulary(str(path), str(path).encode(), model, max_size)
    file = as_path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"Vocabulary {str(file)!r} cannot be read ({error.strerror or error}); set"
            f" data.vocabulary to a SentencePiece model, a tokenizer.json, {BYTES} or {BYT5}, or to"
            " None for one of the mixture's own."
        ) from error
    return parse_vocabulary(str(file), content, model, max_size)


def parse_vocabulary(
    name: str, content: bytes, model: ModelConfig | None = None, max_size: int | None = None
) -> Vocabulary:
    """Returns the vocabulary of a file's content, as `read_vocabulary`."""
    vocabulary: Vocabulary
    if content == BYTES.encode():
        vocabulary = ByteVocabulary()
    elif content == BYT5.encode():
        vocabulary = ByT5Vocabulary()
    elif _is_json_object(content):
        vocabulary = TokenizerVocabulary(name, content)
    else:
        max_size = max_size if model is None else model.vocab_size
        vocabulary = SentencePieceVocabulary(name, content, max_size)
    if model is not None:
        _check_model(vocabulary, model)
    return vocabulary


def hugging_face_file_name(content: bytes) -> str | None:
    """Returns the name of a vocabulary's file in a Hugging Face folder; None: it has no file."""
    if content in (BYTES.encode(), BYT5.encode()):
        return None
    return HUGGING_FACE_VOCABULARY_FILES[_is_json_object(content)]


def _is_json_object(content: bytes) -> bool:
    return content.lstrip().startswith(b"{")


def _check_model(vocabulary: Vocabulary, model: ModelConfig) -> None:
    """Raises `UserError` where the vocabulary has more ids than the model, or other special ids.

    Where the vocabulary has no padding or EOS, the model's must stand for no text.
    """
    name = vocabulary.name
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"Vocabulary {name!r} has {vocabulary.size} ids, sentinels included, and"
            f" model.vocab_size={model.vocab_size}; set it to {vocabulary.padded_size}"
            " for a new model, or take the vocabulary that the model was trained with."
        )
    for key, meaning, own, used in (
        ("pad_id", "padding", vocabulary.pad, model.pad_id),
        ("eos_id", "the end of a text", vocabulary.eos, model.eos_id),
    ):
        if own not in (None, used):
            raise UserError(
                f"In vocabulary {name!r}, {own} stands for {meaning}, and model.{key}={used}; set"
                f" it to {own}, or take the vocabulary that the model was trained with."
            )
        if own is None and used < vocabulary.size and not vocabulary.is_control(used):
            raise UserError(
                f"Vocabulary {name!r} has no id for {meaning}, and model.{key}={used} is its piece"
                f" {vocabulary.piece(used)!r}; set it to an id that is in no text."
            )


def unknown_note(name: str, share: float) -> str:
    """Returns the sentence on training text of which the vocabulary lacks some characters."""
    return (
        f"{name}: {100 * share:.2g} % of the training tokens stand for characters that the"
        " vocabulary lacks; a model can neither tell them apart nor write them."
    )
