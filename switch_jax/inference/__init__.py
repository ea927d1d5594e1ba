"""Text generation: decoding, KV cache, and export of serving programs."""

from switch_jax.inference.answer_file import write_answers
from switch_jax.inference.answers import Answer, answer_texts
from switch_jax.inference.decoding import (
    SamplingOptions,
    SpecialIds,
    beam_search,
    decode_loop,
    greedy_choice,
)
from switch_jax.inference.export import export_model
from switch_jax.inference.generation import encode_inputs, generate, make_decode_step
from switch_jax.inference.kv_cache import CACHE_SEQUENCE_AXIS
from switch_jax.inference.prompt_file import PromptRecord, read_prompts
from switch_jax.inference.prompts import Prompt, PromptCodec

__all__ = [
    "CACHE_SEQUENCE_AXIS",
    "Answer",
    "Prompt",
    "PromptCodec",
    "PromptRecord",
    "SamplingOptions",
    "SpecialIds",
    "answer_texts",
    "beam_search",
    "decode_loop",
    "encode_inputs",
    "export_model",
    "generate",
    "greedy_choice",
    "make_decode_step",
    "read_prompts",
    "write_answers",
]
