"""The backbone against Hugging Face: stored outputs of random weights (make_reference.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from switch_jax import config as config_lib
from switch_jax.model import SwitchTransformer, named_parameters, with_parameters

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["t5_relu_tied", "t5_geglu_untied", "switch_relu_tied"]
# Beyond this, exact instead of tanh GELU, or a wrong bucket, would show.
TOLERANCE = 1e-5


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def model_config(stored: dict) -> config_lib.Config:
    raw = config_lib.defaults().to_dict()
    for key, value in stored.items():
        raw["moe" if key in raw["moe"] else "model"][key] = value
    raw["model"]["dtype"] = "float32"
    raw["moe"]["eval_capacity_factor"] = None
    return config_lib.from_dict(raw)


def hf_name(name: str, layer: int) -> str:
    """Hugging Face's name of our parameter `name`, of one layer where it is stacked."""
    stack, *rest = name.split("/")
    simple = {"embedding": "shared", "head": "lm_head"}
    if not rest:
        return simple[stack] + ".weight"
    if rest[0] == "final_norm":
        return f"{stack}.final_layer_norm.weight"
    attention = f"{stack}.block.{layer}.layer.0.SelfAttention."
    if rest[0] == "relative_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    leaf = rest[-1]
    part = "mlp" if "mlp" in rest else rest[-2]
    last = 2 if stack == "decoder" else 1
    norms = {"self_norm": 0, "cross_norm": 1, "mlp_norm": last}
    if part in norms:
        return f"{stack}.block.{layer}.layer.{norms[part]}.layer_norm.weight"
    if part == "self_attention":
        return f"{attention}{leaf[0]}.weight"
    if part == "cross_attention":
        return f"{stack}.block.{layer}.layer.1.EncDecAttention.{leaf[0]}.weight"
    return f"{stack}.block.{layer}.layer.{last}.{{mlp}}.{leaf}"


def load_reference(model: SwitchTransformer, stored: dict[str, np.ndarray]) -> SwitchTransformer:
    config = model.config
    every = config.moe.every if config.sparse else 1

    def one(name: str, layer: int) -> np.ndarray:
        path = hf_name(name, layer)
        prefix, mlp, leaf = path.partition("{mlp}.")
        if not mlp:
            value = stored["param/" + path].astype(np.float32)
            embedding = path in ("shared.weight",)
            return value if embedding or value.ndim == 1 else value.T
        sparse = config.sparse and layer % every == every - 1
        if leaf == "kernel":
            return stored[f"param/{prefix}mlp.router.classifier.weight"].T
        if config.model.activation == "geglu":
            leaf = {"gate": "wi_0", "wi": "wi_1", "wo": "wo"}[leaf]
        if sparse:
            return np.stack(
                [
                    stored[f"param/{prefix}mlp.experts.expert_{e}.{leaf}.weight"].T
                    for e in range(config.moe.num_experts)
                ]
            )
        module = "mlp" if config.sparse else "DenseReluDense"
        return stored[f"param/{prefix}{module}.{leaf}.weight"].T

    values = {}
    for name, leaf in named_parameters(model).items():
        if "/runs/" in name:
            position = int(name.split("/layers/")[1].split("/")[0])
            layers = range(position, leaf.shape[0] * every, every)
            values[name] = np.stack([one(name, i) for i in layers]).astype(np.float32)
        else:
            values[name] = one(name, 0).astype(np.float32)
        assert values[name].shape == leaf.shape, name
    return with_parameters(model, values)


@pytest.mark.parametrize("name", MODELS)
def test_equals_hugging_face(name):
    stored = reference(name)
    config = model_config(json.loads(str(stored["config"])))
    abstract = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    model = load_reference(abstract, stored)

    @jax.jit
    def run(model, source, target):
        states, _ = model.encode(source, (source > 0).astype("int32"), None)
        return states, model(source, target)

    states, logits = run(model, stored["encoder_input_tokens"], stored["decoder_input_tokens"])
    np.testing.assert_allclose(states, stored["encoder_states"], atol=TOLERANCE)
    np.testing.assert_allclose(logits, stored["logits"], atol=TOLERANCE)

    padded = stored["padded/encoder_input_tokens"]
    _, logits = run(model, padded, stored["decoder_input_tokens"])
    np.testing.assert_allclose(logits, stored["padded/logits"], atol=TOLERANCE)
