"""Which store a config reads, made where it is needed."""

import hashlib
import os
from pathlib import Path

from switch_jax.config import DataConfig
from switch_jax.data.mixture import find_sources
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.token_store.store import FORMAT, TokenStore, is_store
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.errors import UserError
from switch_jax.files import build_once, cache_root

# Bytes of text.
_PACKED_UNASKED = 4 * 2**30
_WORTH_WORKERS = 64 * 2**20


def open_store(data: DataConfig, vocabulary: Vocabulary) -> TokenStore:
    """The store that a config reads; in the cache, made on first use, unless it names one.

    Raises `UserError` where the named one is damaged or of another vocabulary, or the text is too
    much to be packed unasked.
    """
    if data.data_dir is not None and is_store(data.data_dir):
        directory = Path(data.data_dir)
    else:
        directory = _cached(data, vocabulary)
    store = TokenStore(directory)
    if store.vocabulary != vocabulary.fingerprint:
        raise UserError(
            f"The text in {str(directory)!r} was packed with another vocabulary than"
            f" {vocabulary.name!r}; set data.vocabulary to None to use its own."
        )
    return store


def _cached(data: DataConfig, vocabulary: Vocabulary) -> Path:
    sources = find_sources(data)
    size = sum(source.size() for source in sources)
    if size > _PACKED_UNASKED:
        raise UserError(
            f"data.mixture={data.mixture} is {size / 2**30:,.0f} GiB of text; pack it once with"
            " `switch-jax data pack` and set data.data_dir to what that wrote, or set"
            " data.reader=seqio to read it as it streams."
        )
    text = [(source.name, source.cache_key) for source in sources]
    described = repr((FORMAT, text, vocabulary.fingerprint)).encode()
    digest = hashlib.blake2b(described, digest_size=8).hexdigest()
    name = f"{sources[0].name.replace('/', '-')}-{digest}"

    workers = (os.cpu_count() or 1) if size > _WORTH_WORKERS else 1

    def build(path: Path) -> None:
        build_token_store(data, vocabulary, path, workers)

    return build_once(cache_root() / "stores" / name, build)
