"""Metadata of parameters, by path."""

import pytest

from switch_jax.model.lora import add_adapters
from switch_jax.model.parameters import abstract_model, parameter_metadata, stack_and_sublayer
from tests.support.configs import tiny

EVERY_KIND = {
    "model.activation": "geglu",
    "model.tied_embeddings": False,
    "moe.sublayer": "both",
    "moe.shared_d_ff": 8,
    "moe.balance_bias_rate": 0.1,
}
# Kind by the last two names of a path.
KINDS = {
    "embedding": "embedding",
    "head": "head",
    "relative_bias/table": "relative_bias",
    "router/kernel": "router",
    "router/bias": "router_bias",
}
KINDS |= {f"{norm}_norm/scale": "norm" for norm in ("self", "cross", "mlp", "final")}
KINDS |= {f"self_attention/{name}": "attention" for name in ("query", "key", "value", "out")}
KINDS |= {f"cross_attention/{name}": "attention" for name in ("query", "key", "value", "out")}
KINDS |= {f"{mlp}/{name}": "feed_forward" for mlp in ("mlp", "shared") for name in ("wi", "wo")}
KINDS |= {f"{mlp}/gate": "feed_forward" for mlp in ("mlp", "shared")}
KINDS |= {f"experts/{name}": "expert" for name in ("wi", "gate", "wo", "query", "key_value")}


def test_every_parameter_has_its_kind():
    metadata = parameter_metadata(abstract_model(tiny(**EVERY_KIND)))
    assert {"/".join(path.split("/")[-2:]): m.kind for path, m in metadata.items()} == KINDS
    for path, (axes, kind) in metadata.items():
        assert ("expert" in axes) == (kind == "expert"), path
        assert ("layers" in axes) == ("/layers/" in path), path


def test_adapters_have_the_kind_of_their_matrix():
    config = tiny(**{"lora.rank": 2})
    metadata = add_adapters(parameter_metadata(abstract_model(config)), config)
    matrix = "encoder/runs/0/layers/1/mlp/experts/wi"
    assert metadata[matrix] == (("layers", "expert", "embed", "mlp"), "expert")
    assert metadata[f"{matrix}.lora_a"] == (("layers", "expert", "embed", "lora"), "expert")
    assert metadata[f"{matrix}.lora_b"] == (("layers", "expert", "lora", "mlp"), "expert")


def test_a_path_gives_the_key_of_its_router_statistics():
    router = "decoder/runs/0/layers/1/self_attention/router/bias"
    assert stack_and_sublayer(router) == "decoder/self_attention"
    with pytest.raises(KeyError, match="is in no layer"):
        stack_and_sublayer("embedding")
