"""Export of a model as two serving programs, `encode` and `decode_step`, for any batch size.

The programs are StableHLO, serialised by `jax.export`: running them needs JAX, but not this
package. Parameters are arguments of the programs and are stored beside them, so that the programs
stay small and parameters of the same shapes can be exchanged. Files of the folder:

    encode.jax_export         parameters, inputs [batch, S] → state
    decode_step.jax_export    parameters, tokens [batch], position, state → logits, state
    parameters.safetensors    parameters by path, in the dtype in which they are used
    signature.json            names, shapes and dtypes of arguments, results and parameters
    greedy.py                 greedy decoding with the programs, to run or to copy from
    vocabulary.model          the vocabulary, if there is one
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from switch_jax import __version__
from switch_jax.config import Config
from switch_jax.errors import UserError
from switch_jax.files import create_folder
from switch_jax.inference.generation import encode_inputs
from switch_jax.inference.kv_cache import KVCache, decode_one_token, init_cache
from switch_jax.model import SwitchTransformer, cast_weights, named_parameters, with_parameters

# Not imported: it needs an optional package.
_TEMPLATE = Path(__file__).with_name("serving_template.py")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
State = dict[str, jax.Array]  # of decoding: source mask and KV cache


def export_model(
    model: SwitchTransformer,
    output: Path,
    *,
    inputs_length: int,
    max_length: int,
    vocabulary: bytes | None = None,
) -> None:
    """Writes the folder of an exported model.

    Args:
      model: from `switch_jax.load`, on one device.
      output: a folder that does not exist.
      inputs_length: S; inputs are padded to it with `model.pad_id`.
      max_length: maximum number of generated tokens.
      vocabulary: content of `vocabulary.model`.

    Raises `UserError` for an `output` that exists or cannot be written.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(
            "Exporting needs the package safetensors; install switch_jax[interop]."
        ) from None
    with create_folder(output) as folder:
        model = cast_weights(model, model.config.model.dtype)
        # safetensors writes the bytes of a non-contiguous array in the wrong order.
        parameters = {
            name: np.ascontiguousarray(leaf[...]) for name, leaf in named_parameters(model).items()
        }
        signature = _write_programs(model, folder, inputs_length, max_length)
        (folder / "signature.json").write_text(json.dumps(signature, indent=2) + "\n")
        save_file(parameters, folder / "parameters.safetensors")
        # safetensors creates a file that only its owner can read; the other files are not so.
        shutil.copymode(folder / "signature.json", folder / "parameters.safetensors")
        shutil.copyfile(_TEMPLATE, folder / "greedy.py")
        if vocabulary is not None:
            (folder / "vocabulary.model").write_bytes(vocabulary)


def _write_programs(
    model: SwitchTransformer, folder: Path, inputs_length: int, max_length: int
) -> dict[str, Any]:
    """Writes the programs; returns their signature as JSON values."""
    abstract_model = jax.eval_shape(lambda: model)

    def encode(parameters: Mapping[str, jax.Array], inputs_BxS: jax.Array) -> State:
        model = with_parameters(abstract_model, parameters)
        encoded_BxSxD, mask_BxS = encode_inputs(model, inputs_BxS)
        cache = init_cache(model, encoded_BxSxD, max_length)
        return _cache_to_state(cache, mask_BxS)

    def decode_step(
        parameters: Mapping[str, jax.Array], token_B: jax.Array, position: jax.Array, state: State
    ) -> tuple[jax.Array, State]:
        model = with_parameters(abstract_model, parameters)
        cache, mask_BxS = _state_to_cache(state)
        logits_BxV, cache = decode_one_token(model, token_B, position, cache, mask_BxS)
        return logits_BxV, _cache_to_state(cache, mask_BxS)

    max_batch = _max_batch(model.config, inputs_length)
    (batch,) = export.symbolic_shape("batch", constraints=[f"batch <= {max_batch}"])
    parameters = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named_parameters(abstract_model).items()
    }
    inputs = jax.ShapeDtypeStruct((batch, inputs_length), jnp.int32)
    token, position = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), ()))
    state = jax.eval_shape(encode, parameters, inputs)
    programs: dict[str, tuple[Callable, tuple]] = {
        "encode": (encode, (inputs,)),
        "decode_step": (decode_step, (token, position, state)),
    }
    for name, (function, arguments) in programs.items():
        program = export.export(jax.jit(function), platforms=PLATFORMS)(parameters, *arguments)
        (folder / f"{name}.jax_export").write_bytes(program.serialize())
    logits, _ = jax.eval_shape(decode_step, parameters, token, position, state)
    return {
        "switch_jax": __version__,
        "platforms": PLATFORMS,
        "inputs_length": inputs_length,
        "max_length": max_length,
        "max_batch": max_batch,
        "start_token": model.config.model.start_id,
        "end_token": model.config.model.eos_id,
        "pad_token": model.config.model.pad_id,
        "encode": {
            "arguments": ["parameters", {"inputs": _shape_and_dtype(inputs)}],
            "returns": "state",
        },
        "decode_step": {
            "arguments": [
                "parameters",
                {"tokens": _shape_and_dtype(token)},
                {"position": _shape_and_dtype(position)},
                "state",
            ],
            "returns": [{"logits": _shape_and_dtype(logits)}, "state"],
        },
        "state": {name: _shape_and_dtype(leaf) for name, leaf in state.items()},
        "parameters": {name: _shape_and_dtype(leaf) for name, leaf in parameters.items()},
    }


def _max_batch(config: Config, inputs_length: int) -> int:
    """Returns the maximum number of rows with which routing's sort keys provably fit in 32 bits."""
    E, K = config.moe.num_experts, max(config.moe.max_experts_per_token, 1)
    pool = E * max(run.blocks for run in config.block_runs("decoder"))
    return (2**32 - 1) // max((E + 1) * K * inputs_length, (pool + 1) * K)


def _shape_and_dtype(leaf: Any) -> dict[str, Any]:
    """Returns shape and dtype of an array as JSON values."""
    shape = [d if isinstance(d, int) else str(d) for d in leaf.shape]
    return {"shape": shape, "dtype": leaf.dtype.name}


def _cache_to_state(cache: KVCache, mask_BxS: jax.Array) -> State:
    """Returns the source mask and the cache as a flat dict, whose names are in `signature.json`."""
    state = {"mask": mask_BxS}
    for kind, keys_values in zip(KVCache._fields, cache):
        for run, (keys, values) in enumerate(keys_values):
            state |= {f"{kind}/{run}/keys": keys, f"{kind}/{run}/values": values}
    return state


def _state_to_cache(state: State) -> tuple[KVCache, jax.Array]:
    """Returns the inverse of `_cache_to_state`."""
    runs = range((len(state) - 1) // (2 * len(KVCache._fields)))
    keys_values = (
        [(state[f"{kind}/{run}/keys"], state[f"{kind}/{run}/values"]) for run in runs]
        for kind in KVCache._fields
    )
    return KVCache(*keys_values), state["mask"]
