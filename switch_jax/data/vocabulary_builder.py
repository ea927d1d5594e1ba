"""Which vocabulary a config reads text with, and training one on a mixture."""

import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from switch_jax.config import Config, DataConfig
from switch_jax.data.mixture import find_sources, mixture_rates
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Source
from switch_jax.data.span_corruption import noise_and_spans, span_lengths
from switch_jax.data.vocabulary import (
    EOS,
    FILE_NAME,
    HUGGING_FACE_NAME,
    NUM_SENTINELS,
    PAD,
    UNK,
    Vocabulary,
    read_vocabulary,
)
from switch_jax.errors import UserError
from switch_jax.files import build_once, cache_root

# T5 and mT5 pad their embeddings to a multiple of 128; ours use every id there is, but at
# these sizes the sentinels shall be where those models expect them.
_UNPADDED = {32128: 32100, 250112: 250100}
_LINE = 1000  # characters
SAMPLE = 20_000_000  # characters that a vocabulary of a mixture's own is trained on


def open_vocabulary(config: Config) -> Vocabulary:
    """The vocabulary that a config reads and writes text with.

    It is `data.vocabulary` where that names one, else the one that `data.data_dir` was packed
    with, else that of what `init_from` or `distill.teacher` names, else the mixture's own, which
    is trained on first use.

    Raises `UserError` where it cannot be read or has more ids than `model.vocab_size`.
    """
    data = config.data
    inherited = _of_run(config.init_from) or _of_run(config.distill.teacher)
    packed = None if data.data_dir is None else Path(data.data_dir, FILE_NAME)
    if data.vocabulary is not None:
        vocabulary = read_vocabulary(data.vocabulary)
    elif packed is not None and packed.is_file():
        vocabulary = read_vocabulary(packed)
    elif inherited is not None:
        vocabulary = read_vocabulary(inherited)
    else:
        vocabulary = read_vocabulary(_own(data, config.model.vocab_size))
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"Vocabulary {vocabulary.name!r} has {vocabulary.size} ids, sentinels included, and"
            f" model.vocab_size={config.model.vocab_size}; set it to {vocabulary.padded_size}."
        )
    return vocabulary


def check_sentinels(data: DataConfig, vocabulary: Vocabulary) -> None:
    """Raises `UserError` where a row has more spans than there are ids to mark them."""
    length = span_lengths(data.inputs_length, data.targets_length).tokens
    spans = noise_and_spans(max(length, 2))[1]
    if vocabulary.sentinel(spans - 1) <= UNK:
        raise UserError(
            f"A row of data.inputs_length={data.inputs_length} has {spans} spans, more than"
            f" {vocabulary.name!r} has ids; set it lower, or take a larger vocabulary."
        )


def train_vocabulary(texts: Iterable[str], path: Path, size: int, coverage: float = 0.9995) -> None:
    """Trains a SentencePiece vocabulary and writes it to `path`.

    Args:
      size: ids, sentinels included. Text that holds fewer different pieces gives fewer.
      coverage: share of the text's characters that are pieces of their own; the others are
        written as bytes. mT5 has 0.99999.

    The same texts give the same file. Raises `UserError` where `size` has no room for the
    characters, or there is no text.
    """
    if not 0.98 <= coverage <= 1:
        raise UserError(f"--coverage must be from 0.98 to 1, not {coverage}.")
    if size < 2 * NUM_SENTINELS:
        raise UserError(f"model.vocab_size must be at least {2 * NUM_SENTINELS}, not {size}.")
    lines = (
        line[begin : begin + _LINE]  # SentencePiece leaves longer ones out
        for text in texts
        for line in text.splitlines()
        if line.strip()
        for begin in range(0, len(line), _LINE)
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
            # A third of the defaults' time; the pieces code text within 0.1 % as well.
            num_sub_iterations=1,
            shrinking_factor=0.5,
            num_threads=1,  # the pieces depend on it
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
    """Training text of a mixture, each source in its share, from all over each of them.

    The same every time. Sources that hold less than their share give all they have.
    """
    documents = {source.name: source.num_documents("train") for source in sources}
    if None in documents.values():  # what comes closest
        documents = {source.name: source.size() for source in sources}
    shares = mixture_rates(data, documents, {source.name: source.spec for source in sources})
    bad = BadRecords("skip")  # whoever packs or trains on these will be told of them
    for source in sources:
        shards = source.shards("train")
        left = shares[source.name] * characters
        for number, shard in enumerate(shards):
            here = left / (len(shards) - number)
            for text in source.texts("train", shard, bad):
                if here <= 0:
                    break
                yield text
                here -= len(text)
                left -= len(text)


def _of_run(name: str | None) -> Path | None:
    """The vocabulary in the WORKDIR or foreign folder that a path is, or is a checkpoint of."""
    if name is None:
        return None
    path = Path(name).expanduser().absolute()
    files = [path / FILE_NAME, path / HUGGING_FACE_NAME, path.parent.parent / FILE_NAME]
    return next((file for file in files if file.is_file()), None)


def _own(data: DataConfig, model_vocab_size: int) -> Path:
    size = _UNPADDED.get(model_vocab_size, model_vocab_size)
    sources = find_sources(data)
    made_of = [(source.name, source.cache_key) for source in sources]
    described = repr((made_of, data.mixture, data.rate_exponent, data.counts)).encode()
    digest = hashlib.blake2b(described, digest_size=8).hexdigest()
    name = f"{sources[0].name.replace('/', '-')}-{digest}-{size}.model"

    def build(path: Path) -> None:
        texts = list(sample_texts(data, sources, SAMPLE))
        megabytes = sum(len(text) for text in texts) / 1e6
        print(
            f"Training a vocabulary of {size:,} pieces on {megabytes:.1f} MB of text"
            f" (once; about {max(1, round(1.5 * megabytes))} s) …",
            file=sys.stderr,
            flush=True,
        )
        train_vocabulary(texts, path, size)

    return build_once(cache_root() / "vocabularies" / name, build)
