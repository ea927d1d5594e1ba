"""What a block of layers keeps for the backward pass."""

import jax
import pytest

from switch_jax.distributed import make_mesh
from switch_jax.training import TrainProgram
from tests.support.configs import tiny


def scans(jaxpr):
    """Yields the equations of all scans in a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for param in equation.params.values():
            for value in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_forward_pass_stacks_no_weights_and_no_float32_activations(fsdp):
    """Casts, gathered weights and norms are computed again; the softmax keeps bfloat16."""
    values = {"model.dtype": "bfloat16", "model.num_encoder_layers": 4, "moe.group_size": 64}
    values |= {"mesh.data": 2, "mesh.fsdp": fsdp, "model.activation": "geglu"}
    config = tiny(**values)
    program = TrainProgram(config, make_mesh(config))
    traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
    weights = {leaf.shape for leaf in program.abstract_state.weights.values()}
    S, T, D = config.data.inputs_length, config.data.targets_length, config.model.d_model
    kept = []
    for scan in scans(traced.jaxpr.jaxpr):
        if not scan.params["reverse"]:
            body = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])
            results = zip(scan.outvars, body.outvars, strict=True)
            kept += [all_.aval for all_, one in results if all_.aval.ndim > one.aval.ndim]
    assert any(aval.dtype == "bfloat16" for aval in kept), "no forward scan was found"
    assert not [aval for aval in kept if aval.shape in weights]
    float32 = {aval.shape[-2:] for aval in kept if aval.dtype == "float32"}
    assert not float32 & {(S, D), (T, D), (S, S), (T, T), (T, S)}


def test_bfloat16_weights_and_rms_are_those_of_the_parameters():
    config = tiny(**{"model.dtype": "bfloat16"})
    program = TrainProgram(config, make_mesh(config))
    state = program.init()
    assert state.weights and all(w.dtype == "bfloat16" for w in state.weights.values())
    for name, weight in state.weights.items():
        assert (weight == state.params[name].astype("bfloat16")).all(), name
    assert jax.tree.leaves(TrainProgram(tiny(), make_mesh(tiny())).abstract_state.weights) == []
