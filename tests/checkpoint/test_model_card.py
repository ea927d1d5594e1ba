"""Model card of an exported model: what the run has recorded, in the form that the hub reads."""

import hashlib
import json
import shutil

import pytest

from switch_jax.checkpoint.interop import model_card
from switch_jax.cli.main import main
from tests.support.paths import GOLDEN

GOLDEN_RUN = GOLDEN / "workdir" / "run"  # 4 steps on 4 rows, 128 target tokens
hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def run(tmp_path):
    """A copy of a run whose newest checkpoint is that of its last step, 4."""
    return shutil.copytree(GOLDEN_RUN, tmp_path / "my_run")


def export(run, folder):
    assert main(["convert", "to-hf", str(run), str(folder)]) == 0
    return hub.ModelCard.load(folder / "README.md")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rows(card):
    """Returns the cells of the card's tables by their first cell."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_the_card_has_the_numbers_of_the_run(run, tmp_path):
    card = export(run, tmp_path / "out")
    table = rows(card)
    recorded = json.loads((run / "config.json").read_text())
    canonical = json.dumps(recorded["config"], sort_keys=True).encode()
    assert table["steps"] == ["4 of 4"] and table["target tokens"] == ["128"]
    assert table["text"] == ["text"] and table["objective"] == ["span_corruption"]
    assert table["config digest"] == [hashlib.blake2b(canonical, digest_size=16).hexdigest()]
    assert table["switch_jax"] == [f"0.1.0, git revision {recorded['git_revision']}"]
    assert table["batch"] == ["4 rows of 32 input tokens and 11 target tokens"]
    assert "\n# my\\_run\n" in card.text and "Switch Transformer with 4 experts" in card.text
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {
        name: last[name] for name in ("cross_entropy", "neg_log_perplexity", "accuracy")
    }
    assert table["cross_entropy"][0] == f"{last['cross_entropy']:.4f}"
    assert card.data.library_name == "transformers" and card.data.model_name == "my_run"
    assert card.data.tags == ["switch_transformers", "switch_jax", "mixture-of-experts"]
    assert card.data.language is None  # that of `text` is unknown
    assert card.data.license is None and "licen" not in card.content.lower()


def test_the_code_of_the_card_names_the_class_and_loads_the_folder(run, tmp_path):
    card = export(run, tmp_path / "out")
    transformers, ours = (block.split("```")[0] for block in card.text.split("```python\n")[1:])
    assert "SwitchTransformersForConditionalGeneration.from_pretrained" in transformers
    assert "AutoTokenizer" in transformers and (tmp_path / "out" / "spiece.model").exists()
    names = {}
    exec(ours.replace("FOLDER", str(tmp_path / "out")), names)
    assert names["model"].config.moe.num_experts == 4


def test_a_checkpoint_has_the_evaluation_of_its_own_step(run, tmp_path):
    """The run went on, and was better in between by the metric that it keeps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["step"] = min(line["step"], 4)
        if line["split"] == "eval":
            line |= {"neg_log_perplexity": -3.0, "glue.cola/mcc": 50.0, "mc4.sw/cross_entropy": 2}
    better = {**lines[1], "step": 3, "split": "eval", "neg_log_perplexity": -9, "glue.cola/mcc": 70}
    later = {**better, "step": 5, "glue.cola/mcc": 90.0}
    written = [lines[0], better, lines[-1], later]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    table = rows(export(run, tmp_path / "by_quality"))
    assert table["glue.cola/mcc"][0] == "50.0000" and len(table["glue.cola/mcc"]) == 2
    edit(run / "config.json", lambda c: c["config"]["train"].update(keep_best="glue.cola/mcc"))
    table = rows(export(run, tmp_path / "by_score"))
    assert table[""][:2] == ["last, step 4", "best by glue.cola/mcc, step 3"]
    assert table["glue.cola/mcc"][:2] == ["50.0000", "70.0000"]
    assert "mc4.sw/cross_entropy" not in table and not any("router" in name for name in table)


def test_a_run_without_metrics_has_a_card_without_numbers(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    card = export(run, tmp_path / "out")
    assert "The run has no evaluation of these parameters." in card.text
    assert card.data.eval_results is None and card.data.metrics is None
    table = rows(card)
    assert "target tokens" not in table and table["steps"] == ["4 of 4"]


def test_a_converted_checkpoint_is_not_said_to_be_trained(run, tmp_path):
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf")]) == 0
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    card = export(tmp_path / "again", tmp_path / "out")
    assert "None: the parameters were converted" in card.text and "steps" not in rows(card)
    assert card.data.language is None


@pytest.mark.parametrize(
    "mixture, languages",
    [
        ("c4", ["en"]),
        ("mc4.sw=2, mc4.de=1", ["de", "sw"]),
        ("mc4.de, /text/*.jsonl", []),
        ("mc4", []),
        ("glue", []),
    ],
)
def test_a_language_is_named_only_if_all_sources_have_one(mixture, languages, run, tmp_path):
    edit(run / "config.json", lambda c: c["config"]["data"].update(mixture=mixture))
    assert (export(run, tmp_path / "out").data.language or []) == languages


def test_names_of_strangers_stay_text(run, tmp_path):
    odd = run.rename(tmp_path / "a: [b] `c` <i>|")
    mixture = "a|b`c`: {x}\n# title"
    edit(odd / "config.json", lambda c: c["config"]["data"].update(mixture=mixture))
    edit(odd / "config.json", lambda c: c["config"].update(init_from="/home/me/runs/base"))
    card = export(odd, tmp_path / "out")
    assert card.data.model_name == odd.name and card.data.eval_results[0].dataset_name == mixture
    assert "\n# title" not in card.text and "<i>" not in card.text.replace("\\<i\\>", "")
    assert "another checkpoint, `runs/base`" in card.text and "/home/me" not in card.text


def test_a_dense_model_is_a_t5():
    from switch_jax.config import load_config

    config = load_config("t5_base")
    raw = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    exported = model_card.ExportedModel(config, 0, 5, raw, has_tokenizer=False)
    card = model_card.model_card(model_card.Workdir(GOLDEN_RUN), exported)
    assert "A dense T5 of 5 parameters" in card and "AutoTokenizer" not in card
    assert "mixture-of-experts" not in card
