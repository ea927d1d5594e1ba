"""Greedy decoding with an exported model; needs jax, numpy and safetensors only.

    echo '[[37, 512, 1], [8, 1]]' | python greedy.py

Reads rows of token ids as JSON and prints the generated rows as JSON. `switch-jax export` writes
this file as `greedy.py` into the folder of an exported model; copy from it what you need.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


class ExportedModel:
    """An exported model, loaded from a folder that `switch-jax export` wrote."""

    def __init__(self, folder: Path):
        self.signature = json.loads((folder / "signature.json").read_text())
        self.parameters = jax.device_put(load_file(folder / "parameters.safetensors"))
        encode, step = (
            export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes())).call
            for name in ("encode", "decode_step")
        )
        self._encode = jax.jit(encode)
        self._step = jax.jit(step, donate_argnums=3)  # the state is changed in place

    def greedy(self, rows: list[list[int]]) -> np.ndarray:
        """[batch, max_length] int32: generated tokens up to the end token, then padding."""
        signature = self.signature
        pad = signature["pad_token"]
        inputs = np.full((len(rows), signature["inputs_length"]), pad, np.int32)
        for row, tokens in zip(inputs, rows):
            row[: len(tokens)] = tokens
        state = self._encode(self.parameters, inputs)
        outputs = np.full((len(rows), signature["max_length"]), pad, np.int32)
        token = np.full(len(rows), signature["start_token"], np.int32)
        done = np.zeros(len(rows), bool)
        for position in range(signature["max_length"]):
            logits, state = self._step(self.parameters, token, np.int32(position), state)
            token = np.where(done, pad, np.asarray(logits).argmax(-1)).astype(np.int32)
            outputs[:, position] = token
            done |= token == signature["end_token"]
            if done.all():
                break
        return outputs


if __name__ == "__main__":
    print(json.dumps(ExportedModel(Path(__file__).parent).greedy(json.load(sys.stdin)).tolist()))
