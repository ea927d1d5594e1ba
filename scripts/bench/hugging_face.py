"""Benchmark of training and decoding against Hugging Face's transformers.

    pip install torch 'transformers>=5.19'
    python scripts/bench/hugging_face.py [--experts 8] [--dtype float32] [--repeats 9]

transformers writes a Switch Transformer, or for `--experts 0` a T5, with random weights, and
`switch_jax.load` reads it. Before timing, both must give the same loss and, in float32, generate
the same tokens. Calls of both alternate, so that a drift of the machine's speed affects both;
medians are reported. With a GPU, both PyTorch and JAX must find it. Prints the table of
docs/performance.md.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import switch_jax
from switch_jax.__main__ import keep_freed_memory
from switch_jax.cli.startup import start_jax
from switch_jax.config import override_config
from switch_jax.data.batch import shift_right
from switch_jax.distributed import make_mesh
from switch_jax.model import SwitchTransformer, named_parameters
from switch_jax.performance.benchmark import time_alternating
from switch_jax.training import TrainProgram

BATCH, SOURCE, TARGET, WRITTEN = 8, 256, 64, 32
DECODING = {"greedy, 1 text": (1, 1), "greedy, 8 texts": (8, 1), "4 beams, 8 texts": (8, 4)}


def transformers_model(experts: int) -> PreTrainedModel:
    """Returns a Switch Transformer with experts in every second layer, or a T5 for no experts."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 8192,
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 1024,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    if not experts:
        return T5ForConditionalGeneration(T5Config(**shape))
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **shape,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=experts,
            router_jitter_noise=0.0,
        )
    )


class Theirs:
    """transformers: AdamW steps, and `generate` with its cache."""

    def __init__(
        self, model: PreTrainedModel, source_BxS: np.ndarray, target_BxT: np.ndarray, dtype: str
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device)
        # Parameters stay float32, as ours do; only matmuls are computed in bfloat16.
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.model.generation_config.eos_token_id = None  # the other side writes none either
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.source_BxS = torch.from_numpy(source_BxS).to(self.device)
        self.target_BxT = torch.from_numpy(target_BxT).to(self.device)

    def loss(self) -> torch.Tensor:
        sparse = isinstance(self.model, SwitchTransformersForConditionalGeneration)
        balanced = {"output_router_logits": True} if sparse else {}
        with self.autocast:
            return self.model(input_ids=self.source_BxS, labels=self.target_BxT, **balanced).loss

    def cross_entropy(self) -> float:
        """Returns the mean cross-entropy of the targets, without the loss of the routers."""
        with torch.no_grad(), self.autocast:
            logits = self.model(input_ids=self.source_BxS, labels=self.target_BxT).logits
        targets = self.target_BxT.flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).item()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()  # which waits for a GPU

    def write(self, texts: int, beams: int) -> np.ndarray:
        with torch.no_grad(), self.autocast:
            tokens = self.model.generate(
                input_ids=self.source_BxS[:texts],
                max_new_tokens=WRITTEN,
                num_beams=beams,
                do_sample=False,
            )
        return tokens[:, 1:].cpu().numpy()  # without the start token


class Ours:
    """switch_jax: the train step of its programs, and `generate`."""

    def __init__(
        self, model: SwitchTransformer, source_BxS: np.ndarray, target_BxT: np.ndarray, dtype: str
    ):
        overrides = {
            "model.dtype": dtype,
            "data.batch_size": str(BATCH),
            "data.inputs_length": str(SOURCE),
            "data.targets_length": str(TARGET),
            "optimizer.name": "adamw",
            "optimizer.schedule": "constant",
            "optimizer.learning_rate": "1e-5",
            "optimizer.warmup_steps": "0",
            "train.z_loss_weight": "0",
            "mesh.data": "1",
        }
        config = override_config(model.config, overrides)
        self.program = TrainProgram(config, make_mesh(config))
        self.source_BxS = jnp.asarray(source_BxS, jnp.int32)
        target_BxT = target_BxT.astype(np.int32)
        self.batch = self.program.sharded.shard_batch(
            {
                "encoder_input_tokens": source_BxS.astype(np.int32),
                "decoder_input_tokens": shift_right(target_BxT, config.model.start_id),
                "decoder_target_tokens": target_BxT,
                "decoder_loss_weights": np.ones(target_BxT.shape, np.float32),
            }
        )
        state = self.program.init()
        params = {
            name: jax.device_put(jnp.copy(value), state.params[name].sharding)
            for name, value in named_parameters(model).items()
        }
        state = dataclasses.replace(state, params=params, rms={})
        self.state = self.program.complete_state(state)
        self.model = self.program.sharded.model(jax.tree.map(jnp.copy, params))

    def step(self) -> float:
        self.state, metrics, _ = self.program.train_step(self.state, self.batch)
        return float(metrics["cross_entropy"])

    def write(self, texts: int, beams: int) -> np.ndarray:
        inputs_BxS = self.source_BxS[:texts]
        return np.asarray(
            switch_jax.generate(self.model, inputs_BxS, max_length=WRITTEN, beam_size=beams)
        )


def check(ours: Ours, theirs: Theirs, dtype: str) -> None:
    """Raises `AssertionError` where both do not compute the same."""
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(ours.step(), theirs.cross_entropy(), rtol=tolerance)
    if dtype == "float32":  # rounded to bfloat16, the best two tokens may change places
        np.testing.assert_array_equal(ours.write(BATCH, 1), theirs.write(BATCH, 1))


def measure(experts: int, dtype: str, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of every call, by case and library."""
    rng = np.random.default_rng(0)
    source_BxS = rng.integers(3, 8000, (BATCH, SOURCE))
    target_BxT = rng.integers(3, 8000, (BATCH, TARGET))
    model = transformers_model(experts).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = Ours(switch_jax.load(folder), source_BxS, target_BxT, dtype)
    theirs = Theirs(model, source_BxS, target_BxT, dtype)
    check(ours, theirs, dtype)
    parts: dict[str, Callable[[Any], Callable[[], Any]]] = {
        f"train step, {BATCH} × ({SOURCE}, {TARGET}) tokens": lambda side: side.step
    }
    for name, (texts, beams) in DECODING.items():
        parts[f"{WRITTEN} tokens {name}"] = lambda side, t=texts, b=beams: lambda: side.write(t, b)
    return {
        part: time_alternating({"switch_jax": call(ours), "transformers": call(theirs)}, repeats)
        for part, call in parts.items()
    }


def render(measured: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| | switch_jax | transformers | times as fast |", "|---|---|---|---|"]
    for part, seconds in measured.items():
        cells, medians = [], []
        for of in seconds.values():
            medians.append(statistics.median(of))
            cells.append(f"{1e3 * medians[-1]:.0f} ms ({1e3 * min(of):.0f} – {1e3 * max(of):.0f})")
        lines.append(f"| {part} | {' | '.join(cells)} | {medians[1] / medians[0]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()
    start_jax(None, {})
    print(render(measure(args.experts, args.dtype, args.repeats)))
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
