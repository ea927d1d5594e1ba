"""Opens the vocabulary of a config, and trains a SentencePiece vocabulary on a mixture."""

import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from switch_jax.config import Config, DataConfig, is_config_spec
from switch_jax.data.mixture import find_sources, mixture_rates
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Source
from switch_jax.data.vocabulary import (
    BYT5,
    BYTES,
    EOS,
    HUGGING_FACE_VOCABULARY_FILES,
    NUM_SENTINELS,
    PAD,
    UNK,
    VOCABULARY_FILE,
    Vocabulary,
    read_vocabulary,
)
from switch_jax.errors import UserError
from switch_jax.files import absolute_path, as_path, build_once, cache_root, path_within

# Sizes of `model.vocab_size` whose vocabulary is smaller: T5 and mT5 pad their embeddings to a
# multiple of 128, and their sentinels come before the padding.
_UNPADDED_SIZES = {32128: 32100, 250112: 250100}
_LINE_LENGTH = 1000  # characters
_MAX_SIZE = 2**24  # ids of a vocabulary that is trained
_SAMPLE_LENGTH = 20_000_000  # characters of text to train the vocabulary of a mixture on


def open_vocabulary(config: Config) -> Vocabulary:
    """Returns the vocabulary that a config reads and writes text with.

    It is `data.vocabulary` if set; else the vocabulary in `data.data_dir`, if that is a token
    store; else the vocabulary of the checkpoint `init_from` or `distill.teacher`; else one that is
    trained on the mixture on first use and kept in the cache.

    Raises `UserError` if it cannot be read or does not fit the model, and where one of the
    checkpoints has no vocabulary and `data.vocabulary` is not set.
    """
    return read_vocabulary(_vocabulary_path(config), config.model)


def _vocabulary_path(config: Config) -> str | Path:
    data = config.data
    if data.vocabulary is not None:
        return data.vocabulary
    inherited = [
        _checkpoint_vocabulary(key, path)
        for key, path in (
            ("init_from", config.init_from),
            ("distill.teacher", config.distill.teacher),
        )
        if path is not None and not is_config_spec(path)
    ]
    packed = None if data.data_dir is None else as_path(data.data_dir) / VOCABULARY_FILE
    if packed is not None and packed.is_file():
        return packed
    return inherited[0] if inherited else _trained_vocabulary(data, config.model.vocab_size)


def train_vocabulary(texts: Iterable[str], path: Path, size: int, coverage: float = 0.9995) -> None:
    """Trains a SentencePiece vocabulary and writes it to `path`.

    Args:
      size: number of ids, sentinels included. Text with fewer different pieces gives fewer ids.
      coverage: share of the text's characters that become pieces; the other characters are
        encoded as bytes. mT5 has 0.99999.

    The same texts give the same file. Raises `UserError` if `size` is too small for the
    characters, or there is no text.
    """
    if not 0.98 <= coverage <= 1:
        raise UserError(f"--coverage must be from 0.98 to 1, not {coverage}.")
    if size < 2 * NUM_SENTINELS:
        raise UserError(f"model.vocab_size must be at least {2 * NUM_SENTINELS}, not {size}.")
    if size > _MAX_SIZE:
        raise UserError(
            f"model.vocab_size must be at most {_MAX_SIZE:,} to train one, not {size:,}."
        )
    lines = (
        line[begin : begin + _LINE_LENGTH]  # SentencePiece ignores longer lines
        for text in texts
        for line in text.splitlines()
        if line.strip()
        for begin in range(0, len(line), _LINE_LENGTH)
    )
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
            character_coverage=coverage,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            # A third of the time that the defaults take; encoded text is at most 0.1 % longer.
            num_sub_iterations=1,
            shrinking_factor=0.5,
            num_threads=1,  # the pieces depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        required = re.search(r"required_chars\. -?\d+ vs (\d+)", str(error))
        if required is not None:
            raise UserError(
                f"A vocabulary of {size:,} ids has no room for bytes, sentinels and the text's"
                " characters; set model.vocab_size to at least"
                f" {int(required[1]) + NUM_SENTINELS}, or a lower --coverage."
            ) from error
        if "sentences_.empty()" in str(error):
            raise UserError("There is no text to train a vocabulary on.") from error
        raise
    path.write_bytes(model.getvalue())


def sample_texts(data: DataConfig, sources: list[Source], characters: int) -> Iterator[str]:
    """Yields training texts of a mixture: of each source its share, taken from all its shards.

    The result is deterministic. A source with less text than its share is taken whole.
    """
    documents = {source.name: source.num_documents("train") for source in sources}
    if None in documents.values():  # unknown numbers: bytes are the best estimate
        documents = {source.name: source.size() for source in sources}
    shares = mixture_rates(data, documents, {source.name: source.spec for source in sources})
    bad = BadRecords("skip")  # reported when the text is packed or trained on
    for source in sources:
        shards = source.shards("train")
        source_quota = shares[source.name] * characters
        for number, shard in enumerate(shards):
            shard_quota = source_quota / (len(shards) - number)
            for text in source.texts("train", shard, bad):
                if shard_quota <= 0:
                    break
                yield text
                shard_quota -= len(text)
                source_quota -= len(text)


def _checkpoint_vocabulary(key: str, name: str) -> Path:
    """Returns the vocabulary file of a WORKDIR, a Hugging Face folder or a WORKDIR's checkpoint.

    Raises `UserError` where there is none; `key` names the checkpoint in the config.
    """
    path = absolute_path(as_path(name))
    if not path.exists():
        raise UserError(f"{key}={name} does not exist; set it to a WORKDIR or a checkpoint.")
    names = (VOCABULARY_FILE, *HUGGING_FACE_VOCABULARY_FILES)
    files = [path_within(path, name) for name in names if path.is_dir()]
    if path.parent.name == "checkpoints":
        files.append(path_within(path.parent.parent, VOCABULARY_FILE))
    for file in files:
        if file.is_file():
            return file
    raise UserError(
        f"{key}={name} comes without a vocabulary; set data.vocabulary to the one that it was"
        f" trained with, a SentencePiece model, a tokenizer.json, {BYTES} or {BYT5}."
    )


def _trained_vocabulary(data: DataConfig, model_vocab_size: int) -> Path:
    """Returns a vocabulary file in the cache, trained on the mixture on first use."""
    size = _UNPADDED_SIZES.get(model_vocab_size, model_vocab_size)
    sources = find_sources(data)
    stamps = [(source.name, source.cache_key) for source in sources]
    identity = repr((stamps, data.mixture, data.rate_exponent, data.counts)).encode()
    digest = hashlib.blake2b(identity, digest_size=8).hexdigest()
    name = f"{sources[0].name.replace('/', '-')}-{digest}-{size}.model"

    def build(path: Path) -> None:
        texts = list(sample_texts(data, sources, _SAMPLE_LENGTH))
        megabytes = sum(len(text) for text in texts) / 1e6
        print(
            f"Training a vocabulary of {size:,} pieces on {megabytes:.1f} MB of text"
            f" (once; about {max(1, round(1.5 * megabytes))} s) …",
            file=sys.stderr,
            flush=True,
        )
        train_vocabulary(texts, path, size)

    return build_once(cache_root() / "vocabularies" / name, build)
