"""T5X checkpoints of random models, in both of T5X's layouts."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization, traverse_util

from switch_jax.model.parameters import layer_slices, named_parameters
from switch_jax.model.transformer import SwitchTransformer
from tests.support.configs import tiny

# T5X's name by parameter, independent of the tables in the package.
LAYER = {
    "self_norm/scale": "pre_{self}_layer_norm/scale",
    "cross_norm/scale": "pre_cross_attention_layer_norm/scale",
    "mlp_norm/scale": "pre_mlp_layer_norm/scale",
    "mlp/router/kernel": "mlp/router/router_weights/w/kernel",
    "mlp/wo": "mlp/wo/kernel",
    "mlp/experts/wo": "mlp/expert/wo/kernel",
} | {
    f"{ours}/{leaf}": f"{t5x}/{leaf}/kernel"
    for ours, t5x in (
        ("self_attention", "{self}"),
        ("cross_attention", "encoder_decoder_attention"),
    )
    for leaf in ("query", "key", "value", "out")
}
PLAIN = {"mlp/wi": "mlp/wi/kernel", "mlp/experts/wi": "mlp/expert/wi/kernel"}
GATED = {
    "mlp/wi": "mlp/wi_1/kernel",
    "mlp/gate": "mlp/wi_0/kernel",
    "mlp/experts/wi": "mlp/expert/wi_1/kernel",
    "mlp/experts/gate": "mlp/expert/wi_0/kernel",
}
TOP = {
    "embedding": "token_embedder/embedding",
    "head": "decoder/logits_dense/kernel",
    "encoder/final_norm/scale": "encoder/encoder_norm/scale",
    "decoder/final_norm/scale": "decoder/decoder_norm/scale",
    "encoder/relative_bias/table": "encoder/relpos_bias/rel_embedding",
    "decoder/relative_bias/table": "decoder/relpos_bias/rel_embedding",
}

MODELS = {
    "switch": {"model.num_encoder_layers": 4},
    "switch-c": {"moe.every": 1, "model.tied_embeddings": False},
    "top": {
        "model.num_encoder_layers": 3,
        "model.activation": "geglu",
        "moe.stacks": "encoder",
        "moe.every": 1,
        "moe.last": 2,
    },
    "t5-1.0": {"moe.num_experts": 0, "model.num_encoder_layers": 3},
    "t5-1.1": {"moe.num_experts": 0, "model.activation": "geglu", "model.tied_embeddings": False},
}


def random_model(name: str, **overrides: Any) -> SwitchTransformer:
    shape = {"model.vocab_size": 40, "model.d_ff": 24, "model.head_dim": 4}
    other = {"model.relative_buckets": 16, "model.init_scale": 1.0}
    # T5X's defaults, which a checkpoint does not have.
    routing = {"moe.group_size": 8192, "moe.min_capacity": 4}
    return SwitchTransformer(
        tiny(**shape | other | routing | MODELS[name] | overrides), jax.random.key(1)
    )


def t5x_arrays(model: SwitchTransformer) -> dict[str, np.ndarray]:
    """Returns a model's parameters as arrays of T5X by path, one array for each layer."""
    params = {name: np.asarray(leaf[...]) for name, leaf in named_parameters(model).items()}
    layer = LAYER | (GATED if model.config.model.activation == "geglu" else PLAIN)
    arrays = {}
    for name, (whole, block) in layer_slices(params, model.config).items():
        if block is None:
            arrays[TOP[name]] = params[whole]
        else:
            stack, _, number, own = name.split("/", 3)
            own = layer[own].format(self="attention" if stack == "encoder" else "self_attention")
            arrays[f"{stack}/layers_{number}/{own}"] = params[whole][block]
    return arrays


def scan_layers(arrays: dict[str, np.ndarray], every: int, axis: int) -> dict[str, np.ndarray]:
    """Returns the arrays with the layers of a stack stacked, `every` layers in a block."""
    stacked: dict[str, list[np.ndarray]] = {}
    result = {}
    for name, value in arrays.items():
        match = re.fullmatch(r"(\w+)/layers_(\d+)/(.+)", name)
        if match is None:
            result[name] = value
            continue
        subblock = f"subblock_{int(match[2]) % every}/" if every > 1 else ""
        stacked.setdefault(f"{match[1]}/{match[1]}/{subblock}{match[3]}", []).append(value)
    return result | {name: np.stack(values, axis) for name, values in stacked.items()}


def train_state(arrays: dict[str, np.ndarray]) -> dict:
    """Returns the pytree that T5X saves, with an optimizer state."""
    states = {f"{name}/v": np.ones(2, np.float32) for name in arrays}
    target, states = (traverse_util.unflatten_dict(x, sep="/") for x in (arrays, states))
    return {"target": target, "state": {"step": np.int32(7), "param_states": states}}


def write_legacy(folder: Path, arrays: dict[str, np.ndarray], dtype: str = "float32") -> Path:
    """Writes a msgpack index, with a zarr folder for each array that is not small."""
    folder.mkdir(parents=True)
    leaves = {}
    for name, value in arrays.items():
        if value.size <= 16:
            leaves[name] = value
            continue
        file = "target." + name.replace("/", ".")
        chunks = [-(-size // 2) for size in value.shape]
        spec = {"driver": "zarr", "dtype": dtype, "kvstore": {"driver": "file", "path": file}}
        metadata = {"shape": value.shape, "chunks": chunks, "compressor": {"id": "gzip"}}
        store = {"driver": "file", "path": str(folder / file)}
        array = ts.open(spec | {"kvstore": store, "metadata": metadata}, create=True).result()
        array[...].write(value.astype(array.dtype.numpy_dtype)).result()
        metadata |= {"shape": list(value.shape), "compressor": {"id": "gzip", "level": 1}}
        leaves[name] = spec | {"metadata": metadata}
    state = train_state({})
    state["target"] = traverse_util.unflatten_dict(leaves, sep="/")
    content = serialization.msgpack_serialize({"version": 3, "optimizer": state})
    (folder / "checkpoint").write_bytes(content)
    return folder


def write_orbax(folder: Path, arrays: dict[str, np.ndarray], use_ocdbt: bool = True) -> Path:
    """Writes the Orbax layout: one database, or with `use_ocdbt=False` a folder for each array."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as writer:
        writer.save(folder / "state", args=ocp.args.PyTreeSave(train_state(arrays)))
    return folder
