"""Expert specialization: counts by hand, and `switch-jax experts` from checkpoint to report."""

import json
import math
import sys
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

from switch_jax.analysis.expert_report import write_expert_report
from switch_jax.analysis.expert_specialization import (
    NO_TOKEN,
    AssignmentCounts,
    _token_names,
    batch_tokens,
    count_assignments,
    describe_experts,
    shuffle_experts,
    token_expert_pairs,
)
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config import Config
from switch_jax.config.load import load_config, override_config
from switch_jax.data import open_batches
from switch_jax.data.sources.python_text import python_documents
from switch_jax.data.text_batches import text_file_batches
from switch_jax.data.vocabulary import EOS, read_vocabulary
from switch_jax.data.vocabulary_builder import train_vocabulary
from switch_jax.distributed.mesh import make_mesh
from switch_jax.evaluation.validation_loss import evaluate_checkpoint
from switch_jax.model.moe.router import hash_expert
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support import runs
from tests.support.configs import make_batch, share, tiny
from tests.support.objectives import text_length
from tests.support.pages import without_images

TEXT = "The import statement finds a module and binds it to a name in the local scope. " * 12


def make_workdir(path, config, vocabulary_file=None):
    """Writes the WORKDIR of a run that was never trained: its checkpoint is the initial state."""
    workdir, program = Workdir(path), TrainProgram(config, make_mesh(config))
    workdir.prepare(config, vocabulary_file.read_bytes())
    checkpoints = Checkpointer(workdir, keep=1)
    save_state(checkpoints, program.init(), open_batches(config, "train"))
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return runs.write_config(folder, runs.make_store(folder))


def loaded(config, **moe):
    return load_config(str(config), {f"moe.{key}": str(value) for key, value in moe.items()})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "switch"
    return make_workdir(path, loaded(config, sublayer="both"), config.parent / "tiny.model")


def counted():
    """Tokens and counts of two rows, the first with two segments and padding; 2 experts a token."""
    encoder = {
        "encoder_input_tokens": np.array([[5, 6, 5, 0], [7, 5, 5, 6]], np.int32),
        "encoder_segment_ids": np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32),
    }
    decoder = {name.replace("encoder", "decoder"): rows for name, rows in encoder.items()}
    tokens = batch_tokens(encoder | decoder, Config())["encoder"]
    # Expert 2 means none. Padding has experts, which must not be counted.
    expert_NxK = np.array([[0, 1], [1, 2], [0, 2], [0, 1], [0, 2], [0, 2], [1, 0], [1, 2]])
    gate_NxK = np.array([[8, 4], [2, 9], [6, 9], [9, 9], [6, 9], [5, 9], [1, 5], [1, 9]]) / 10
    counts = AssignmentCounts(vocab_size=8, num_experts=2)
    counts.add(tokens, expert_NxK, gate_NxK)
    return tokens, counts


def test_counts_by_hand():
    tokens, counts = counted()
    none = NO_TOKEN
    assert tokens.preceding_N.tolist() == [none, 5, none, none, none, 7, 5, 5]
    expected = np.zeros((8, 2), int)
    expected[5], expected[6], expected[7] = (4, 2), (0, 2), (1, 0)
    np.testing.assert_array_equal(counts.token_VxE, expected)
    before = np.zeros((8, 2), int)
    before[5], before[7] = (1, 3), (1, 0)
    np.testing.assert_array_equal(counts.preceding_VxE, before)
    np.testing.assert_allclose(counts.gate_E, [3.0, 0.8])


def test_mutual_information_and_tokens_of_experts_by_hand():
    layer = describe_experts(counted()[1], str)
    # 9 assignments: 4 of token 5 to expert 0, 2 of it and 2 of token 6 to 1, 1 of token 7 to 0.
    information = (
        4 * math.log(4 * 9 / (6 * 5))
        + 2 * math.log(2 * 9 / (6 * 4))
        + 2 * math.log(2 * 9 / (2 * 4))
        + 1 * math.log(1 * 9 / (1 * 5))
    ) / 9
    entropy = (5 * math.log(9 / 5) + 4 * math.log(9 / 4)) / 9
    assert layer["mutual_information"] == pytest.approx(information)
    assert layer["expert_entropy"] == pytest.approx(entropy)
    assert layer["mutual_information_of_entropy"] == pytest.approx(information / entropy)
    loads = [layer[name] for name in ("load_max", "load_min", "load_cv")]
    assert loads == pytest.approx([10 / 9, 8 / 9, 1 / 9])
    assert (layer["assignments"], layer["idle_experts"]) == (9, 0)
    first, second = layer["experts"]
    assert (first["load"], second["load"]) == (5 / 9, 4 / 9)
    assert (first["mean_gate"], second["mean_gate"]) == (pytest.approx(0.6), pytest.approx(0.2))

    def shown(expert, kind):
        return [(t["token"], t["id"], t["count"], t["share"]) for t in expert[kind]]

    assert shown(first, "tokens") == [("5", 5, 4, 0.8), ("7", 7, 1, 0.2)]
    assert shown(second, "tokens") == [("5", 5, 2, 0.5), ("6", 6, 2, 0.5)]
    assert shown(second, "characteristic") == [("6", 6, 2, 0.5)]
    assert second["characteristic"][0]["lift"] == pytest.approx(9 / 4)
    assert shown(first, "preceding") == [("5", 5, 1, 0.5), ("7", 7, 1, 0.5)]
    assert shown(second, "preceding") == [("5", 5, 3, 1)]


def test_an_expert_without_tokens_and_the_ten_most_frequent():
    counts = AssignmentCounts(vocab_size=20, num_experts=3)
    counts.token_VxE[:, 0] = 1 + np.arange(20) % 19
    counts.token_VxE[3, 1] = 10
    layer = describe_experts(counts, str)
    idle = layer["experts"][2]
    assert layer["idle_experts"] == 1 and layer["load_min"] == 0
    assert idle["load"] == 0 and idle["mean_gate"] is None and idle["tokens"] == []
    assert [t["count"] for t in layer["experts"][0]["tokens"]] == [*range(19, 9, -1)]
    # Token 3 is frequent with expert 0, too, but more so elsewhere.
    assert "3" not in [t["token"] for t in layer["experts"][0]["characteristic"]]


def test_mutual_information_by_chance_is_high_for_rare_tokens():
    many, once = AssignmentCounts(2, 2), AssignmentCounts(200, 2)
    many.token_VxE[...] = [[3000, 0], [0, 3000]]
    once.token_VxE[np.arange(200), np.arange(200) % 2] = 1
    for counts, by_chance in ((many, 0), (once, math.log(2))):
        layer = describe_experts(counts, str)
        assert layer["mutual_information"] == pytest.approx(math.log(2))
        assert layer["mutual_information_by_chance"] == pytest.approx(by_chance, abs=0.002)
    mixed = np.random.default_rng(0).poisson(1.0, (50, 8)).astype(np.int32)
    shuffled = shuffle_experts(token_expert_pairs(mixed), mixed.shape)
    assert (shuffled != mixed).any()
    for axis in (0, 1):
        np.testing.assert_array_equal(shuffled.sum(axis), mixed.sum(axis))


def test_tokens_are_counted_for_the_experts_of_hash_routing():
    """On a mesh and packed: `hash_expert` gives the expected expert of every token."""
    config = tiny(**{"moe.router": "hash", "data.pack": True, "mesh.data": 2, "mesh.expert": 2})
    program, batch = TrainProgram(config, make_mesh(config)), make_batch(config)
    found = count_assignments(program.sharded, program.init().params, [batch, batch])
    for stack in ("encoder", "decoder"):
        (counts,) = found[f"{stack}/mlp"]
        token, before = np.zeros((2, config.model.vocab_size, 4), int)
        for row, segments in zip(batch[f"{stack}_input_tokens"], batch[f"{stack}_segment_ids"]):
            for i in np.flatnonzero(segments):
                expert = int(hash_expert(row[i], 4))
                token[row[i], expert] += 2
                if i and segments[i - 1] == segments[i]:
                    before[row[i - 1], expert] += 2
        np.testing.assert_array_equal(counts.token_VxE, token)
        np.testing.assert_array_equal(counts.preceding_VxE, before)
        np.testing.assert_array_equal(counts.gate_E, token.sum(0))
        layer = describe_experts(counts, str)
        assert layer["mutual_information"] == pytest.approx(layer["expert_entropy"])
        assert layer["expert_entropy"] > 1


def test_assignments_are_counted_before_any_is_dropped():
    """Counts equal the router's statistics, at a capacity that drops most assignments."""
    values = {"moe.router": "top_k", "moe.every": 1, "moe.eval_capacity_factor": 0.25}
    config = tiny(**values, **{"model.init_scale": 1.0, "mesh.data": 1})
    program, batch = TrainProgram(config, make_mesh(config)), make_batch(config)
    params = program.init().params
    _, _, stats = jax.device_get(
        program.sharded.eval_step(params, program.sharded.shard_batch(batch))
    )
    found = count_assignments(program.sharded, params, [batch])
    assert found.keys() == stats.keys()
    for key, sums in stats.items():
        assert sums.dropped.min() > 0.5 * sums.tokens.min() and len(found[key]) == 2
        for counts, load_E, tokens in zip(found[key], sums.load_E, sums.tokens):
            np.testing.assert_array_equal(counts.token_VxE.sum(0), load_E)
            assert load_E.sum() == 2 * tokens


@pytest.mark.parametrize("text", [TEXT, "import", "a module"])
def test_a_text_becomes_batches_with_nothing_left_out(config, tmp_path, text):
    path, words = tmp_path / "text.txt", read_vocabulary(config.parent / "tiny.model")
    path.write_text(text)
    made_with = loaded(config)
    batches = text_file_batches(path, words, made_with)
    tokens = []
    for batch in batches:
        assert {len(rows) for rows in batch.values()} == {made_with.data.batch_size}
        for inputs, targets in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"]):
            cuts = {}
            for token in targets[targets > 0][:-1].tolist():
                if token > words.sentinel(99):
                    cuts[token] = []
                else:
                    cuts[next(reversed(cuts))].append(token)
            for token in inputs[inputs > 0].tolist():
                tokens += cuts.get(token, [token] if token != EOS else [])
    assert tokens == words.encode(text)
    last = batches[-1]["decoder_loss_weights"]
    assert last[0].any() and not last[-1].any()  # the last batch is filled with padding
    # Two processes have halves of the same rows.
    halves = [text_file_batches(path, words, made_with, share(index, 2)) for index in range(2)]
    for whole, *parts in zip(batches, *halves):
        for name, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


def experts_of(*arguments):
    assert main(["experts", *map(str, arguments)]) == 0


def test_from_checkpoint_to_report(workdir, capsys):
    experts_of("--workdir", workdir.path)
    out = capsys.readouterr().out.splitlines()
    html, file = workdir.path / "experts/experts.html", workdir.path / "experts/experts.json"
    assert out[:2] == [str(html), str(file)]
    assert sorted(path.name for path in file.parent.iterdir()) == ["experts.html", "experts.json"]
    analysis = json.loads(file.read_text())
    layers = analysis["layers"]
    places = [(layer["stack"], layer["layer"], layer["sublayer"]) for layer in layers]
    assert places == [
        ("encoder", 1, "attention"),
        ("encoder", 1, "ff"),
        ("decoder", 1, "attention"),
        ("decoder", 1, "ff"),
    ]
    assert [line.split("  ")[0] for line in out[-4:]] == [
        "encoder 1 attention",
        "encoder 1",
        "decoder 1 attention",
        "decoder 1",
    ]
    evaluated = evaluate_checkpoint(workdir, workdir.checkpoints / "0", workdir.config())
    for layer in layers:
        assert sum(expert["load"] for expert in layer["experts"]) == pytest.approx(1)
        assert 0 < layer["mutual_information"] < layer["expert_entropy"] + 1e-9
        assert 0.5 < layer["expert_entropy"] <= math.log(4) + 1e-9
        suffix = "/attention" if layer["sublayer"] == "attention" else ""
        name = f"router/{layer['stack']}/{layer['layer']}{suffix}"
        for measure in ("load_max", "load_min", "load_cv"):
            assert layer[measure] == pytest.approx(evaluated[f"{name}/{measure}"], rel=1e-5)
        for measure, uniform in (("confidence", 1 / 4), ("entropy", math.log(4))):
            value = layer[f"router_{measure}"]
            assert value == pytest.approx(evaluated[f"{name}/{measure}"], rel=1e-5)
            assert layer[f"uniform_{measure}"] == uniform
            assert f"<td>{value:.3f}<small>uniform {uniform:.3f}</small>" in html.read_text()
    shown = {t["token"] for layer in layers for e in layer["experts"] for t in e["tokens"]}
    assert {"<start>", "<extra_id_0>"} <= shown


def test_json_is_one_object_and_a_text_can_be_given(config, tmp_path, capsys):
    path = tmp_path / "hash"
    made = make_workdir(path, loaded(config, router="hash", jitter=0), config.parent / "tiny.model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    capsys.readouterr()
    output = tmp_path / "elsewhere"
    experts_of("--workdir", path, "--input", text, "--output", output, "--json")
    analysis = json.loads(capsys.readouterr().out)
    assert analysis == json.loads((output / "experts.json").read_text())
    assert analysis["text"] == str(text) and not made.experts.exists()
    for layer in analysis["layers"]:
        assert layer["mutual_information"] == pytest.approx(layer["expert_entropy"])
        assert layer["mutual_information_by_chance"] < 0.9 * layer["expert_entropy"]
    decoder = analysis["layers"][1]
    starts = [t for e in decoder["experts"] for t in e["tokens"] if t["token"] == "<start>"]
    rows = math.ceil(len(read_vocabulary(made.vocabulary).encode(TEXT)) / text_length(32, 11))
    assert [t["count"] for t in starts] == [rows]


class Page(HTMLParser):
    """Text of the `code` elements of a page, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.code, self.attributes, self._tags = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)
        if tag == "code":
            self.code.append("")

    def handle_endtag(self, tag):
        while self._tags.pop() != tag:  # tags that HTML allows to stay open
            pass

    def handle_data(self, data):
        if "code" in self._tags:
            self.code[-1] += data


def test_html_is_escaped_visible_and_needs_nothing_else(tmp_path):
    names = ["<start>", "<extra_id_0>", "▁the", "\u200b\t ", "&amp;", "</code>"]
    counts = AssignmentCounts(len(names), 2)
    counts.token_VxE[...] = np.arange(1, 13).reshape(6, 2)
    place = {"stack": "encoder", "layer": 3, "sublayer": "ff"}
    layer = place | describe_experts(counts, names.__getitem__)
    analysis = {
        "checkpoint": "runs/<b>",
        "text": "validation",
        "batches": 1,
        "router": "switch",
        "num_experts": 2,
        "eval_capacity_factor": None,
        "layers": [layer],
    }
    html, _ = write_expert_report(analysis, tmp_path / "a" / "b")
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert {"▁the", "⟨U+200B⟩⟨U+0009⟩⟨U+0020⟩", "&amp;", "</code>", "<extra_id_0>"} <= set(
        page.code
    )
    assert "<extra_id_0>" not in text and "runs/&lt;b&gt;" in text
    own = without_images(text)
    assert "http" not in own and "@import" not in own and "url(" not in own
    assert [value[:22] for value in page.attributes["src"] + page.attributes["srcset"]] == [
        "data:image/png;base64,"
    ] * 2
    assert not list(html.parent.glob("*.partial"))


@pytest.fixture(scope="module")
def others(config, tmp_path_factory):
    """A folder of texts and runs that cannot be used."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    words = [document.text for document in python_documents()[:2]]
    train_vocabulary(words, folder / "other.model", 600)
    synthetic = load_config(str(config), {"data.reader": "synthetic"})
    for name, made_with in (("dense", loaded(config, num_experts=0)), ("synthetic", synthetic)):
        Workdir(folder / name).prepare(made_with, None)
        (folder / name / "checkpoints" / "1").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workdir", "{others}/dense"], ["{others}/dense has no experts", "sparse"]),
        (["--workdir", "{others}/none"], ["does not exist"]),
        (["--workdir", "{run}", "--input", "{others}/no.txt"], ["no.txt", "cannot be read"]),
        (["--workdir", "{run}", "--input", "{others}"], ["cannot be read", "a text file"]),
        (["--workdir", "{run}", "--input", "{others}/empty.txt"], ["empty.txt is empty"]),
        (["--workdir", "{run}", "--input", "{others}/latin.txt"], ["not UTF-8", "byte 2"]),
        (
            ["--workdir", "{others}/synthetic", "--input", "{others}/empty.txt"],
            ["no vocabulary.model", "leave --input out"],
        ),
        (
            ["--workdir", "{run}", "--config.data.vocabulary={others}/other.model"],
            ["another vocabulary", "set data.vocabulary="],
        ),
        (["--workdir", "{run}", "--config.moe.expert=4"], ["moe.expert"]),
        (["--workdir", "{run}", "--output", "{others}/latin.txt"], ["is a file", "a folder"]),
    ],
)
def test_bad_input_is_one_sentence(workdir, others, capsys, arguments, words):
    def filled(text):
        return text.format(others=others, run=workdir.path)

    assert main(["experts", *map(filled, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("switch-jax: ") and err.count("\n") == 1, err
    assert all(filled(word) in err for word in words), err


def test_without_matplotlib_nothing_is_computed(workdir, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("switch_jax.analysis.analyse_experts", None)
    output = tmp_path / "figures"
    assert main(["experts", "--workdir", str(workdir.path), "--output", str(output)]) == 2
    assert 'pip install "switch_jax[plots]"' in capsys.readouterr().err
    assert not output.exists()


def test_tokens_without_a_vocabulary_are_numbers(workdir, tmp_path):
    config = override_config(workdir.config(), {"data.reader": "synthetic"})
    assert _token_names(Workdir(tmp_path), config)(7) == "#7"
    names = _token_names(workdir, config)
    size = read_vocabulary(workdir.vocabulary).size
    assert [names(i) for i in (0, 1, size - 1, size)] == [
        "<start>",
        "</s>",
        "<extra_id_0>",
        f"#{size}",
    ]
