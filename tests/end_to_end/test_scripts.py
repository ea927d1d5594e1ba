"""scripts/: what they print, on problems of a few milliseconds."""

import json
import re
import runpy

import pytest

from tests.support.paths import SCRIPTS


def test_bench_routing_times_every_part_for_each_number_of_experts():
    script = runpy.run_path(str(SCRIPTS / "bench" / "routing_layer.py"))
    shape = {"d_model": 8, "d_ff": 16, "rows": 2, "length": 16, "group_size": 16}
    # It also compares the two formulations, results and gradients.
    result = json.loads(json.dumps(script["measure"]([2, 4], repeats=1, **shape)))
    assert list(result["experts"]) == ["2", "4"]
    for reports in result["experts"].values():
        assert list(reports) == list(script["PARTS"])
        assert reports["layer"]["share"] == 1
        assert {name for name, r in reports.items() if "ratio" in r} == set(script["OURS"])
        for report in reports.values():
            assert 0 < report["seconds_min"] <= report["seconds"] <= report["seconds_max"]
    lines = script["render"](result).splitlines()
    assert lines[0] == "| | 2 experts | 4 experts |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {label}" for label in script["PARTS"].values()
    ]


def test_bench_tokens_per_expert_compares_every_sparse_model_with_dense(tmp_path):
    script = runpy.run_path(str(SCRIPTS / "bench" / "tokens_per_expert.py"))
    changes = {"model.d_model": 8, "model.d_ff": 16, "model.num_heads": 1, "model.head_dim": 8}
    changes |= {"model.num_encoder_layers": 2, "model.num_decoder_layers": 2, "mesh.data": 1}
    changes |= {"data.inputs_length": 16, "data.targets_length": 8, "model.vocab_size": 64}
    points = script["measure"]([2], [1, 2], repeats=1, changes=changes)
    assert [point.tokens for point in points[2]] == [8, 16]
    assert all(point.ratio > 0 for point in points[2])
    header, _, row = script["render"](points, [1, 2]).splitlines()
    assert header == "| | 1 rows | 2 rows |"
    assert re.fullmatch(r"\| 2 experts \| [\d.]+ \(8 tokens\) \| [\d.]+ \(16 tokens\) \|", row)
    script["draw"](points, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_keyword_task_cuts_one_keyword_at_a_time():
    script = runpy.run_path(str(SCRIPTS / "data" / "keyword_task.py"))
    text = "for format in forms: pass"
    assert [gap["targets"].split()[1] for gap in script["gaps"](text)] == ["for", "in", "pass"]
    for gap in script["gaps"](text):
        sentinel, answer = gap["targets"].split()
        assert gap["inputs"].replace(sentinel, answer) == text


def test_results_of_a_sweep_take_the_place_of_older_ones(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPTS / "docs" / "results.py"))
    folder, document = tmp_path / "experts", tmp_path / "results.md"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "steps.png").write_bytes(b"a picture")
    (folder / "summary.md").write_text(
        "# Title\n\nFacts.\n\n## Steps\n\n![Steps](figures/steps.png)\n"
    )
    document.write_text("Before.\n<!-- experts -->\nOld.\n<!-- end of experts -->\nAfter.\n")
    names = {"DOCUMENT": document, "IMAGES": tmp_path / "images"}
    for function in ("main", "section", "replace_section"):
        script[function].__globals__.update(names)
    for _ in range(2):  # the second time changes nothing
        monkeypatch.setattr("sys.argv", ["results.py", str(folder)])
        script["main"]()
        lines = [line for line in document.read_text().splitlines() if line]
        assert lines == [
            "Before.",
            "<!-- experts -->",
            "Facts.",
            "#### Steps",
            "![Steps](images/results/experts_steps.png)",
            "<!-- end of experts -->",
            "After.",
        ]
    assert (tmp_path / "images" / "experts_steps.png").read_bytes() == b"a picture"
    with pytest.raises(SystemExit, match="no place between <!-- steps -->"):
        script["replace_section"]("nothing", "steps", "")


def test_package_text_takes_small_languages_whole_and_each_text_once(tmp_path):
    script = runpy.run_path(str(SCRIPTS / "data" / "package_text.py"))
    budgets = script["budgets"]({"python": 900, "c": 500, "english": 30}, 230)
    assert budgets == {"english": 30, "c": 100, "python": 100}
    files = {"a/x.py": "one", "b/x.py": "one", "b/y.PY": "two", "LICENSE.x": "law", "n.py": " "}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = script["documents"](tmp_path)
    assert {name: of for name, of in found.items() if of} == {"python": ["one"], "english": ["law"]}
    assert list(script["taken"](["ab", "cd", "e"], 4)) == ["ab", "cd"]
