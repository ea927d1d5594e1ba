"""Parameter transfer: loaded, initialised and trained parameters."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.transfer import plan_transfer, render_transfer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import override_config
from switch_jax.data import open_batches
from switch_jax.data.batch import SyntheticIterator
from switch_jax.data.vocabulary import read_vocabulary
from switch_jax.data.vocabulary_builder import train_vocabulary
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.training.initial_state import initial_state_report, make_initial_state
from switch_jax.training.optimizer import trained_parameters
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny

OLD = {"embedding": (8, 4), "encoder/wi": (4, 6), "encoder/wo": (6, 4), "router": (4, 2)}


def test_without_rules_every_parameter_must_have_the_same_name_and_shape():
    loaded, initialised, ignored = plan_transfer(OLD, OLD | {"other": (4, 8)}, "")
    assert loaded == {name: name for name in OLD} and not initialised and ignored == ["other"]
    with pytest.raises(UserError, match=r"head is taken from head, which .* 'head ->'"):
        plan_transfer(OLD | {"head": (4, 8)}, OLD, "")
    with pytest.raises(UserError, match=r"encoder/wi has the shape \[4, 7\] .* \[4, 6\]"):
        plan_transfer(OLD | {"encoder/wi": (4, 7)}, OLD, "")


def test_the_first_rule_that_matches_the_whole_name_is_applied():
    target = {"decoder/wi": (4, 6), "decoder/wo": (6, 4), "router": (4, 3), "embedding": (8, 4)}
    rules = r"decoder/wo ->; decoder/(.*) -> encoder/\1; router ->"
    loaded, initialised, ignored = plan_transfer(target, OLD, rules)
    assert loaded == {"decoder/wi": "encoder/wi", "embedding": "embedding"}
    assert initialised == ["decoder/wo", "router"]
    assert ignored == ["encoder/wo", "router"]
    text = render_transfer(plan_transfer(target, OLD, rules), target, OLD)
    assert re.search(r"loaded +decoder/wi +4 × 6  from encoder/wi", text)
    assert text.endswith("2 loaded, 2 initialised, 2 ignored")


@pytest.mark.parametrize("rules", ["embed ->", "router ->; rout.* -> encoder/wi"])
def test_a_rule_that_matches_nothing_is_refused(rules):
    with pytest.raises(UserError, match=r"init_rules has '(embed|rout\.\*)', which is the whole"):
        plan_transfer(OLD, OLD, rules)


def test_only_the_vocabulary_may_grow():
    grown = plan_transfer(OLD | {"embedding": (12, 4)}, OLD, "")
    assert grown.loaded["embedding"] == "embedding"
    for wrong in ({"embedding": (6, 4)}, {"embedding": (12, 5)}, {"encoder/wi": (8, 6)}):
        with pytest.raises(UserError, match="has the shape"):
            plan_transfer(OLD | wrong, OLD, "")


@pytest.mark.parametrize("rules", ["router", "( -> x", r"router -> \3"])
def test_invalid_rules_are_refused(rules):
    with pytest.raises(UserError, match="init_rules"):
        plan_transfer(OLD, OLD, rules)


def config(**overrides):
    return tiny(**{"data.reader": "synthetic", "mesh.data": 1} | overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A WORKDIR of a tiny model."""
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "old")
    made_with = config(**{"train.seed": 7})
    program = TrainProgram(made_with, make_mesh(made_with))
    workdir.prepare(made_with, None)
    checkpoints = Checkpointer(workdir, keep=1)
    state = program.init()
    state = dataclasses.replace(state, step=state.step + 3)
    state, *_ = program.train_step(state, program.sharded.shard_batch(make_batch(made_with)))
    save_state(checkpoints, state, open_batches(made_with, "train"))
    checkpoints.close()
    return workdir.path, jax.device_get(state.params), jax.device_get(state.opt_state)


def start_from(trained, **overrides):
    """Returns parameters of the initial state, fresh parameters, and the initial state."""
    settings = override_config(config(**overrides), {"init_from": str(trained[0])})
    program = TrainProgram(settings, make_mesh(settings))
    fresh = {name: np.asarray(p) for name, p in program.init().params.items()}
    state = make_initial_state(program)
    assert all(state.params[n].sharding == program.state_sharding.params[n] for n in fresh)
    return {name: np.asarray(p) for name, p in state.params.items()}, fresh, state


@pytest.mark.parametrize("mesh", [{}, {"mesh.expert": 4, "mesh.model": 2}])
def test_init_from_loads_parameters_and_not_the_step(trained, mesh):
    params, _, state = start_from(trained, **mesh)
    assert int(state.step) == 0
    assert all((params[name] == value).all() for name, value in trained[1].items())


@pytest.mark.parametrize("mesh", [{}, {"mesh.expert": 4, "mesh.model": 2}])
def test_init_optimizer_loads_statistics_and_restarts_the_schedule(trained, mesh):
    settings = override_config(
        config(**mesh), {"init_from": str(trained[0]), "init_optimizer": "loaded"}
    )
    program = TrainProgram(settings, make_mesh(settings))
    state, fresh = make_initial_state(program), program.init()

    def by_kind(opt_state):
        scheduled, statistics = [], []
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
            is_schedule = jax.tree_util.keystr(path) == "[2].count"
            (scheduled if is_schedule else statistics).append(np.asarray(leaf))
        return scheduled, statistics

    (schedule,), statistics = by_kind(state.opt_state)
    assert int(state.step) == 0 == schedule and by_kind(trained[2])[0] == [1]
    assert all(map(np.array_equal, statistics, by_kind(trained[2])[1]))
    assert not all(map(np.array_equal, statistics, by_kind(fresh.opt_state)[1]))
    shardings = jax.tree.leaves(program.state_sharding.opt_state)
    assert all(x.sharding == s for x, s in zip(jax.tree.leaves(state.opt_state), shardings))


def test_an_optimizer_that_does_not_fit_is_refused(trained):
    for change in ({"optimizer.name": "adamw"}, {"model.vocab_size": 48}):
        settings = override_config(
            config(**change), {"init_from": str(trained[0]), "init_optimizer": "loaded"}
        )
        with pytest.raises(UserError, match=r"optimizer of .* does not fit.* init_optimizer=fresh"):
            make_initial_state(TrainProgram(settings, make_mesh(settings)))
    with pytest.raises(UserError, match="init_optimizer=loaded needs init_from"):
        override_config(config(), {"init_optimizer": "loaded"})


def test_a_larger_vocabulary_keeps_the_old_ids(trained):
    params, fresh, _ = start_from(trained, **{"model.vocab_size": 48})
    old = trained[1]["embedding"]
    assert (params["embedding"][: len(old)] == old).all()
    assert (params["embedding"][len(old) :] == fresh["embedding"][len(old) :]).all()


def test_sentinels_move_with_a_vocabulary_that_grows(tmp_path):
    """The new vocabulary has all pieces of the old one, and another piece behind them."""
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in rng.integers(0, 26, 60)) for _ in range(400)]
    train_vocabulary(texts, tmp_path / "old.model", 480)
    model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "old.model").read_bytes())
    model.pieces.add(piece="▁fnord", score=-1.0)
    (tmp_path / "new.model").write_bytes(model.SerializeToString())
    other = model.pieces.pop(100)
    model.pieces.append(other)
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    (tmp_path / "text.txt").write_text("\n".join(texts))

    def with_vocabulary(name, **overrides):
        settings = {"model.vocab_size": 512, "data.vocabulary": str(tmp_path / f"{name}.model")}
        settings |= {"data.reader": "store", "data.mixture": str(tmp_path / "text.txt")}
        return override_config(tiny(**settings), {"mesh.data": "1"} | overrides)

    old = with_vocabulary("old")
    workdir, program = Workdir(tmp_path / "run"), TrainProgram(old, make_mesh(old))
    words = read_vocabulary(tmp_path / "old.model")
    workdir.prepare(old, words.content)
    checkpoints = Checkpointer(workdir, keep=1)
    state = program.init()
    save_state(checkpoints, state, SyntheticIterator(old))
    checkpoints.close()
    before = np.asarray(state.params["embedding"])

    grown = with_vocabulary("new", init_from=str(workdir.path))
    after = np.asarray(
        make_initial_state(TrainProgram(grown, make_mesh(grown))).params["embedding"]
    )
    more = read_vocabulary(tmp_path / "new.model")
    for token in range(words.size):
        moved = next(i for i in range(more.size) if more.piece(i) == words.piece(token))
        assert (after[moved] == before[token]).all(), words.piece(token)
    with pytest.raises(UserError, match=r"other\.model' is another than that of init_from"):
        initial_state_report(with_vocabulary("other", init_from=str(workdir.path)))


def test_init_from_loads_adapters(tmp_path):
    adapted = config(**{"lora.rank": 2})
    workdir, program = Workdir(tmp_path), TrainProgram(adapted, make_mesh(adapted))
    workdir.prepare(adapted, None)
    checkpoints = Checkpointer(workdir, keep=1)
    state = program.init()
    save_state(checkpoints, state, SyntheticIterator(adapted))
    checkpoints.close()
    again = override_config(adapted, {"init_from": str(tmp_path)})
    assert initial_state_report(again).endswith(
        f"{len(state.params)} loaded, 0 initialised, 0 ignored"
    )


def test_init_rules_apply_to_the_initial_state(trained):
    settings = override_config(
        config(), {"init_from": str(trained[0]), "init_rules": ".*/router/.* ->"}
    )
    program = TrainProgram(settings, make_mesh(settings))
    fresh, params = program.init().params, make_initial_state(program).params
    for name in params:
        expected = fresh[name] if "router" in name else trained[1][name]
        assert (np.asarray(params[name]) == np.asarray(expected)).all(), name
    lines = initial_state_report(settings).splitlines()
    assert any(
        re.fullmatch(r"initialised +encoder/layers/\*/mlp/router/kernel +16 × 4 +layers 1", line)
        for line in lines
    )


@pytest.mark.parametrize(
    "trained_by, moves",
    [
        ("experts", lambda name: "/experts/" in name),
        ("non_experts", lambda name: "/experts/" not in name),
        ("attention", lambda name: "attention/" in name),
        ("decoder/.*norm", lambda name: re.search("decoder/.*norm", name) is not None),
    ],
)
def test_only_the_trained_parameters_change_and_have_state(trained_by, moves):
    settings = config(**{"optimizer.trained": trained_by, "optimizer.name": "adamw"})
    program = TrainProgram(settings, make_mesh(settings))
    state = program.init()
    before = {name: np.asarray(p) for name, p in state.params.items()}
    sizes = {leaf.size for leaf in jax.tree.leaves(state.opt_state)}
    expected = sum(2 * p.size for name, p in before.items() if moves(name))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == expected, sizes
    state, metrics, _ = program.train_step(state, program.sharded.shard_batch(make_batch(settings)))
    changed = {name for name, p in state.params.items() if (np.asarray(p) != before[name]).any()}
    assert changed == {name for name in before if moves(name)}
    assert float(metrics["grad_norm"]) > 0


def test_trained_patterns_that_match_nothing_are_refused():
    for wrong in ("adapters", "("):
        with pytest.raises(UserError, match=r"optimizer\.trained="):
            trained_parameters(config(**{"optimizer.trained": wrong}), ["encoder/wi"])
