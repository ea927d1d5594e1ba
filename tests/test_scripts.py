"""scripts/: what they print, on problems of a few milliseconds."""

import json
import runpy
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_bench_routing_times_every_part_for_each_number_of_experts():
    script = runpy.run_path(str(SCRIPTS / "bench_routing.py"))
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


def test_keyword_task_cuts_one_keyword_at_a_time():
    script = runpy.run_path(str(SCRIPTS / "keyword_task.py"))
    text = "for format in forms: pass"
    assert [gap["targets"].split()[1] for gap in script["gaps"](text)] == ["for", "in", "pass"]
    for gap in script["gaps"](text):
        sentinel, answer = gap["targets"].split()
        assert gap["inputs"].replace(sentinel, answer) == text
