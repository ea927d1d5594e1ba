"""Sparse upcycling, and initialisation of a dense model from a sparse one."""

import jax
import numpy as np
import pytest

import switch_jax
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.pretrained import PretrainedModel
from switch_jax.checkpoint.upcycle import upcycle_dense_model
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config import load
from switch_jax.config.load import override_config
from switch_jax.data import open_batches
from switch_jax.distributed.mesh import make_mesh
from switch_jax.model.parameters import layer_slices, named_parameters
from switch_jax.training.initial_state import initial_state_report, make_initial_state
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny

DENSE = {"moe.num_experts": 0}
SPARSE = {"moe.num_experts": 4, "moe.last": 2}
# No token is dropped, and the gates of a token's two experts sum to one.
TWO = SPARSE | {"moe.router": "top_k", "moe.renormalize": True, "moe.eval_capacity_factor": None}


def config(**overrides) -> load.Config:
    layers = {"model.num_encoder_layers": 4, "model.init_scale": 1.0}
    return tiny(**layers, **{"data.reader": "synthetic", "mesh.data": 1} | overrides)


class Run:
    """A WORKDIR of a model with random parameters; its parameters and logits."""

    def __init__(self, path, **overrides):
        made_with = config(**overrides, **{"train.seed": 7})
        self.path, program = path, TrainProgram(made_with, make_mesh(made_with))
        self.params = program.init().params
        Workdir(path).prepare(made_with, None)
        checkpoints = Checkpointer(Workdir(path), keep=1)
        save_state(checkpoints, program.init(), open_batches(made_with, "train"))
        checkpoints.close()
        self.by_layer = values_by_layer(self.params, made_with)
        self.logits = logits(program.sharded.model(self.params))


def values_by_layer(params, config) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(params[whole] if block is None else params[whole][block])
        for name, (whole, block) in layer_slices(params, config).items()
    }


def logits(model) -> np.ndarray:
    batch = make_batch(config())
    run = jax.jit(lambda model, source, target: model(source, target))
    return np.asarray(run(model, batch["encoder_input_tokens"], batch["decoder_input_tokens"]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("runs") / "dense", **DENSE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("runs") / "sparse", **SPARSE)


def start_from(run: Run, **overrides):
    """Returns initial and fresh parameters by layer, and the model with the initial parameters."""
    settings = override_config(config(**overrides), {"init_from": str(run.path)})
    program = TrainProgram(settings, make_mesh(settings))
    fresh, params = program.init().params, make_initial_state(program).params
    assert all(params[name].sharding == fresh[name].sharding for name in fresh)
    by_layer = values_by_layer(params, settings), values_by_layer(fresh, settings)
    return *by_layer, program.sharded.model(params)


def test_names_by_layer_do_not_depend_on_expert_placement():
    name = "encoder/runs/{}/layers/{}/mlp/wi".format
    dense, spread, last = config(**DENSE), config(), config(**SPARSE)
    assert layer_slices([name(0, 0)], dense) == {
        f"encoder/layers/{i}/mlp/wi": (name(0, 0), i) for i in range(4)
    }
    assert layer_slices([name(0, 0)], spread) == {
        "encoder/layers/0/mlp/wi": (name(0, 0), 0),
        "encoder/layers/2/mlp/wi": (name(0, 0), 1),
    }
    assert layer_slices([name(1, 1)], last) == {"encoder/layers/3/mlp/wi": (name(1, 1), 0)}
    assert layer_slices(["embedding"], last) == {"embedding": ("embedding", None)}


@pytest.mark.parametrize("mesh", [{}, {"mesh.expert": 4, "mesh.model": 2, "mesh.fsdp": True}])
def test_every_expert_is_a_copy_of_the_dense_weights(dense, mesh):
    params, fresh, _ = start_from(dense, **SPARSE, **mesh)
    assert sum("/router/" in name for name in params) == 2
    for name, value in params.items():
        if "/router/" in name:
            expected = fresh[name]
        else:
            expected = dense.by_layer[name.replace("/experts/", "/")]
        if "/experts/" in name:
            assert value.shape == (4, *expected.shape)
        assert (value == expected).all(), name


@pytest.mark.parametrize(
    "moe", [SPARSE | {"moe.num_experts": 1}, TWO], ids=["one expert", "two of four, renormalised"]
)
def test_gates_that_sum_to_one_give_the_logits_of_the_dense_model(dense, moe):
    _, _, model = start_from(dense, **moe)
    np.testing.assert_allclose(logits(model), dense.logits, rtol=1e-5, atol=1e-5)


def test_raw_gates_of_several_experts_change_the_logits(dense):
    _, _, model = start_from(dense, **SPARSE)
    assert np.abs(logits(model) - dense.logits).max() > 0.1


def test_a_dense_model_loads_all_parameters_but_experts_and_routers(sparse):
    params, fresh, _ = start_from(sparse, **DENSE)
    initialised = {name for name in params if name not in sparse.by_layer}
    assert initialised == {f"{place}/mlp/{w}" for w in ("wi", "wo") for place in SPARSE_LAYERS}
    for name, value in params.items():
        expected = fresh[name] if name in initialised else sparse.by_layer[name]
        assert (value == expected).all(), name


SPARSE_LAYERS = ("encoder/layers/3", "decoder/layers/1")


def test_rules_apply_to_single_layers(dense):
    settings = {"init_from": str(dense.path), "init_rules": "encoder/layers/(1|3)/mlp/wi ->"}
    settings = override_config(config(**DENSE), settings)
    program = TrainProgram(settings, make_mesh(settings))
    fresh = values_by_layer(program.init().params, settings)
    for name, value in values_by_layer(make_initial_state(program).params, settings).items():
        initialised = name in ("encoder/layers/1/mlp/wi", "encoder/layers/3/mlp/wi")
        assert (value == (fresh if initialised else dense.by_layer)[name]).all(), name


def test_the_report_lists_layers_with_different_entries_separately(dense):
    settings = override_config(config(**SPARSE), {"init_from": str(dense.path)})
    lines = [" ".join(line.split()) for line in initial_state_report(settings).splitlines()]
    assert "loaded encoder/layers/*/mlp/wi 16 × 32 layers 0,1,2" in lines
    experts = "loaded encoder/layers/*/mlp/experts/wi 4 × 16 × 32"
    assert f"{experts} from encoder/layers/*/mlp/wi, for every expert layers 3" in lines
    assert "initialised decoder/layers/*/mlp/router/kernel 16 × 4 layers 1" in lines


def test_upcycled_workdir_equals_the_initial_state_of_training(dense, tmp_path, capsys):
    output = tmp_path / "sparse"
    keys = {"moe.num_experts": "4", "moe.last": "2", "train.seed": "3"}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["convert", "upcycle", str(dense.path), str(output), *flags]) == 0
    assert str(output) in capsys.readouterr().out
    written = named_parameters(switch_jax.load(output))
    target = SPARSE | {"train.seed": 3}
    expected, _, _ = start_from(dense, **target)
    written = values_by_layer({n: leaf[...] for n, leaf in written.items()}, config(**target))
    assert written.keys() == expected.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert Workdir(output).config() == config(**target)


def test_upcycling_merges_adapters_and_grows_the_vocabulary(tmp_path):
    lora = Run(tmp_path / "lora", **DENSE, **{"lora.rank": 2, "lora.of": "mlp/"})
    name = "encoder/runs/0/layers/0/mlp/wi"
    params = dict(lora.params) | {f"{name}.lora_b": lora.params[f"{name}.lora_b"] + 1}
    source = PretrainedModel(
        config=Workdir(lora.path).config(),
        shapes={n: p.shape for n, p in params.items()},
        restore=lambda abstract: {n: params[n] for n in abstract},
    )
    target = config(**SPARSE, **{"model.vocab_size": 40})
    imported = upcycle_dense_model(source, target)
    merged = params[name][3] + 8 * params[f"{name}.lora_a"][3] @ params[f"{name}.lora_b"][3]
    expert = imported.read_slice("encoder/runs/1/layers/1/mlp/experts/wi", (0, 2))
    np.testing.assert_allclose(expert, merged, rtol=1e-6)
    embedding = imported.read_slice("embedding", ())
    assert embedding.shape == (40, 16) and (embedding[:32] == params["embedding"]).all()
    assert imported.config.lora.rank == 0


def test_models_that_cannot_be_upcycled_are_refused(dense, sparse, tmp_path, capsys):
    def error_of(source, *flags):
        assert main(["convert", "upcycle", str(source.path), str(tmp_path / "out"), *flags]) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    assert "--config.moe.num_experts" in error_of(dense)
    flags = ["--config.moe.num_experts=4", "--config.model.d_ff=48"]
    assert "/layers/0/mlp/wi has the shape [16, 48]" in error_of(dense, *flags)
    assert "[8, 16, 32]" in error_of(sparse, "--config.moe.num_experts=8")
