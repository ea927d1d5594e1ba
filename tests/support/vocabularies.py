"""Vocabularies that tests make for themselves."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece


def train_sentencepiece(texts: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """Returns a SentencePiece model with T5's ids: 0 padding, 1 EOS, 2 unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write_letters(path: Path) -> Path:
    """Writes a vocabulary of the letters a to z: all other characters are unknown to it."""
    texts = ["a b c d e f g h i j k l m", "n o p q r s t u v w x y z"]
    path.write_bytes(train_sentencepiece(texts, 40, model_type="char"))
    return path
