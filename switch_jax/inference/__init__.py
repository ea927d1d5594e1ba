"""Text generation: decoding, KV cache, and export of serving programs."""

from switch_jax.inference.decoding import (
    SamplingOptions,
    SpecialIds,
    beam_search,
    decode_loop,
    greedy_choice,
)
from switch_jax.inference.export import export_model
from switch_jax.inference.fill_blanks import complete_texts
from switch_jax.inference.generation import encode_inputs, generate, make_decode_step
from switch_jax.inference.kv_cache import CACHE_SEQUENCE_AXIS

__all__ = [
    "CACHE_SEQUENCE_AXIS",
    "SamplingOptions",
    "SpecialIds",
    "beam_search",
    "complete_texts",
    "decode_loop",
    "encode_inputs",
    "export_model",
    "generate",
    "greedy_choice",
    "make_decode_step",
]
