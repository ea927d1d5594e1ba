"""Opens the token store of a config: a named folder, or one in the cache, built on first use."""

import hashlib
import os
from pathlib import Path

from switch_jax.config import DataConfig
from switch_jax.data.mixture import find_sources
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.token_store.manifest import FORMAT, damaged, is_store
from switch_jax.data.token_store.store import TokenStore
from switch_jax.data.vocabulary import VOCABULARY_FILE, Vocabulary
from switch_jax.errors import UserError
from switch_jax.files import as_path, build_once, cache_root, fetch

# Bytes of text: the most for which a store is built on first use, and the least for which it is
# built with several processes.
_MAX_AUTOMATIC = 4 * 2**30
_MIN_PARALLEL = 64 * 2**20


def open_store(data: DataConfig, vocabulary: Vocabulary) -> TokenStore:
    """Opens the store `data.data_dir`, or else a store in the cache, built on first use.

    Raises `UserError` if the store is damaged or has another vocabulary, or if the text is too
    large to build a store automatically.
    """
    if data.data_dir is not None and is_store(data.data_dir):
        directory = fetch(data.data_dir)
    else:
        directory = _cached_store(data, vocabulary)
    store = TokenStore(directory)
    if store.vocabulary_fingerprint != vocabulary.fingerprint:
        if as_path(vocabulary.name) == as_path(data.data_dir or directory) / VOCABULARY_FILE:
            raise damaged(directory / VOCABULARY_FILE)
        raise UserError(
            f"The text in {str(directory)!r} was packed with another vocabulary than"
            f" {vocabulary.name!r}; set data.vocabulary to None to use its own."
        )
    return store


def _cached_store(data: DataConfig, vocabulary: Vocabulary) -> Path:
    """Returns the folder of the store in the cache; builds it unless it exists."""
    sources = find_sources(data)
    for source in sources:
        if source.streams:
            raise UserError(
                f"{source.spec} is read as it streams; set data.reader=seqio, or pack it once with"
                " `switch-jax data pack` and set data.data_dir to what that wrote."
            )
    size = sum(source.size() for source in sources)
    if size > _MAX_AUTOMATIC:
        raise UserError(
            f"data.mixture={data.mixture} is {size / 2**30:,.0f} GiB of text; pack it once with"
            " `switch-jax data pack` and set data.data_dir to what that wrote, or set"
            " data.reader=seqio to read it as it streams."
        )
    stamps = [(source.name, source.cache_key) for source in sources]
    identity = repr((FORMAT, stamps, vocabulary.fingerprint)).encode()
    digest = hashlib.blake2b(identity, digest_size=8).hexdigest()
    name = f"{sources[0].name.replace('/', '-')}-{digest}"
    workers = (os.cpu_count() or 1) if size > _MIN_PARALLEL else 1

    def build(path: Path) -> None:
        build_token_store(data, vocabulary, path, workers)

    return build_once(cache_root() / "stores" / name, build)
