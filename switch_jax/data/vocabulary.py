"""SentencePiece vocabularies with T5's ids: 0 padding, 1 EOS, 2 unknown, sentinels at the end."""

import hashlib
import io
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import sentencepiece

from switch_jax.cache import cache_root, made_once
from switch_jax.data import corpus
from switch_jax.data.spans import EOS
from switch_jax.errors import UserError
from switch_jax.schema import Config

PAD, UNK = 0, 2
NUM_SENTINELS = 100
FILE_NAME = "vocabulary.model"  # in a folder of packed text

# T5 and mT5 pad their embeddings to a multiple of 128; ours use every id there is, but at
# these sizes the sentinels shall be where those models expect them.
_UNPADDED = {32128: 32100, 250112: 250100}

_SENTINEL = re.compile(r"<extra_id_(\d{1,2})>")


class Vocabulary:
    """A SentencePiece model's pieces, followed by 100 sentinels in descending order.

    Attributes:
      path: the SentencePiece model file.
      size: pieces and sentinels; every id is below it.
      fingerprint: 32 hexadecimal digits that change with the model.

    Raises `UserError` for a file that is missing, is no SentencePiece model, or gives
    padding, EOS and unknown other ids than T5.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(
                f"Vocabulary {str(path)!r} does not exist; set data.vocabulary to a SentencePiece"
                " model, or to None for the mixture's own."
            )
        model = path.read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(
                f"Vocabulary {str(path)!r} is not a SentencePiece model; set data.vocabulary to"
                " one."
            ) from error
        ids = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id())
        if ids != (PAD, EOS, UNK):
            raise UserError(
                f"Vocabulary {str(path)!r} has pad, EOS and unknown at {ids}, not at (0, 1, 2) as"
                " T5's; train one with `switch-jax data vocab`."
            )
        self.path = path
        self.size: int = self._pieces.get_piece_size() + NUM_SENTINELS
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()

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
        return self._pieces.id_to_piece(token)

    def encode(self, text: str) -> list[int]:
        """Ids without EOS; `<extra_id_0>` … `<extra_id_99>` in the text become sentinels."""
        ids: list[int] = []
        for i, part in enumerate(_SENTINEL.split(text)):
            if i % 2:
                ids.append(self.sentinel(int(part)))
            else:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text with sentinels written out; padding, EOS and ids past the end say nothing."""
        parts = []
        for is_piece, run in groupby(map(int, ids), lambda i: i < self.size - NUM_SENTINELS):
            if is_piece:
                parts.append(self._pieces.decode(list(run)).strip())
            else:
                parts += [f"<extra_id_{self.size - 1 - i}>" for i in run if i < self.size]
        return " ".join(filter(None, parts))


def train(texts: Iterable[str], path: Path, size: int) -> None:
    """Trains a vocabulary of `size` ids, sentinels included, and writes it to `path`.

    Text that holds fewer different pieces gives a smaller vocabulary. The same texts give
    the same file. Raises `UserError` where `size` has no room for the text's characters.
    """
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc",
            byte_fallback=True,
            vocab_size=size - NUM_SENTINELS,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            # A third of the defaults' time; the pieces code text within 0.1 % as well.
            num_sub_iterations=1,
            shrinking_factor=0.5,
            num_threads=1,  # the pieces depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        required = re.search(r"required_chars\. -?\d+ vs (\d+)", str(error))
        if required is None:
            raise
        raise UserError(
            f"A vocabulary of {size:,} ids has no room for bytes, sentinels and the text's"
            f" characters; set model.vocab_size to at least {int(required[1]) + NUM_SENTINELS}."
        ) from error
    path.write_bytes(model.getvalue())


def open_vocabulary(config: Config) -> Vocabulary:
    """The vocabulary that a config reads and writes text with.

    It is `data.vocabulary` where that names a file, else the one that `data.data_dir` was
    packed with, else the mixture's own, which is trained on first use.

    Raises `UserError` where the file is missing or has more ids than `model.vocab_size`.
    """
    if config.data.vocabulary is not None:
        path = Path(config.data.vocabulary)
    elif config.data.reader == "store" and config.data.data_dir is not None:
        path = Path(config.data.data_dir, FILE_NAME)
        if not path.is_file():
            raise UserError(
                f"There is no token store in {config.data.data_dir!r}; set data.data_dir to one,"
                " or to None to have it made in the cache."
            )
    else:
        path = _own(config.data.mixture, config.model.vocab_size)
    vocabulary = Vocabulary(path)
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"Vocabulary {str(path)!r} has {vocabulary.size} ids, sentinels included; set"
            f" model.vocab_size to at least that, not {config.model.vocab_size}."
        )
    return vocabulary


def _own(mixture: str, model_vocab_size: int) -> Path:
    size = _UNPADDED.get(model_vocab_size, model_vocab_size)
    name = f"{mixture}-{corpus.fingerprint(mixture)[:16]}-{size}.model"

    def build(path: Path) -> None:
        texts = [document.text for document in corpus.documents(mixture, "train")]
        megabytes = sum(len(text) for text in texts) / 1e6
        print(
            f"Training a vocabulary of {size:,} pieces on {megabytes:.1f} MB"
            f" (once; about {max(1, round(1.5 * megabytes))} s) …",
            file=sys.stderr,
            flush=True,
        )
        train(texts, path, size)

    return made_once(cache_root() / "vocabularies" / name, build)
