"""Texts of the sources that a part of a mixture stands for."""

from switch_jax.config import DataConfig
from switch_jax.data.catalog import sources_for_spec
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import SPLITS


def texts_of(spec, **data):
    """The texts of each split of a source."""
    [source] = sources_for_spec(str(spec), DataConfig(**data))
    return {
        split: [
            text
            for shard in source.shards(split)
            for text in source.texts(split, shard, BadRecords("error"))
        ]
        for split in SPLITS
    }
