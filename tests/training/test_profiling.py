"""Traces of train steps."""

import gzip
import json

import jax
import jax.numpy as jnp

from switch_jax.training.profiling import StepProfiler, region_slices

PROGRAM = """
  %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/while/body/attention/dot_general"}
  ROOT %dot.2 = f32[8]{0} dot(%a), metadata={op_name="jit(step)/transpose(jvp(experts))/dot"}
  %copy.3 = f32[8]{0} copy(%a), metadata={op_name="jit(step)/copy"}
"""


def test_instructions_of_a_region_get_a_slice_with_its_name():
    def event(op):
        times = {"ts": 5, "dur": 2}
        return {"ph": "X", "pid": 1, "tid": 7, "name": op, "args": {"hlo_op": op}, **times}

    events = [event("dot.1"), event("dot.2"), event("copy.3"), {"ph": "M", "name": "process_name"}]
    *slices, name = region_slices(events, PROGRAM)
    assert [s["name"] for s in slices] == ["attention", "experts, backward"]
    assert {(s["pid"], s["ts"], s["dur"]) for s in slices} == {(1, 5, 2)}
    assert {s["tid"] for s in slices} == {name["tid"]} != {7}
    assert name["args"] == {"name": "regions"}


def test_a_trace_of_some_steps_has_named_regions(tmp_path):
    @jax.jit
    def step(x):
        with jax.named_scope("attention"):
            return x @ x

    x = jnp.ones((64, 64))
    profiler = StepProfiler("2:3", tmp_path / "profile")
    for number in range(1, 5):
        profiler.begin_step(number)
        result = step(x)
        if profiler.ends_with(number, last=False):
            assert number == 3
            sentence = profiler.end(result, step.lower(x).compile().as_text)
    assert str(tmp_path / "profile") in sentence
    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "attention" for event in events) >= 2
    assert list(tmp_path.rglob("*.xplane.pb")), "nothing for TensorBoard"


def test_the_trace_ends_with_the_run_and_without_steps_there_is_none(tmp_path):
    profiler = StepProfiler(None, tmp_path)
    profiler.begin_step(1)
    assert not profiler.ends_with(1, last=True)
    profiler = StepProfiler("1:9", tmp_path)
    profiler.begin_step(5)  # a resumed run
    assert not profiler.ends_with(5, last=False) and profiler.ends_with(6, last=True)
    profiler.end(jnp.ones(()), str)
