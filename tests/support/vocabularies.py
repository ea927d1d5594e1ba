"""Vocabularies that tests make for themselves."""

import io
from pathlib import Path

import sentencepiece


def write_letters(path: Path) -> Path:
    """Writes a vocabulary of the letters a to z: all other characters are unknown to it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h i j k l m", "n o p q r s t u v w x y z"]),
        model_writer=model,
        model_type="char",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
